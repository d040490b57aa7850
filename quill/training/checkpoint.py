"""Checkpoints: saved whole or not at all, verified on load, loaded without running anything.

`ckpt.pt` holds everything that a resume needs, `best.pt` the weights with the lowest val loss. Both
are dicts of plain types and tensors, so `torch.load(weights_only=True)` reads them. Such a file is
a zip archive; its comment, at the very end, is the SHA-256 of the rest.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from model import GPTConfig, build
from quill.errors import InputError
from quill.files import atomic_write, sha256_of
from quill.training import devices

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt.previous.pt", "best.pt"

SCHEMA_VERSION = 2
# What values of a kind or shape that nobody expects may raise, here and in PyTorch.
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)

_COMMON = {"model": dict, "model_config": dict, "config": dict, "tokenizer": dict, "step": int}
_RESUME = {"optimizers": list, "average": list, "scaler": dict, "progress": dict}

_WITH_TENSORS = ("model", "optimizers", "average")

_NO_COMMENT = b"\0\0"  # an archive ends with the length of its comment
_COMMENT = b"sha256 "
_COMMENT_BYTES = len(_COMMENT) + 64
# More than any checkpoint has, and no more than a small file may claim.
_LONGEST_BLOCK = 2**24  # tokens; the table of their positions is not in the file
_DEEPEST, _MOST_VALUES = 10, 10**6
_LONGEST_PICKLE = 2**24  # bytes, without the tensors; a value takes up to 100 times its byte there


class _Hashed:
    """A file to write that hashes what it is given: what should then be found on the disk."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class DamagedError(InputError):
    """The file is missing, or not what was written."""


def save(path: Path, contents: dict, previous: Path | None = None) -> None:
    """Write to a temporary file, read it back to verify it, then rename it over `path`.

    previous: a second name for what `path` held until now.
    """
    with atomic_write(path, keep=previous, is_whole=_is_whole) as (file,):
        hashed = _Hashed(file)
        try:
            torch.save({"quill_checkpoint": SCHEMA_VERSION, **contents}, hashed)
        except RuntimeError as error:  # torch's writer hides what the file said, a full disk say
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.seek(-len(_NO_COMMENT), 2)
        file.write(_comment(hashed.digest))


def _comment(digest) -> bytes:
    return struct.pack("<H", _COMMENT_BYTES) + _COMMENT + digest.hexdigest().encode()


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        n_bytes = file.seek(0, 2) - len(_NO_COMMENT) - _COMMENT_BYTES
        file.seek(0)
        digest = sha256_of(file, max(0, n_bytes))
        digest.update(_NO_COMMENT)
        return file.read() == _comment(digest)


def is_sealed(path: Path) -> bool:
    """Whether the file ends as those that `save` writes."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _COMMENT_BYTES))
        return file.read(len(_COMMENT)) == _COMMENT


def load(path: Path, *, for_resume: bool = False) -> dict:
    """Read a checkpoint onto the CPU; raises `InputError` when it is missing or not usable."""
    try:
        if not _is_whole(path):
            raise DamagedError(
                f"{path} is damaged, or not a checkpoint of this Quill (its checksum is missing or "
                "differs): restore it from a copy, or train again"
            )
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: train first, or check --out_dir") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    contents = read_archive(path, _WITH_TENSORS)
    version = contents.get("quill_checkpoint")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(f"{path} is not a Quill checkpoint of schema version {SCHEMA_VERSION}")
    needed = _COMMON | _RESUME if for_resume else _COMMON
    wrong = [name for name, kind in needed.items() if not isinstance(contents.get(name), kind)]
    if wrong:
        raise InputError(f"{path} is not a usable checkpoint: {', '.join(wrong)} missing or broken")
    return contents


def read_archive(path: Path, with_tensors: tuple[str, ...]) -> dict:
    """What torch.save wrote, if that is a dict of plain types, and of tensors where they may be.

    Raises `InputError` for anything else; nothing in the file is run.
    """
    try:
        _refuse_swelling(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors and plain types: refused, nothing in it was run"
        ) from None
    except (InputError, OSError):
        raise
    except Exception as error:  # somebody made it so
        if devices.is_out_of_memory(error):
            raise
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} is not a checkpoint ({type(contents).__name__})")
    _refuse_hollow(contents, with_tensors, path)
    return contents


def load_latest(out_dir: Path, may_move: bool) -> dict:
    """The checkpoint to resume from: the last, or the one before when that is lost, saying so.

    may_move: put a damaged one aside, so that it does not become the next previous one.
    """
    path, previous = out_dir / LATEST, out_dir / PREVIOUS
    try:
        return load(path, for_resume=True)
    except DamagedError as error:
        if not previous.exists():
            raise
        contents = load(previous, for_resume=True)
        if may_move and path.exists():
            aside = path.replace(path.with_suffix(".damaged"))
            error = f"{error}; kept as {aside}"
        print(
            f"{error}\ngoing on from {previous}, saved after step {contents['step']}",
            file=sys.stderr,
        )
        return contents


def _refuse_swelling(path: Path) -> None:
    """Raise InputError for an archive whose parts are larger, unpacked, than the file itself."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    is_packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    pickles = [part.file_size for part in parts if "pkl" in part.filename]
    n_bytes = sum(part.file_size for part in parts)
    if is_packed or max(pickles, default=0) > _LONGEST_PICKLE or n_bytes > path.stat().st_size:
        raise InputError(f"{path} is not a checkpoint: it claims more than it holds")


def _refuse_hollow(contents: dict, with_tensors: tuple[str, ...], path: Path) -> None:
    """Raise InputError for what is not a small tree of plain values and tensors stored whole.

    A pickle can share its parts, so that a few bytes claim a list without end or a huge tensor.
    """
    pending = [(value, name in with_tensors, 0) for name, value in contents.items()]
    n_values = 0
    while pending:
        value, may_be_tensor, depth = pending.pop()
        n_values += 1
        if torch.is_tensor(value):
            is_usable = may_be_tensor and _is_stored_whole(value)
        else:
            is_usable = isinstance(value, (dict, list, tuple, str, int, float, type(None)))
        parts = value if isinstance(value, (dict, list, tuple)) else ()
        n_known = n_values + len(pending) + len(parts)
        if not is_usable or depth > _DEEPEST or n_known > _MOST_VALUES:
            raise InputError(f"{path} is not a checkpoint: it claims more than it holds")
        parts = (*value, *value.values()) if isinstance(value, dict) else parts
        pending += [(part, may_be_tensor, depth + 1) for part in parts]


def _is_stored_whole(tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def find(out_dir: Path) -> Path:
    """The checkpoint to sample from: best.pt when it is there, else ckpt.pt."""
    best = out_dir / BEST
    return best if best.exists() else out_dir / LATEST


def can_resume(out_dir: Path) -> bool:
    """Whether there is anything to resume from, whole or not."""
    return (out_dir / LATEST).exists() or (out_dir / PREVIOUS).exists()


def differences(there: dict, here: dict, free: set[str]) -> list[str]:
    """In words, the values of two models or runs that should agree, but for those that are free."""
    return [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if name not in free and there.get(name) != value
    ]


def check_weights(config: GPTConfig, weights: dict) -> None:
    """Raises one of `MISFITS` when they are not those of such a model."""
    if shapes_of(config, len(weights)) != {name: p.shape for name, p in weights.items()}:
        raise ValueError("not the tensors of that model")
    if not all(p.isfinite().all() for p in weights.values()):
        raise ValueError("a weight is not finite")


def shapes_of(config: GPTConfig, n_tensors: int) -> dict[str, torch.Size]:
    """The shapes of such a model's state_dict, whatever it claims: nothing is allocated.

    n_tensors: how many there are to be; a layer has at least four. Raises one of `MISFITS`.
    """
    n_layer = config.n_layer if config.model == "gpt" else 0
    if n_layer > n_tensors or config.block_size > _LONGEST_BLOCK:
        raise ValueError(f"n_layer={config.n_layer}, block_size={config.block_size}")
    with torch.device("meta"):
        return {name: p.shape for name, p in build(config).state_dict().items()}
