"""The folder of a run: a new run never writes over the files of another."""

from pathlib import Path

from quill.errors import InputError
from quill.files import refuse_special_files
from quill.training.checkpoint import BEST, LATEST, PREVIOUS

METRICS = "metrics.jsonl"
CHECKPOINTS = (BEST, PREVIOUS, LATEST)


def path_of(name: str) -> Path:
    """The folder that out_dir names; raises InputError for `..`, which could be anywhere."""
    path = Path(name)
    if not name or ".." in path.parts:
        raise InputError(
            f"out_dir={name[:100]!r}: give the run's folder as a path below this one or from the "
            "root, without '..'"
        )
    return path


def holds_run(folder: Path) -> bool:
    """Metrics alone are not one: a run that ended before it saved can only start again."""
    return any((folder / name).exists() for name in CHECKPOINTS)


def refuse_to_overwrite(folder: Path) -> None:
    """Raises InputError when the folder holds a run."""
    if holds_run(folder):
        raise InputError(
            f"{folder} already holds a run: choose another folder (--out_dir={folder}-2), continue "
            "that run (--init_from=resume), or start anew (--overwrite=true), which moves it to "
            f"{next_previous(folder)}"
        )


def refuse_what_cannot_be_saved(folder: Path) -> None:
    """Raises InputError where a later save would fail, or reading would wait for a pipe."""
    refuse_special_files(*(folder / name for name in (METRICS, *CHECKPOINTS)))


def next_previous(folder: Path) -> Path:
    """The first of previous-1, previous-2 and so on in the folder that does not exist."""
    n = 1
    while (folder / f"previous-{n}").exists():
        n += 1
    return folder / f"previous-{n}"


def move_aside(folder: Path) -> None:
    """Move the files of the run that the folder holds, if it does, to previous-N in it.

    ckpt.pt is the last, so that a kill in between leaves a folder that still holds a run.
    """
    if not holds_run(folder):
        return
    aside = next_previous(folder)
    aside.mkdir()
    for name in (METRICS, *CHECKPOINTS):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
