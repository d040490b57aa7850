"""What nanoGPT leaves behind: its checkpoints, and the datasets that its prepare.py made."""

from __future__ import annotations

import hashlib
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quill.data import tokenizers
from quill.errors import InputError

if TYPE_CHECKING:
    from quill.interop.pretrained import Pretrained

_LONGEST_PICKLE = 1 << 22  # bytes; a hundred thousand characters take less
_CHUNK_TOKENS = 1 << 22
# What a dict of numbers and texts is pickled to: nothing that looks anything up, or calls it.
_HARMLESS = """
PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS BININT BININT1 BININT2 SHORT_BINUNICODE BINUNICODE
MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
"""


def read_tokenizer(path: Path) -> tokenizers.CharTokenizer:
    """The characters of a meta.pkl; raises InputError when it holds anything but plain values."""
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_PICKLE + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        meta = _harmless(data)
        chars = [meta["itos"][i] for i in range(len(meta["itos"]))]
        if not all(type(char) is str and len(char) == 1 for char in chars):
            raise ValueError("its tokens are not single characters")
        return tokenizers.from_json({"kind": "char", "chars": "".join(chars)}, str(path))
    except (ValueError, TypeError, LookupError, ArithmeticError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is not nanoGPT's meta.pkl of characters ({error})") from None


def _harmless(data: bytes):
    """Unpickle numbers and texts in dicts; raises ValueError for anything else, running nothing."""
    if len(data) > _LONGEST_PICKLE:
        raise ValueError("too long")
    for opcode, argument, _ in pickletools.genops(data):
        is_far = opcode.name == "LONG_BINPUT" and argument > len(data)  # memory for what is between
        if opcode.name not in _HARMLESS.split() or is_far:
            raise ValueError(f"{opcode.name} is refused, nothing in it was run")
    return pickle.loads(data)


def read_bins(folder: Path, vocab_size: int) -> tuple[Iterator[tuple], str]:
    """-> (split, ids, no mask) chunks of train.bin and val.bin, and a SHA-256 of both."""
    ids_of, digest = {}, hashlib.sha256()
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        try:
            ids_of[split] = np.memmap(path, dtype="<u2", mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}, which belongs to meta.pkl: {error}") from None
        digest.update(ids_of[split])
        if ids_of[split].max() >= vocab_size:
            raise InputError(f"{path} has ids that meta.pkl's {vocab_size} characters do not cover")
    chunks = (
        (split, ids[start : start + _CHUNK_TOKENS], None)
        for split, ids in ids_of.items()
        for start in range(0, len(ids), _CHUNK_TOKENS)
    )
    return chunks, digest.hexdigest()


def load_checkpoint(path: Path) -> Pretrained:
    """Raises InputError when it is not one that nanoGPT's train.py saved."""
    from model import GPTConfig
    from quill.interop.pretrained import Pretrained
    from quill.training import checkpoint

    contents = checkpoint.read_archive(path, ("model", "optimizer", "best_val_loss"))
    try:
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        config = GPTConfig(**{name: contents["model_args"][name] for name in names})
        weights = {
            name.removeprefix("_orig_mod."): p.float()  # torch.compile's prefix
            for name, p in contents["model"].items()
            if not name.endswith(".attn.bias")  # a mask, in attention without a fused kernel
        }
        checkpoint.check_weights(config, weights)
    except checkpoint.MISFITS as error:
        raise InputError(
            f"{path} is neither a checkpoint of Quill nor one of nanoGPT ({error!r})"
        ) from None
    return Pretrained(config, weights, tokenizer=None)
