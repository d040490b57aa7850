"""The files of a dataset's folder data/<name>: written by prepare.py, read by train.py.

    train.bin, val.bin             token ids, raw little-endian uint16 or uint32, no header
    train.mask.bin, val.mask.bin   only where not all tokens carry loss: a byte each, 1 for those
    meta.json                      `Meta`, and a checksum of it: a damaged dataset is an error

This file needs numpy alone: prepare.py does not wait for torch.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quill.errors import InputError, blames_input
from quill.files import atomic_write, finish_atomic_write, open_file, sha256_of_file

FORMAT_VERSION = 3
SPLITS = ("train", "val")
MASKS = tuple(f"{split}.mask" for split in SPLITS)


@dataclasses.dataclass(frozen=True)
class Meta:
    format_version: int
    dtype: str  # "uint16" or "uint32"
    vocab_size: int
    train_tokens: int
    val_tokens: int
    tokenizer: dict  # its to_json(), and the key of problems.reverses_answers where that is true
    source: str  # the name of the text
    sha256: str  # of the text's bytes
    sha256_of: dict  # of the .bin files, by their names: SPLITS, and MASKS where there are any


def write(folder: Path, chunks: Iterable[tuple], is_masked: bool = False, **described) -> Meta:
    """Write (split name, ids, mask) chunks as they come; `described` is the rest of `Meta`.

    mask: which of the ids carry loss as targets; ignored unless `is_masked`.
    No file gets its final name before all of them are on the disk.
    """
    dtype = np.dtype("<u2" if described["vocab_size"] <= 2**16 else "<u4")
    described |= {"format_version": FORMAT_VERSION, "dtype": dtype.name}
    names = [*SPLITS, *MASKS] if is_masked else [*SPLITS]
    digests = {name: hashlib.sha256() for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(*_paths(folder, names)) as (*files, meta_file):
        file_of = dict(zip(names, files, strict=True))
        for split, ids, mask in chunks:
            parts = {split: ids.astype(dtype)}
            if is_masked:
                parts[f"{split}.mask"] = mask.astype(np.uint8)
            for name, part in parts.items():
                file_of[name].write(part)
                digests[name].update(part)
        described |= {f"{name}_tokens": file_of[name].tell() // dtype.itemsize for name in SPLITS}
        meta = Meta(**described, sha256_of={name: d.hexdigest() for name, d in digests.items()})
        fields = dataclasses.asdict(meta)
        meta_file.write(json.dumps(fields | {"checksum": checksum_of(fields)}, indent=1).encode())
    for name in set(MASKS) - set(names):
        (folder / f"{name}.bin").unlink(missing_ok=True)
    return meta


def paths(folder: Path) -> list[Path]:
    """All files that a dataset may have."""
    return _paths(folder, [*SPLITS, *MASKS])


def _paths(folder: Path, names: Iterable[str]) -> list[Path]:
    return [*(folder / f"{name}.bin" for name in names), folder / "meta.json"]


def _is_meta(path: Path) -> bool:
    try:
        return bool(read_meta(path))
    except InputError:
        return False


def checksum_of(fields: dict) -> str:
    """The SHA-256 of meta.json's other fields, with sorted keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_meta(path: Path) -> Meta:
    """Raises `InputError` when the file is broken or not a Quill dataset's, else `OSError`."""
    what = f"{path} is not valid JSON, prepare the dataset again"
    with blames_input(what, ValueError, RecursionError), open_file(path) as file:
        fields = json.loads(file.read().decode("utf-8"))
    types_of = typing.get_type_hints(Meta)
    if not isinstance(fields, dict) or fields.keys() != types_of.keys() | {"checksum"}:
        raise InputError(f"{path} does not describe a dataset of this Quill; prepare it again")
    if fields.pop("checksum") != checksum_of(fields):
        raise InputError(f"{path} was changed or damaged; prepare the dataset again")
    wrong = [name for name, kind in types_of.items() if type(fields[name]) is not kind]
    if not wrong and list(fields["sha256_of"]) not in ([*SPLITS], [*SPLITS, *MASKS]):
        wrong = ["sha256_of"]
    meta = Meta(**fields)
    if wrong or meta.format_version != FORMAT_VERSION or meta.dtype not in ("uint16", "uint32"):
        what = ", ".join(wrong) or "format version or dtype"
        raise InputError(f"{path}: {what} not usable; prepare the dataset again")
    return meta


def read(folder: Path, verify: bool = True) -> tuple[Meta, dict[str, np.ndarray]]:
    """-> meta, and the memory-mapped .bin files by name: ids, and masks if there are any.

    verify: compare the checksums of all files. Raises `InputError` when anything does not match.
    """
    if verify:
        finish_atomic_write(*_paths(folder, [*SPLITS, *MASKS]), verify=_is_meta)
    if not (folder / "meta.json").exists():
        others = sorted(path.parent.name for path in folder.parent.glob("*/meta.json"))
        offer = (
            f"; or take one that is: --dataset={' or --dataset='.join(others)}" if others else ""
        )
        raise InputError(
            f"dataset {folder.name!r} is not prepared ({folder / 'meta.json'} is missing): run "
            f"`python prepare.py {folder.name}`, with --input=FILE for a text of your own{offer}"
        )
    meta = read_meta(folder / "meta.json")
    return meta, {name: _map(folder, name, meta, verify) for name in meta.sha256_of}


def _map(folder: Path, name: str, meta: Meta, verify: bool) -> np.ndarray:
    path = folder / f"{name}.bin"
    n_tokens = meta.train_tokens if name.startswith("train") else meta.val_tokens
    dtype = np.dtype("uint8" if name in MASKS else meta.dtype).newbyteorder("<")
    if not path.exists():
        raise InputError(f"{path} is missing; prepare the dataset again")
    with open_file(path) as file:
        n_bytes = file.seek(0, 2)
    if n_bytes != n_tokens * dtype.itemsize or n_bytes == 0:
        raise InputError(
            f"{path} has {n_bytes:,} bytes where meta.json says {n_tokens:,} tokens of "
            f"{dtype.itemsize} bytes; prepare the dataset again"
        )
    if verify and sha256_of_file(path) != meta.sha256_of[name]:
        raise InputError(f"{path} was changed or damaged; prepare the dataset again")
    return np.memmap(path, dtype=dtype, mode="r")
