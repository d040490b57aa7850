"""Checkpoints: dicts of plain types and tensors, saved whole or not at all, verified on load.

`ckpt.pt` holds everything that a resume needs, `best.pt` the weights with the lowest val loss. Both
are zip archives of torch.save; the archive's comment, at the very end, is the SHA-256 of the rest.
"""

import contextlib
import dataclasses
import hashlib
import math
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import torch

from quill.errors import InputError, blames_input, describe_os_error, print_note
from quill.files import atomic_write, open_file, sha256_of
from quill.training.devices import is_out_of_memory

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt.previous.pt", "best.pt"

SCHEMA_VERSION = 2
# What values of an unexpected type or shape may raise, here and in PyTorch.
LOAD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)

COMMON = {"model": dict, "model_config": dict, "config": dict, "tokenizer": dict, "step": int}
FOR_RESUME = {"optimizers": list, "average": list, "scaler": dict, "progress": dict}
WITH_TENSORS = ("model", "optimizers", "average")

NO_COMMENT = b"\0\0"  # an archive ends with the length of its comment
COMMENT = b"sha256 "
COMMENT_BYTES = len(COMMENT) + 64

# What a checkpoint may claim, which a stranger may have made.
MAX_DEPTH, MAX_VALUES = 10, 10**6  # of the tree of values
MAX_PICKLE_BYTES = 2**24  # without the tensors; in memory a value takes up to 100 times its byte


class DamagedError(InputError):
    """The file is missing, cannot be read, or is not what was written."""


class HashingFile:
    """A file to write that hashes what it is given, to compare with what is read back."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: Path, contents: dict, previous: Path | None = None) -> None:
    """Write to a temporary file, read it back to verify it, then rename it to `path`.

    previous: a second name to keep the present contents of `path` under.
    """
    with atomic_write(path, keep=previous, verify=is_whole) as (file,):
        hashing = HashingFile(file)
        try:
            torch.save({"quill_checkpoint": SCHEMA_VERSION, **contents}, hashing)
        except RuntimeError as error:  # torch's writer hides the file's error, a full disk say
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.seek(-len(NO_COMMENT), 2)
        file.write(checksum_comment(hashing.digest))


def checksum_comment(digest) -> bytes:
    return struct.pack("<H", COMMENT_BYTES) + COMMENT + digest.hexdigest().encode()


def is_whole(path: Path) -> bool:
    """Whether the file has the checksum that it ends with."""
    with open_file(path) as file:
        n_bytes = file.seek(0, 2) - len(NO_COMMENT) - COMMENT_BYTES
        file.seek(0)
        digest = sha256_of(file, max(0, n_bytes))
        digest.update(NO_COMMENT)
        return file.read() == checksum_comment(digest)


def has_checksum(path: Path) -> bool:
    """Whether the file ends as those that `save_checkpoint` writes."""
    with open_file(path) as file:
        file.seek(max(0, file.seek(0, 2) - COMMENT_BYTES))
        return file.read(len(COMMENT)) == COMMENT


def load_checkpoint(path: Path, *, for_resume: bool = False) -> dict:
    """Read a checkpoint onto the CPU; raises `InputError` when it is missing or not usable."""
    try:
        if not is_whole(path):
            raise DamagedError(
                f"{path} is damaged, or not a checkpoint of this Quill (its checksum is missing or "
                f"differs): restore it from a copy, or train again{_way_on_beside(path)}"
            )
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: train first, or check --out_dir") from None
    except OSError as error:
        raise DamagedError(describe_os_error(error)) from None
    contents = read_archive(path, WITH_TENSORS)
    version = contents.get("quill_checkpoint")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(f"{path} is not a Quill checkpoint of schema version {SCHEMA_VERSION}")
    needed = COMMON | FOR_RESUME if for_resume else COMMON
    wrong = [name for name, kind in needed.items() if not isinstance(contents.get(name), kind)]
    if wrong:
        raise InputError(f"{path} is not a usable checkpoint: {', '.join(wrong)} missing or broken")
    return contents


def _way_on_beside(damaged: Path) -> str:
    """Advice to use another checkpoint of the folder, where a whole one is left."""
    for path in (damaged.with_name(BEST), damaged.with_name(LATEST)):
        with contextlib.suppress(OSError, InputError):
            if is_whole(path):
                return f", or use the weights of {path} (--init_from={path})"
    return ""


def read_archive(path: Path, with_tensors: tuple[str, ...]) -> dict:
    """The dict of plain types that the file holds, with tensors below the keys `with_tensors`.

    Raises `InputError` for anything else.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused below
            # Memory-mapped, so that several processes on a machine share one copy.
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors and plain types: refused, nothing in it was run"
        ) from None
    except (InputError, OSError):
        raise
    except Exception as error:  # a forged file can make torch.load raise anything
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} is not a checkpoint ({type(contents).__name__})")
    _check_values(contents, with_tensors, path)
    return contents


def _check_archive(path: Path) -> None:
    """Raise InputError for an archive whose parts are larger, unpacked, than the file itself."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    is_packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    pickles = [part.file_size for part in parts if "pkl" in part.filename]
    n_bytes = sum(part.file_size for part in parts)
    if is_packed or max(pickles, default=0) > MAX_PICKLE_BYTES or n_bytes > path.stat().st_size:
        raise InputError(f"{path} is not a checkpoint: it claims more than it holds")


def _check_values(contents: dict, with_tensors: tuple[str, ...], path: Path) -> None:
    """Raise InputError for what is not a small tree of plain values and tensors stored in full.

    A pickle can share its parts, so that a few bytes claim an endless list or a huge tensor.
    """
    pending = [(value, name in with_tensors, 0) for name, value in contents.items()]
    n_values = 0
    while pending:
        value, may_be_tensor, depth = pending.pop()
        n_values += 1
        if torch.is_tensor(value):
            is_usable = may_be_tensor and _is_stored_in_full(value)
        else:
            is_usable = isinstance(value, (dict, list, tuple, str, int, float, type(None)))
        parts = value if isinstance(value, (dict, list, tuple)) else ()
        n_known = n_values + len(pending) + len(parts)
        if not is_usable or depth > MAX_DEPTH or n_known > MAX_VALUES:
            raise InputError(f"{path} is not a checkpoint: it claims more than it holds")
        parts = (*value, *value.values()) if isinstance(value, dict) else parts
        pending += [(part, may_be_tensor, depth + 1) for part in parts]


def _is_stored_in_full(tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def load_latest(out_dir: Path, may_move: bool, is_quiet: bool = False) -> dict:
    """The checkpoint to resume from: ckpt.pt, or with a message, if not usable, ckpt.previous.pt.

    may_move: rename the former, so that it does not become the next ckpt.previous.pt.
    """
    path, previous = out_dir / LATEST, out_dir / PREVIOUS
    try:
        return load_checkpoint(path, for_resume=True)
    except DamagedError as error:
        if not previous.exists():
            if not path.exists() and (out_dir / BEST).exists():
                raise InputError(
                    f"{out_dir} holds best.pt, for sampling, but no ckpt.pt to resume from: start "
                    "anew (--overwrite=true), or from those weights in another folder "
                    f"(--init_from={out_dir} --out_dir={out_dir}-2)"
                ) from None
            raise
        with blames_input(f"neither {path} nor the one before it can be resumed", InputError):
            contents = load_checkpoint(previous, for_resume=True)
        if may_move and path.exists():
            aside = path.replace(path.with_suffix(".damaged"))
            error = f"{error}; kept as {aside}"
        if not is_quiet:
            print_note(f"{error}\ngoing on from {previous}, saved after step {contents['step']}")
        return contents


def find_checkpoint(out_dir: Path) -> Path:
    """The checkpoint to sample from: best.pt when there is one, else ckpt.pt."""
    best = out_dir / BEST
    return best if best.exists() else out_dir / LATEST


def differences(there: dict, here: dict, free: set[str]) -> list[str]:
    """In words, the values of two models or runs that should agree, except those in `free`."""
    return [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if name not in free and there.get(name) != value
    ]


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer updates made or skipped
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    stale_evaluations: int = 0  # since the best one
    evaluated_step: int = -1  # the last step whose evaluation is in the metrics
    skipped_steps: list = dataclasses.field(default_factory=list)  # not finite

    @classmethod
    def from_checkpoint(cls, saved: dict) -> "Progress":
        """Raises one of `LOAD_ERRORS` when the saved values are not possible."""
        progress = cls(**saved["progress"])
        for name, value in vars(cls()).items():
            if type(getattr(progress, name)) is not type(value):
                raise ValueError(f"progress.{name} has another type")
        counts = (progress.step, progress.tokens, progress.stale_evaluations)
        counts += (*progress.skipped_steps,)
        is_possible = all(type(count) is int and 0 <= count < 2**62 for count in counts)
        is_possible &= math.isfinite(progress.seconds) and not math.isnan(progress.best_val_loss)
        if not is_possible or progress.step != saved["step"]:
            raise ValueError(f"its progress is not possible: {progress}")
        return progress
