"""Opening, atomic writes, file locks, checksums, folder names, and a progress line.

An OSError of these functions becomes one line and an exit code where a command ends.
"""

import contextlib
import hashlib
import os
import re
import stat
import sys
import time
from pathlib import Path

from quill.errors import InputError, RunError, print_note

READ_BYTES = 1 << 20


def open_file(path: Path):
    """Open a file to read its bytes; raises InputError for a folder, or a pipe, which may wait."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} is a folder, pipe or device, not a regular file")
    return path.open("rb")


def split_folders(names: str) -> list[Path]:
    """The folders that names separated by commas stand for; a single one's name may have some."""
    parts = [names] if Path(names).is_dir() else names.split(",")
    if not all(parts):
        raise InputError(f"{names!r}: the name of a folder is empty")
    return [Path(part) for part in parts]


def refuse_special_files(*paths: Path) -> None:
    """Raise InputError where something else than a regular file would be renamed over.

    A link may be /dev/stdout, or lead to a larger disk.
    """
    for path in paths:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(
                f"{path} is a folder, link, pipe or device, not a regular file: it is left as it "
                "is; give another name, or remove it"
            )


def refuse_to_replace(path: Path) -> None:
    """Raise InputError where there is a file already, which nobody asked to replace, or no file."""
    for name in (path, _temporary(path)):
        refuse_special_files(name)
        if name.exists():
            raise InputError(f"{name} exists already: give another name, or remove it")


@contextlib.contextmanager
def atomic_write(*paths: Path, keep: Path | None = None, verify=None):
    """Yield one writable binary file for each path.

    They are written under `<name>.tmp`, flushed to the disk and, when the block ends well, renamed
    in the order given. When it does not, they are removed, and the files of before stay as they
    were. Of several files the last makes the others valid: it is removed before they are renamed,
    and `finish_atomic_write` completes what a kill between two renames left undone.

    keep: a second name to keep the present contents of one path under.
    verify: called with each temporary file, to read it back from the disk (where the system lets us
    drop it from memory). Raises `RunError` when it returns false, and `InputError` for a path that
    is not a regular file.
    """
    temporary = [_temporary(path) for path in paths]
    refuse_special_files(*paths, *temporary, *([keep, _temporary(keep)] if keep else []))
    handles = []
    try:
        for tmp in temporary:
            handles.append(tmp.open("wb"))
        yield handles
        for handle in handles:
            handle.flush()
            os.fsync(handle.fileno())
            if verify is not None and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            handle.close()
        for tmp, path in zip(temporary, paths, strict=True):
            if verify is not None and not verify(tmp):
                raise RunError(f"{path}: what was read back is not what was written")
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(paths[0] if len(paths) == 1 else paths[0].parent)
        for handle in handles:
            with contextlib.suppress(OSError):  # closing flushes again what could not be written
                handle.close()
        for tmp in temporary:
            tmp.unlink(missing_ok=True)
        raise
    # From here on no temporary file is removed: `finish_atomic_write` may need it.
    if len(paths) > 1:
        paths[-1].unlink(missing_ok=True)
    if keep is not None and paths[0].exists():
        _give_second_name(paths[0], keep)
    for tmp, path in zip(temporary, paths, strict=True):
        tmp.replace(path)
    _sync_folder(paths[0].parent)


def _temporary(path: Path) -> Path:
    if not path.name:
        raise InputError(f"{path} is a folder: give the name of a file")
    return path.with_name(path.name + ".tmp")


def _give_second_name(path: Path, name: Path) -> None:
    """Rename, but with hard links, where there are any, `path` is never missing meanwhile."""
    _temporary(name).unlink(missing_ok=True)
    try:
        os.link(path, _temporary(name))
    except OSError:
        path.replace(name)
    else:
        _temporary(name).replace(name)


def finish_atomic_write(*paths: Path, verify) -> None:
    """Rename the files of an `atomic_write` that was killed after it had written all of them.

    They are complete when `verify` accepts the last. Raises `InputError` if one is under way.
    """
    last = _temporary(paths[-1])
    if paths[-1].exists() or not last.exists() or not verify(last):
        return
    with file_lock(paths[0].parent):
        for path in paths:
            if _temporary(path).exists():
                _temporary(path).replace(path)
        _sync_folder(paths[0].parent)


def _sync_folder(folder: Path) -> None:
    """Make renames survive a power cut, where the operating system lets a folder be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def file_lock(folder: Path):
    """Make `folder` and lock it; raises `InputError` while another process holds the lock.

    The system releases it when the process ends; a `.lock` file left behind means nothing. Where
    there are no such locks, a line on stderr says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_special_files(folder / ".lock")
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl  # not available on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use: another process writes there; wait for it to end, or choose "
                "another folder"
            ) from None
        except (ImportError, OSError) as error:
            print_note(f"{folder} cannot be locked ({error}): use it once at a time")
        yield


def sha256_of(file, n_bytes: int):
    """A hash object, to be updated further, of the next `n_bytes` of an open file."""
    digest = hashlib.sha256()
    while data := file.read(min(READ_BYTES, n_bytes)):
        digest.update(data)
        n_bytes -= len(data)
    return digest


def sha256_of_file(path: Path) -> str:
    with open_file(path) as file:
        return sha256_of(file, sys.maxsize).hexdigest()


def dataset_folder(name: str) -> Path:
    """`data/<name>`; raises `InputError` for a name that is not a plain folder name."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise InputError(
            f"dataset {name[:100]!r}: give a plain folder name below data/, of at most 100 "
            "letters, digits, '_', '-' or '.', which begins with a letter, a digit or '_'"
        )
    return Path("data") / name


_last_shown = 0.0


def show_progress(what: str, done: int, total: int) -> None:
    """A line on stderr, rewritten a few times a second, if that is a terminal."""
    global _last_shown
    is_done = done >= total
    if (is_done or time.monotonic() - _last_shown > 0.2) and sys.stderr.isatty():
        _last_shown = time.monotonic()
        line = "" if is_done else f"{what}: {done / total:4.0%}"
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
