"""What a run starts from: its own checkpoint, given weights, or random ones."""

import dataclasses
import os
from pathlib import Path

from quill import settings
from quill.data import dataset_files
from quill.errors import InputError
from quill.files import dataset_folder
from quill.interop import pretrained
from quill.training import checkpoint, devices, distributed, run_folder

TRAIN = "train.py"  # the command of a checkpoint that names none


def find_start(config, argv: list[str], usage: str, command: str = TRAIN) -> tuple:
    """-> (config, checkpoint to resume or None, weights to start from or None).

    config: the options of the command line, a train.TrainConfig or the LoopOptions of another
    command that trains. What argv leaves open is then as the checkpoint had it, or as the weights
    need it, and all processes have rank 0's values. From here on they can exchange tensors. Raises
    InputError for what cannot be loaded, and for a checkpoint of another command.
    """
    out_dir, is_main = Path(config.out_dir), distributed.is_main()
    saved = start = base = None
    if config.overwrite and config.init_from in ("resume", "auto"):
        raise InputError(
            f"overwrite=true starts anew, init_from={config.init_from} continues: leave one out"
        )
    if writes := is_main and not config.eval_only:
        run_folder.refuse_what_cannot_be_saved(out_dir)
    with distributed.main_first():
        can_resume = run_folder.can_resume(out_dir)
        if config.init_from == "resume" or (config.init_from == "auto" and can_resume):
            saved = checkpoint.load_latest(out_dir, may_move=writes, is_quiet=not is_main)
            _check_command(saved, command, out_dir)
            base = saved["config"]
        elif writes and config.init_from != "auto" and not config.overwrite:
            run_folder.refuse_to_overwrite(out_dir)
        if saved is None and (start := _load_start(config, argv, usage)) is not None:
            base = start.options()
    if base is not None:
        loaded = settings.load(type(config), argv, usage=usage, base=base)
        # out_dir: a run's folder may have been moved, and is locked already.
        config = dataclasses.replace(loaded, out_dir=config.out_dir)
    if distributed.world_size() > 1:
        distributed.init_process_group(devices.pick_device(config.device), config.backend)
    config = type(config)(**distributed.broadcast_object(dataclasses.asdict(config)))
    step = None if saved is None else saved["step"]
    if distributed.broadcast_object(step) != step:
        raise InputError(
            f"out_dir={out_dir} does not hold the same checkpoint for all processes: it must be on "
            "a file system that they share"
        )
    return config, saved, start


def _load_start(config, argv: list[str], usage: str) -> pretrained.Pretrained | None:
    source = config.init_from
    if source == "auto":  # there is no checkpoint to continue: as the config files say
        files = settings.config_files(type(config), argv)
        source = settings.load(type(config), files, usage=usage).init_from
    if source in ("scratch", "auto"):
        return None
    if lies_in(source, config.out_dir):
        raise InputError(
            f"out_dir={config.out_dir}: the run would write over {source}, which it starts from; "
            "choose another folder, or --init_from=resume to continue that run"
        )
    if source in pretrained.RELEASES:  # refuse a missing dataset before downloading gigabytes
        dataset_files.read(dataset_folder(config.dataset))
    return pretrained.load(source)


def _check_command(saved: dict, command: str, out_dir: Path) -> None:
    """Raises InputError for a checkpoint of another command, as only that one can resume it."""
    made_by = saved.get("command", TRAIN)
    if made_by != command:
        raise InputError(
            f"{out_dir} is a run of another command: resume it with `python {made_by} "
            f"--out_dir={out_dir} --init_from=resume`, or choose another folder"
        )


def lies_in(source: str, out_dir: str) -> bool:
    """Whether the weights, a run's folder or a file, are those of the run in out_dir."""
    folder, given = (Path(os.path.realpath(name)) for name in (out_dir, source))
    return folder == (given if given.is_dir() else given.parent)
