"""The train and val splits of a run, opened by all of its processes."""

import dataclasses
import math

import numpy as np
import torch

from quill.data import dataset_files, tokenizers
from quill.data.dataset import TOKENS_SCANNED, Split
from quill.data.problems import reverses_answers
from quill.errors import InputError
from quill.files import dataset_folder
from quill.training import distributed


@dataclasses.dataclass(frozen=True)
class Splits:
    meta: dataset_files.Meta
    tokenizer: tokenizers.Tokenizer
    train: Split
    val: Split
    reverses_answers: bool  # see quill.data.problems
    val_bytes_per_token: float

    def val_bpb(self, loss: float) -> float:
        """Nats per token of the val split as bits per byte of its text, to compare tokenizers."""
        return loss / math.log(2) / self.val_bytes_per_token


def open_splits(name: str, block_size: int, device: torch.device) -> Splits:
    """Raises InputError when data/<name> is missing, damaged, or too short for block_size."""
    folder = dataset_folder(name)
    if distributed.is_local_main():
        meta, bins = dataset_files.read(folder)
    distributed.barrier()  # the first may have had to finish what a killed prepare.py left
    if not distributed.is_local_main():
        meta, bins = dataset_files.read(folder, verify=False)
    if distributed.broadcast_object(meta) != meta:
        raise InputError(f"{folder} is not the same on all machines; prepare it from one text")
    tokenizer = tokenizers.from_json(meta.tokenizer, str(folder / "meta.json"))
    if tokenizer.vocab_size != meta.vocab_size:
        raise InputError(
            f"{folder / 'meta.json'}: vocab_size={meta.vocab_size}, but its tokenizer has "
            f"{tokenizer.vocab_size}; prepare the dataset again"
        )
    sizes = (meta.vocab_size, block_size, device)
    train, val = (
        Split(bins[s], bins.get(f"{s}.mask"), *sizes, folder / f"{s}.bin")
        for s in dataset_files.SPLITS
    )
    val_bytes = bytes_per_token(tokenizer, bins["val"])
    return Splits(meta, tokenizer, train, val, reverses_answers(meta.tokenizer), val_bytes)


def bytes_per_token(tokenizer: tokenizers.Tokenizer, ids: np.ndarray) -> float:
    """The mean over ids (N,) of the bytes of UTF-8 that each stands for; end_of_text for none."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, len(ids), TOKENS_SCANNED):
        part = np.minimum(ids[start : start + TOKENS_SCANNED], len(counts) - 1)
        counts += np.bincount(part, minlength=len(counts))
    sizes = [len(tokenizer.decode_bytes([i])) for i in range(len(counts))]
    if tokenizer.end_of_text is not None:
        sizes[tokenizer.end_of_text] = 0
    return max(1, int(counts @ sizes)) / len(ids)  # 1: where all documents are empty
