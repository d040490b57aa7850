"""Batches for training and evaluation: which windows of a split, and their token ids.

nanoGPT's get_batch draws random offsets. Here they are a function of (seed, step) alone, so that
evaluating, resuming and the number of processes do not change what a step sees.
"""

import array
import functools
from pathlib import Path

import numpy as np
import torch

from quill.errors import InputError

IGNORE_INDEX = -1  # a target that carries no loss

# Up to this size a split is one int32 tensor on the device; above, it stays memory-mapped.
MAX_TOKENS_ON_DEVICE = 2**26
# Up to this size evaluation covers every token of the val split; above, `eval_iters` windows.
MAX_TOKENS_EVALUATED_WHOLE = 2**20
TOKENS_SCANNED = 1 << 22  # at once, of a whole split, to bound the memory


class Split:
    """The token ids of train or val, from which `get_batch` cuts windows of `block_size`.

    Without a loss mask they are one long text, and a window may begin anywhere. With one they are
    examples, each a prompt without loss and a completion with it; a window begins with an example
    and holds as many whole ones as fit.
    """

    def __init__(self, ids, mask, vocab_size: int, block_size: int, device, path: Path):
        """ids, mask or None: from dataset_files.read. Raises InputError if no window can be cut."""
        self.ids, self.mask, self.vocab_size = ids, mask, vocab_size
        self.block_size, self.device, self.path = block_size, device, path
        self.starts = np.arange(0, len(ids) - 1, block_size)  # where windows side by side begin
        self.examples = None  # or where windows of whole examples begin (also in starts) and end
        self.n_cut = 0  # examples that are longer than a window
        self.prompt = ids[:1]  # what a sample may begin with
        if mask is not None:
            self._find_examples()
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

    def _find_examples(self) -> None:
        self.starts, ends, self.n_cut = example_windows(self.mask, self.block_size)
        self.examples = self.starts, ends
        if len(ends) == 0:
            raise InputError(f"{self.path}: none of its tokens carries loss; prepare it again")
        self.prompt = self.ids[: max(1, int(np.argmax(self.mask[: ends[0]] != 0)))]

    def __len__(self) -> int:
        return len(self.ids)

    def train_offsets(self, n_windows: int, seed: int, step: int) -> np.ndarray:
        """Where the windows of a step begin, (n_windows,) int64: a function of seed and step alone.

        Each epoch cuts the text into windows side by side, beginning at a shift of its own, and
        shuffles them. So it has every token once, except for fewer than two windows' worth at the
        two ends. Examples are cut the same way in every epoch, which has all of them.
        """
        n_per_epoch, n_shifts = len(self.starts), 1
        if self.examples is None:
            n_per_epoch = max(1, len(self) // self.block_size - 1)
            n_shifts = len(self) - n_per_epoch * self.block_size
        epochs, places = np.divmod(step * n_windows + np.arange(n_windows), n_per_epoch)
        offsets = np.empty(n_windows, dtype=np.int64)
        for epoch in np.unique(epochs):
            order, shift = shuffled_epoch(n_per_epoch, n_shifts, seed, int(epoch))
            is_in_epoch = epochs == epoch
            offsets[is_in_epoch] = self.starts[order[places[is_in_epoch]]] + shift
        return offsets

    def eval_offsets(self, n_windows: int, whole: bool) -> np.ndarray:
        """Of windows side by side over the whole split, or of at most `n_windows` spaced evenly."""
        if whole:
            return self.starts
        last = len(self) - 1 - self.block_size if self.examples is None else len(self.starts) - 1
        spaced = np.unique(np.linspace(0, last, n_windows).astype(np.int64))
        return spaced if self.examples is None else self.starts[spaced]

    def get_batch(self, offsets: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """offsets (B,) of windows -> idx, targets, both (B, T) int64; targets are the next tokens.

        A target is `IGNORE_INDEX` where it carries no loss, and beyond the end of the split or of
        the window's examples.
        """
        device = self.device if self.on_device else torch.device("cpu")  # where the ids are
        starts = copy_to(device, torch.from_numpy(offsets))[:, None]
        positions = starts + torch.arange(self.block_size + 1, device=device)  # (B, T + 1)
        ids, mask = self._look_up(positions.clamp(max=len(self) - 1))
        ends = len(self)
        if self.examples is not None:
            windows = np.searchsorted(self.starts, offsets, side="right") - 1
            ends = copy_to(device, torch.from_numpy(self.examples[1][windows]))[:, None]  # (B, 1)
        has_loss = positions < ends if mask is None else (positions < ends) & mask
        idx = ids[:, :-1].contiguous()  # (B, T)
        targets = ids[:, 1:].masked_fill(~has_loss[:, 1:], IGNORE_INDEX)  # (B, T)
        return copy_to(self.device, idx), copy_to(self.device, targets)

    def _look_up(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> the int64 ids at these positions, and whether they carry loss if there is a mask."""
        if self.on_device:
            ids = self.ids[positions].long()
            return ids, None if self.mask is None else self.mask[positions]
        positions = positions.numpy()
        ids = self.ids[positions].astype(np.int64)  # one gather from the memory-mapped file
        self._check_range(ids)
        mask = None if self.mask is None else torch.from_numpy(self.mask[positions] != 0)
        return torch.from_numpy(ids), mask

    def _check_range(self, ids: np.ndarray) -> None:
        highest = int(ids.max())
        if highest >= self.vocab_size:
            raise InputError(
                f"{self.path}: token id {highest} does not fit meta.json's vocabulary of "
                f"{self.vocab_size}; prepare the dataset again"
            )


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Pinned memory is copied to a CUDA device while the program continues."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.lru_cache(maxsize=2)  # a step may have the end of one epoch and the start of the next
def shuffled_epoch(n_windows: int, n_shifts: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """-> the numbers of an epoch's windows in random order (8 bytes each), and its shift."""
    rng = np.random.default_rng([seed, epoch])
    shift = rng.integers(0, n_shifts)
    return rng.permutation(n_windows), shift


def example_windows(mask: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """-> where windows of whole examples begin and end, int64, and how many examples are cut.

    An example begins where loss ends. One longer than a window is cut into windows side by side, of
    which those without loss are left out.
    """
    begins = [np.zeros(1, dtype=np.int64)]
    for start in range(1, len(mask), TOKENS_SCANNED):
        part = mask[start - 1 : start + TOKENS_SCANNED]
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
    starts, ends = np.array(windows, dtype=np.int64).reshape(-1, 2).T.copy()
    return starts, ends, int((n_whole <= np.arange(len(begins))).sum())
