"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from errors import InputError


@contextlib.contextmanager
def staged(*paths: Path):
    """Yield one writable binary file for each path.

    They are written under `<name>.tmp`, flushed to the disk and, when the block ends well, renamed
    in the order given. When it ends badly they are removed, and whatever was there before stays.
    Of several, the last makes the others valid: it is away while they change, so that a kill
    between two renames leaves nothing that looks whole and is not.
    """
    temporary = [path.with_name(path.name + ".tmp") for path in paths]
    handles = []
    try:
        for tmp in temporary:
            handles.append(tmp.open("wb"))
        yield handles
        for handle in handles:
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for tmp, path in zip(temporary, paths, strict=True):
            tmp.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(paths[0] if len(paths) == 1 else paths[0].parent)
        for handle in handles:
            with contextlib.suppress(OSError):  # closing flushes again what could not be written
                handle.close()
        for tmp in temporary:
            tmp.unlink(missing_ok=True)
        raise
    _sync_folder(paths[0].parent)


def _sync_folder(folder: Path) -> None:
    """Make renames survive a power cut, where the operating system lets a folder be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def dataset_folder(name: str) -> Path:
    """`data/<name>`; raises `InputError` for a name that is not a plain folder name."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise InputError(
            f"dataset {name[:100]!r}: give a plain folder name (letters, digits, '_', '-', '.'); "
            "it is looked up in data/"
        )
    return Path("data") / name
