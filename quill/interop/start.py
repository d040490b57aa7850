"""What a run of train.py starts from: its own checkpoint, given weights, or random ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from quill import settings
from quill.data import dataset_files
from quill.errors import InputError
from quill.files import dataset_folder, run_folder
from quill.interop import pretrained
from quill.training import checkpoint, devices, distributed


def find_start(cls, argv: list[str], usage: str) -> tuple:
    """-> (config, checkpoint to resume or None, weights to start from or None).

    config: an instance of the options `cls`, with rank 0's values on every process. What the
    command line leaves open is as the checkpoint had it, or as the weights need it. From here on
    the processes can exchange tensors. Raises InputError for what cannot be loaded.
    """
    config = settings.load(cls, argv, usage=usage)
    folder = run_folder(config.out_dir)
    start = None
    with distributed.main_first():
        saved = _load_saved(folder, config)
        if saved is None:
            start = _load_start(cls, argv, usage, config)
    if saved is not None:
        base = saved["config"] | {"out_dir": config.out_dir}  # the folder may have been moved
        config = settings.load(cls, argv, usage=usage, base=base)
    elif start is not None:
        config = settings.load(cls, argv, usage=usage, base=start.options())
    distributed.init_process_group(devices.pick_device(config.device), config.backend)
    config = cls(**distributed.broadcast_object(dataclasses.asdict(config)))
    return config, saved, start


def _load_saved(folder: Path, config) -> dict | None:
    continues = config.init_from == "auto" and checkpoint.can_resume(folder)
    if config.init_from != "resume" and not continues:
        return None
    is_main = distributed.is_main()
    may_move = is_main and not config.eval_only
    return checkpoint.load_latest(folder, may_move, is_quiet=not is_main)


def _load_start(cls, argv: list[str], usage: str, config) -> pretrained.Pretrained | None:
    source = config.init_from
    if source == "auto":  # there is no checkpoint to continue: as the config files say
        files = settings.config_files(cls, argv)
        source = settings.load(cls, files, usage=usage).init_from
    if source in ("scratch", "auto"):
        return None
    if Path(config.out_dir).resolve() in (Path(source).resolve(), Path(source).resolve().parent):
        raise InputError(
            f"out_dir={config.out_dir}: the run would write over {source}, which it starts from; "
            "choose another folder, or --init_from=resume to go on with that run"
        )
    if source in pretrained.RELEASES:  # refuse a missing dataset before downloading gigabytes
        dataset_files.read(dataset_folder(config.dataset))
    return pretrained.load(source)
