"""Make a reference curve of runs that differ in their seed alone; train.py compares others with it.

Usage:
    python -m quill.reference --out_dir=out-a,out-b,out-c docs/reference/NAME.jsonl
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import json
from pathlib import Path
from statistics import fmean

from quill import settings
from quill.data import tokenizers
from quill.errors import InputError, blames_input, run_command
from quill.files import atomic_write, refuse_to_replace, split_folders
from quill.settings import option
from quill.training import checkpoint, reference, run_folder
from quill.views import curves


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    out_dir: str = option("out", "the runs' folders, separated by commas")
    dest: str = option("", "the file to write")


def main(argv: list[str]) -> int:
    config = settings.load(ReferenceConfig, argv, usage=__doc__, positional="dest")
    if not config.dest:
        raise InputError("DEST, the file to write, is missing (--help says more)")
    refuse_to_replace(Path(config.dest))
    folders = split_folders(config.out_dir)
    header = header_of(folders)
    curve_of = [dict(zip(*read_curve(folder), strict=True)) for folder in folders]
    steps = [step for step in curve_of[0] if all(step in curve for curve in curve_of)]
    if not steps:
        raise InputError(f"{config.out_dir}: these runs have no evaluation at the same step")
    with blames_input(f"{folders[0]}: its options are no usual ones", TypeError, ValueError):
        lines = [json.dumps(header)]
    for step in steps:
        losses = [curve[step] for curve in curve_of]
        line = {"step": step, "mean": fmean(losses), "low": min(losses), "high": max(losses)}
        lines.append(json.dumps({name: round(value, 4) for name, value in line.items()}))
    with atomic_write(Path(config.dest)) as (file,):
        file.write("".join(f"{line}\n" for line in lines).encode())
    print(f"wrote {config.dest}: {len(steps)} steps of {len(folders)} runs, {lines[-1]}")
    return 0


def read_curve(folder: Path) -> tuple[list[int], list[float]]:
    return curves.columns(curves.read_metrics(folder / run_folder.METRICS), "val_loss")


def header_of(folders: list[Path]) -> dict:
    """Raises InputError where two runs differ in more than their seed, or not even in that."""
    if len(folders) < 2:
        raise InputError("--out_dir: give the folders of several runs, separated by commas")
    headers, seeds = [], []
    for folder in folders:
        saved = checkpoint.load_checkpoint(folder / checkpoint.LATEST)
        tokenizer = tokenizers.from_json(saved["tokenizer"], str(folder))
        parts = saved["config"], saved.get("text_sha256"), tokenizer.vocab_size
        headers.append(reference.header_of(*parts, saved.get("made_of", {})))
        seeds.append(saved["config"].get("seed"))
    for folder, header, seed in zip(folders, headers, seeds, strict=True):
        there, here = ({**h["options"], **h} for h in (headers[0], header))
        here = dict.fromkeys(there) | here  # a run from before an option lacks it
        if different := checkpoint.differences(there, here, free={"options"}):
            raise InputError(
                f"{folder} differs from {folders[0]} in more than its seed: {', '.join(different)}"
            )
        if seeds.count(seed) > 1:
            raise InputError(f"{folder} and another run have the same seed, {seed}")
    return headers[0] | {"seeds": seeds}


if __name__ == "__main__":
    run_command(main)
