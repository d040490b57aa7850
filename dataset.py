"""The dataset folder, both directions: write it, read it, cut windows of tokens out of it.

    data/<name>/train.bin   token ids, raw little-endian uint16 or uint32, no header
    data/<name>/val.bin     the same
    data/<name>/meta.json   `Meta`: how many, which dtype, which tokenizer, made from what

meta.json has the SHA-256 of both and one of itself, so that a damaged dataset is an error. Which
windows a training step sees depends on (seed, step) alone; see `train_starts`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from errors import InputError
from files import finish_staged, sha256_of, staged

FORMAT_VERSION = 2
SPLITS = ("train", "val")
IGNORE_INDEX = -1  # a target that carries no loss

# Up to this size a split is one int32 tensor on the device; above, it stays memory-mapped.
MAX_TOKENS_ON_DEVICE = 2**26
# Up to this size evaluation covers every token of the val split; above, `eval_iters` windows.
MAX_TOKENS_EVALUATED_WHOLE = 2**20


@dataclasses.dataclass(frozen=True)
class Meta:
    format_version: int
    dtype: str  # "uint16" or "uint32"
    vocab_size: int
    train_tokens: int
    val_tokens: int
    tokenizer: dict  # see tokenizer.py
    source: str  # the name of the text
    sha256: str  # of the text's bytes
    train_sha256: str  # of train.bin
    val_sha256: str


def write(folder: Path, chunks: Iterable[tuple[str, np.ndarray]], **described) -> Meta:
    """Write (split name, ids) chunks as they come; `described` is the rest of `Meta`.

    Nothing takes its final name before everything is on the disk.
    """
    dtype = "uint16" if described["vocab_size"] <= 2**16 else "uint32"
    described |= {"format_version": FORMAT_VERSION, "dtype": dtype}
    counts = dict.fromkeys(SPLITS, 0)
    digests = {split: hashlib.sha256() for split in SPLITS}
    folder.mkdir(parents=True, exist_ok=True)
    with staged(*_paths(folder)) as files:
        handle_of = dict(zip(SPLITS, files, strict=False))
        for split, ids in chunks:
            data = ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            handle_of[split].write(data)
            digests[split].update(data)
            counts[split] += len(ids)
        for split in SPLITS:
            described[f"{split}_tokens"] = counts[split]
            described[f"{split}_sha256"] = digests[split].hexdigest()
        meta = Meta(**described)
        fields = dataclasses.asdict(meta)
        files[2].write(json.dumps(fields | {"checksum": _checksum(fields)}, indent=1).encode())
    return meta


def _paths(folder: Path) -> list[Path]:
    return [folder / "train.bin", folder / "val.bin", folder / "meta.json"]


def _describes_a_dataset(path: Path) -> bool:
    try:
        return bool(read_meta(path))
    except InputError:
        return False


def _checksum(fields: dict) -> str:
    """The SHA-256 of meta.json's other fields, in one spelling."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_meta(path: Path) -> Meta:
    """Raises `InputError` when the file is missing, broken or not a Quill dataset's."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON; prepare the dataset again") from None
    types_of = typing.get_type_hints(Meta)
    if not isinstance(fields, dict) or fields.keys() != types_of.keys() | {"checksum"}:
        raise InputError(f"{path} does not describe a dataset of this Quill; prepare it again")
    if fields.pop("checksum") != _checksum(fields):
        raise InputError(f"{path} was changed or damaged; prepare the dataset again")
    wrong = [name for name, kind in types_of.items() if type(fields[name]) is not kind]
    meta = Meta(**fields)
    if wrong or meta.format_version != FORMAT_VERSION or meta.dtype not in ("uint16", "uint32"):
        raise InputError(
            f"{path}: {', '.join(wrong) or 'format version or dtype'} not usable; "
            "prepare the dataset again"
        )
    return meta


def read(folder: Path, verify: bool = True) -> tuple[Meta, np.ndarray, np.ndarray]:
    """-> (meta, train ids, val ids), memory-mapped; raises `InputError` when anything disagrees.

    verify: read all of both files once, to compare their checksums.
    """
    if verify:
        finish_staged(*_paths(folder), is_whole=_describes_a_dataset)
    if not (folder / "meta.json").exists():
        raise InputError(
            f"dataset {folder.name!r} is not prepared ({folder / 'meta.json'} is missing): run "
            f"`python prepare.py {folder.name}`, with --input=FILE for a text of your own"
        )
    meta = read_meta(folder / "meta.json")
    return meta, *(_map_ids(folder, split, meta, verify) for split in SPLITS)


def _map_ids(folder: Path, split: str, meta: Meta, verify: bool) -> np.ndarray:
    path = folder / f"{split}.bin"
    n_tokens, sha256 = getattr(meta, f"{split}_tokens"), getattr(meta, f"{split}_sha256")
    dtype = np.dtype(meta.dtype).newbyteorder("<")
    try:
        n_bytes = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; prepare the dataset again") from None
    if n_bytes != n_tokens * dtype.itemsize or n_bytes == 0:
        raise InputError(
            f"{path} has {n_bytes:,} bytes where meta.json says {n_tokens:,} tokens of "
            f"{dtype.itemsize} bytes; prepare the dataset again"
        )
    if verify:
        with path.open("rb") as file:
            if sha256_of(file, n_bytes).hexdigest() != sha256:
                raise InputError(
                    f"{path} was changed or damaged since it was made (its checksum differs); "
                    "prepare the dataset again"
                )
    return np.memmap(path, dtype=dtype, mode="r")


class Split:
    """One split's ids, ready to be cut into (idx, targets) windows on a device."""

    def __init__(self, ids: np.ndarray, vocab_size: int, device, name: str):
        import torch

        self.ids, self.vocab_size, self.device, self.name = ids, vocab_size, device, name
        self.on_device = len(ids) <= MAX_TOKENS_ON_DEVICE
        if self.on_device:
            self._check_range(ids)
            self.tokens = torch.from_numpy(ids.astype(np.int32)).to(device)

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: np.ndarray, block_size: int):
        """-> idx, targets, both (len(starts), block_size) int64: targets are idx one token on.

        Targets beyond the end of the split are `IGNORE_INDEX`.
        """
        import torch

        starts = torch.from_numpy(starts)
        pin = self.device.type == "cuda"
        if self.on_device:
            starts = (starts.pin_memory() if pin else starts).to(self.device, non_blocking=True)
        positions = starts[:, None] + torch.arange(block_size + 1, device=starts.device)
        inside = positions.clamp(max=len(self) - 1)
        if self.on_device:
            rows = self.tokens[inside].long()
        else:
            gathered = self.ids[inside.numpy()].astype(np.int64)
            self._check_range(gathered)
            rows = torch.from_numpy(gathered)
        rows[:, 1:].masked_fill_(positions[:, 1:] >= len(self), IGNORE_INDEX)
        rows = rows if self.on_device else (rows.pin_memory() if pin else rows)
        rows = rows.to(self.device, non_blocking=True)
        return rows[:, :-1].clamp(min=0), rows[:, 1:]

    def _check_range(self, ids: np.ndarray) -> None:
        highest = int(ids.max())
        if highest >= self.vocab_size:
            raise InputError(
                f"{self.name}: token id {highest} does not fit meta.json's vocabulary of "
                f"{self.vocab_size}; prepare the dataset again"
            )


def train_starts(n_tokens: int, block_size: int, n_windows: int, seed: int, step: int):
    """Where a step's windows begin, (n_windows,) int64: a function of seed and step alone.

    Each epoch cuts the split into windows side by side, from a start of its own, and shuffles
    them. It so reads every token once, but for fewer than two windows' worth at the two ends.
    """
    per_epoch = max(1, n_tokens // block_size - 1)
    epochs, places = np.divmod(step * n_windows + np.arange(n_windows), per_epoch)
    starts = np.empty(n_windows, dtype=np.int64)
    for epoch in np.unique(epochs):
        order, phase = _epoch(n_tokens, block_size, per_epoch, seed, int(epoch))
        here = epochs == epoch
        starts[here] = order[places[here]] * block_size + phase
    return starts


@functools.lru_cache(maxsize=2)  # a step may see the end of one and the start of the next
def _epoch(n_tokens: int, block_size: int, per_epoch: int, seed: int, epoch: int):
    """-> the shuffled numbers of an epoch's windows (8 bytes each), the start of the first."""
    rng = np.random.default_rng([seed, epoch])
    phase = rng.integers(0, n_tokens - per_epoch * block_size)
    return rng.permutation(per_epoch), phase


def eval_starts(n_tokens: int, block_size: int, n_windows: int, whole: bool) -> np.ndarray:
    """Windows side by side over the whole split, or `n_windows` of them spread evenly over it."""
    if whole:
        return np.arange(0, n_tokens - 1, block_size)
    last = n_tokens - 1 - block_size
    return np.unique(np.linspace(0, last, n_windows).astype(np.int64))
