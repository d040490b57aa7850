"""The dataset folder, both directions: write it, read it, cut windows of tokens out of it.

    data/<name>/train.bin        token ids, raw little-endian uint16 or uint32, no header
    data/<name>/val.bin          the same
    data/<name>/train.mask.bin   where only some tokens carry loss: a byte each, 1 for those
    data/<name>/val.mask.bin     the same
    data/<name>/meta.json        `Meta`: how many, which dtype, which tokenizer, made from what

meta.json has the SHA-256 of the others and one of itself, so that a damaged dataset is an error.
Which windows a training step sees depends on (seed, step) alone; see `Windows`.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quill.errors import InputError
from quill.files import atomic_write, finish_atomic_write, sha256_of_file

FORMAT_VERSION = 3
SPLITS = ("train", "val")
MASKS = tuple(f"{split}.mask" for split in SPLITS)
IGNORE_INDEX = -1  # a target that carries no loss

RECORDS_SCANNED = 1 << 22  # tokens at once
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
    sha256_of: dict  # of the .bin files, by their names: SPLITS, and MASKS where there are any


def write(folder: Path, chunks: Iterable[tuple], is_masked: bool = False, **described) -> Meta:
    """Write (split name, ids, mask) chunks as they come; `described` is the rest of `Meta`.

    mask: which of the ids carry loss, when they are targets; looked at when `is_masked`.
    Nothing takes its final name before everything is on the disk.
    """
    dtype = "uint16" if described["vocab_size"] <= 2**16 else "uint32"
    described |= {"format_version": FORMAT_VERSION, "dtype": dtype}
    names = [*SPLITS, *MASKS] if is_masked else [*SPLITS]
    digests = {name: hashlib.sha256() for name in names}
    counts = dict.fromkeys(SPLITS, 0)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(*_paths(folder, names)) as (*files, meta_file):
        file_of = dict(zip(names, files, strict=True))
        for split, ids, mask in chunks:
            counts[split] += len(ids)
            parts = {split: ids.astype(np.dtype(dtype).newbyteorder("<"))}
            if is_masked:
                parts[f"{split}.mask"] = mask.astype(np.uint8)
            for name, part in parts.items():
                file_of[name].write(data := part.tobytes())
                digests[name].update(data)
        described["sha256_of"] = {name: digest.hexdigest() for name, digest in digests.items()}
        meta = Meta(**described, train_tokens=counts["train"], val_tokens=counts["val"])
        fields = dataclasses.asdict(meta)
        meta_file.write(json.dumps(fields | {"checksum": _checksum(fields)}, indent=1).encode())
    for path in _paths(folder, set(MASKS) - set(names))[:-1]:
        path.unlink(missing_ok=True)
    return meta


def _paths(folder: Path, names: Iterable[str] = (*SPLITS, *MASKS)) -> list[Path]:
    return [*(folder / f"{name}.bin" for name in names), folder / "meta.json"]


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
    if not wrong and list(fields["sha256_of"]) not in ([*SPLITS], [*SPLITS, *MASKS]):
        wrong = ["sha256_of"]
    meta = Meta(**fields)
    if wrong or meta.format_version != FORMAT_VERSION or meta.dtype not in ("uint16", "uint32"):
        raise InputError(
            f"{path}: {', '.join(wrong) or 'format version or dtype'} not usable; "
            "prepare the dataset again"
        )
    return meta


def read(folder: Path, verify: bool = True) -> tuple[Meta, dict[str, np.ndarray]]:
    """-> meta, and the .bin files memory-mapped, by their names: ids, and masks if there are any.

    verify: read all of the files once, to compare their checksums. Raises `InputError` when
    anything disagrees.
    """
    if verify:
        finish_atomic_write(*_paths(folder), is_whole=_describes_a_dataset)
    if not (folder / "meta.json").exists():
        raise InputError(
            f"dataset {folder.name!r} is not prepared ({folder / 'meta.json'} is missing): run "
            f"`python prepare.py {folder.name}`, with --input=FILE for a text of your own"
        )
    meta = read_meta(folder / "meta.json")
    return meta, {name: _map(folder, name, meta, verify) for name in meta.sha256_of}


def _map(folder: Path, name: str, meta: Meta, verify: bool) -> np.ndarray:
    path = folder / f"{name}.bin"
    n_tokens = meta.train_tokens if name.startswith("train") else meta.val_tokens
    dtype = np.dtype("uint8" if name in MASKS else meta.dtype).newbyteorder("<")
    try:
        n_bytes = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; prepare the dataset again") from None
    if n_bytes != n_tokens * dtype.itemsize or n_bytes == 0:
        raise InputError(
            f"{path} has {n_bytes:,} bytes where meta.json says {n_tokens:,} tokens of "
            f"{dtype.itemsize} bytes; prepare the dataset again"
        )
    if verify and sha256_of_file(path) != meta.sha256_of[name]:
        raise InputError(
            f"{path} was changed or damaged since it was made (its checksum differs); "
            "prepare the dataset again"
        )
    return np.memmap(path, dtype=dtype, mode="r")


class Split:
    """One split's ids, ready to be cut into (idx, targets) windows on a device.

    With a mask of what carries loss they are records, each a prompt without loss and an answer
    with it. Windows then begin where a record does, and hold as many whole ones as fit.
    """

    def __init__(self, ids, mask, vocab_size: int, block_size: int, device, path: Path):
        import torch

        self.ids, self.mask, self.vocab_size = ids, mask, vocab_size
        self.block_size, self.device, self.path = block_size, device, path
        self.records, self.n_cut = None, 0
        self.prompt = ids[:1]  # what a sample may begin with
        if mask is not None:
            self._find_records()
        elif len(ids) <= block_size:
            raise InputError(
                f"block_size={block_size} does not fit {path}, which has {len(ids):,} tokens: "
                "lower it, or prepare a longer text"
            )
        self.on_device = len(ids) <= MAX_TOKENS_ON_DEVICE
        if self.on_device:
            self._check_range(ids)
            self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
            self.mask = None if mask is None else torch.from_numpy(mask != 0).to(device)

    def _find_records(self) -> None:
        *self.records, self.n_cut = record_windows(self.mask, self.block_size)
        if len(self.records[0]) == 0:
            raise InputError(
                f"{self.path}: none of its tokens carries loss; prepare the dataset again"
            )
        first = self.mask[: self.records[1][0]]
        self.prompt = self.ids[: max(1, int(np.argmax(first != 0)))]

    def __len__(self) -> int:
        return len(self.ids)

    def train_offsets(self, n_windows: int, seed: int, step: int) -> np.ndarray:
        """Where a step's windows begin, (n_windows,) int64: a function of seed and step alone.

        Each epoch cuts the split into windows side by side, from a start of its own, and shuffles
        them. It so reads every token once, but for fewer than two windows' worth at the two ends.
        Records are cut alike in every epoch, and all of them read.
        """
        if self.records is None:
            per_epoch = max(1, len(self) // self.block_size - 1)
            n_phases = len(self) - per_epoch * self.block_size
        else:
            per_epoch, n_phases = len(self.records[0]), 1
        epochs, places = np.divmod(step * n_windows + np.arange(n_windows), per_epoch)
        starts = np.empty(n_windows, dtype=np.int64)
        for epoch in np.unique(epochs):
            order, phase = _epoch(per_epoch, n_phases, seed, int(epoch))
            here = epochs == epoch
            chosen = order[places[here]]
            if self.records is None:
                starts[here] = chosen * self.block_size + phase
            else:
                starts[here] = self.records[0][chosen]
        return starts

    def eval_offsets(self, n_windows: int, whole: bool) -> np.ndarray:
        """Windows side by side over the whole split, or `n_windows` spread evenly over it."""
        if self.records is not None:
            starts = self.records[0]
            return starts if whole else starts[_spread(len(starts) - 1, n_windows)]
        if whole:
            return np.arange(0, len(self) - 1, self.block_size)
        return _spread(len(self) - 1 - self.block_size, n_windows)

    def windows(self, starts: np.ndarray):
        """-> idx, targets, both (len(starts), block_size) int64: targets are idx one token on.

        Targets beyond the end of the split or of a window of records, and those that carry no
        loss, are `IGNORE_INDEX`.
        """
        import torch

        ends = len(self)
        if self.records is not None:
            which = np.searchsorted(self.records[0], starts, side="right") - 1
            ends = self._at_hand(torch.from_numpy(self.records[1][which]))[:, None]
        starts = self._at_hand(torch.from_numpy(starts))
        positions = starts[:, None] + torch.arange(self.block_size + 1, device=starts.device)
        inside = positions.clamp(max=len(self) - 1)
        counts = positions[:, 1:] < ends
        if self.on_device:
            rows = self.ids[inside].long()
            counts = counts if self.mask is None else counts & self.mask[inside[:, 1:]]
        else:
            gathered = self.ids[inside.numpy()].astype(np.int64)
            self._check_range(gathered)
            rows = torch.from_numpy(gathered)
            if self.mask is not None:
                counts &= torch.from_numpy(self.mask[inside[:, 1:].numpy()] != 0)
        pair = rows[:, :-1].contiguous(), rows[:, 1:].masked_fill(~counts, IGNORE_INDEX)
        return pair if self.on_device else tuple(map(self._send, pair))

    def _at_hand(self, tensor):
        """Where the ids are."""
        return self._send(tensor) if self.on_device else tensor

    def _send(self, tensor):
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)

    def _check_range(self, ids: np.ndarray) -> None:
        highest = int(ids.max())
        if highest >= self.vocab_size:
            raise InputError(
                f"{self.path}: token id {highest} does not fit meta.json's vocabulary of "
                f"{self.vocab_size}; prepare the dataset again"
            )


def _spread(last: int, n: int) -> np.ndarray:
    """At most n whole numbers, evenly from 0 to `last`."""
    return np.unique(np.linspace(0, last, n).astype(np.int64))


@functools.lru_cache(maxsize=2)  # a step may see the end of one and the start of the next
def _epoch(n_windows: int, n_phases: int, seed: int, epoch: int):
    """-> the shuffled numbers of an epoch's windows (8 bytes each), the start of the first."""
    rng = np.random.default_rng([seed, epoch])
    phase = rng.integers(0, n_phases)
    return rng.permutation(n_windows), phase


def record_windows(mask: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """-> where windows of whole records begin and end, int64, and how many records are cut.

    A record begins where loss ends. One longer than a window is cut into windows side by side, of
    which those without loss are left out.
    """
    begins = [np.zeros(1, dtype=np.int64)]
    for start in range(1, len(mask), RECORDS_SCANNED):  # in slices, to spare the memory
        part = mask[start - 1 : start + RECORDS_SCANNED]
        begins.append(np.flatnonzero((part[:-1] != 0) & (part[1:] == 0)) + start)
    begins = np.concatenate(begins)
    ends = np.append(begins[1:], len(mask))
    n_whole = np.searchsorted(ends, begins + block_size + 1, side="right")
    windows, i = array.array("q"), 0
    while i < len(begins):
        if n_whole[i] > i:
            windows.extend((begins[i], ends[n_whole[i] - 1]))
            i = n_whole[i]
            continue
        for start in range(begins[i], ends[i] - 1, block_size):
            end = min(start + block_size + 1, ends[i])
            if mask[start + 1 : end].any():
                windows.extend((start, end))
        i += 1
    starts, ends = np.array(windows, dtype=np.int64).reshape(-1, 2).T
    return starts.copy(), ends.copy(), int((n_whole <= np.arange(len(begins))).sum())
