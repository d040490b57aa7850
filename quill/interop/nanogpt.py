"""Datasets that nanoGPT's prepare.py made. Its checkpoints are read by quill.interop.pretrained."""

import hashlib
import pickle
import pickletools
from pathlib import Path

import numpy as np

from quill.data import tokenizers
from quill.errors import InputError, blames_input
from quill.files import open_file

_MAX_PICKLE_BYTES = 1 << 22  # a hundred thousand characters take less
_CHUNK_TOKENS = 1 << 22
# The opcodes of dicts of numbers and strings: none of them looks up or calls anything.
_PLAIN_OPCODES = """
PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS BININT BININT1 BININT2 SHORT_BINUNICODE BINUNICODE
MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
""".split()


def read_tokenizer(path: Path) -> tokenizers.CharTokenizer:
    """The characters of a meta.pkl; raises InputError when it holds anything but plain values."""
    kinds = ValueError, TypeError, LookupError, ArithmeticError, pickle.UnpicklingError
    with blames_input(f"{path} is not nanoGPT's meta.pkl of characters", *kinds):
        with open_file(path) as file:
            meta = _unpickle_plain(file.read(_MAX_PICKLE_BYTES + 1))
        itos = meta["itos"]
        if sorted(itos) != [*range(len(itos))]:
            raise ValueError("its ids are not 0, 1, 2 and so on")
        chars = [itos[i] for i in range(len(itos))]
        if not all(type(char) is str and len(char) == 1 for char in chars):
            raise ValueError("its tokens are not single characters")
        return tokenizers.from_json({"kind": "char", "chars": "".join(chars)}, str(path))


def _unpickle_plain(data: bytes):
    """Unpickle dicts of numbers and strings; raises ValueError for anything else, running nothing.

    A LONG_BINPUT far beyond the data would make the unpickler allocate all slots before it.
    """
    if len(data) > _MAX_PICKLE_BYTES:
        raise ValueError("too long")
    for opcode, argument, _ in pickletools.genops(data):
        is_too_far = opcode.name == "LONG_BINPUT" and argument > len(data)
        if opcode.name not in _PLAIN_OPCODES or is_too_far:
            raise ValueError(f"{opcode.name} is refused, nothing in it was run")
    return pickle.loads(data)


def read_bins(folder: Path, vocab_size: int) -> tuple[list[tuple], str]:
    """-> (split, ids, no mask) chunks of train.bin and val.bin, and a SHA-256 of both."""
    chunks, digest = [], hashlib.sha256()
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        what = f"{path}, which belongs to meta.pkl"
        with blames_input(what, ValueError), open_file(path) as file:
            ids = np.memmap(file, dtype="<u2", mode="r")
        if ids.max() >= vocab_size:
            raise InputError(f"{path} has ids that meta.pkl's {vocab_size} characters do not cover")
        digest.update(ids)
        parts = np.array_split(ids, 1 + len(ids) // _CHUNK_TOKENS)  # views of the file
        chunks += [(split, part, None) for part in parts]
    return chunks, digest.hexdigest()
