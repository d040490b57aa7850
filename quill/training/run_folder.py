"""The folder of a run: a new run never writes over the files of another."""

from pathlib import Path

from quill.errors import InputError, print_note
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


def can_resume(folder: Path) -> bool:
    return any((folder / name).exists() for name in (LATEST, PREVIOUS))


def refuse_to_overwrite(folder: Path) -> None:
    """Raises InputError when the folder holds a run that has saved anything."""
    if can_resume(folder) or (folder / BEST).exists():
        resume = "continue that run (--init_from=resume), " if can_resume(folder) else ""
        raise InputError(
            f"{folder} already holds a run: choose another folder (--out_dir={folder}-2), {resume}"
            f"or start anew (--overwrite=true), which moves it to {next_previous(folder)}"
        )


def refuse_what_cannot_be_saved(folder: Path) -> None:
    """Raises InputError where a later save would fail, or reading would wait for a pipe."""
    for name in (METRICS, *CHECKPOINTS):
        refuse_special_files(folder / name, folder / f"{name}.tmp")


def next_previous(folder: Path) -> Path:
    """The first of previous-1, previous-2 and so on in the folder that does not exist."""
    n = 1
    while (folder / f"previous-{n}").exists():
        n += 1
    return folder / f"previous-{n}"


def move_aside(folder: Path) -> None:
    """Move the files of a run that the folder holds to previous-N in it, and say so.

    ckpt.pt is the last, so that after a kill in between a new run is still refused.
    """
    paths = [path for name in (METRICS, *CHECKPOINTS) if (path := folder / name).exists()]
    if paths:
        aside = next_previous(folder)
        aside.mkdir()
        print_note(f"the run that was in {folder} is moved to {aside}")
    for path in paths:
        path.rename(aside / path.name)
