"""Tokenizers: text to token ids and back.

A dataset's meta.json and every checkpoint describe theirs completely. All three kinds have:

    vocab_size, end_of_text    ids are below vocab_size; the id that ends a document, or None
    encode(text) -> ids        a one-dimensional array of ids; END_OF_TEXT in it is ordinary text
    parts(texts)               one text in pieces of any size -> parts that can be encoded apart
    decode_bytes(ids)          UTF-8; the bytes of a character may come from several tokens
    to_json()                  plain types, from which `from_json` makes the tokenizer again
"""

import base64
import codecs
import re
from collections.abc import Iterable, Iterator

import numpy as np
import tiktoken

from quill.errors import InputError, RunError, blames_input

END_OF_TEXT = "<|endoftext|>"  # as GPT-2 spells it


class CharTokenizer:
    """One token per character of the training text, and one to end a document if wanted."""

    def __init__(self, chars: str, ends_texts: bool = False):
        self.chars = chars
        self.vocab_size = len(chars) + ends_texts
        self.end_of_text = len(chars) if ends_texts else None
        known = code_points(chars)
        # Encoding is a table look-up; the extra last entry stands for all higher code points.
        self._id_of = np.full(int(known.max(initial=0)) + 2, -1, dtype=np.int32)
        self._id_of[known] = np.arange(len(chars))
        self._token_bytes = [char.encode("utf-8") for char in (*chars, END_OF_TEXT)]

    def encode(self, text: str) -> np.ndarray:
        """Raises `InputError` naming the characters that are not in the vocabulary."""
        ids = self._id_of.take(code_points(text), mode="clip")
        if ids.size and ids.min() < 0:
            unknown = [text[i] for i in np.flatnonzero(ids < 0)]
            names = [f"{char!r} (U+{ord(char):04X})" for char in sorted(set(unknown))]
            some = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
            raise InputError(
                f"the vocabulary of {len(self.chars)} characters lacks {some}: "
                f"{len(unknown):,} of {len(text):,} characters"
            )
        return ids

    def parts(self, texts: Iterable[str]) -> Iterable[str]:
        return texts

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._token_bytes[i] for i in ids)

    def to_json(self) -> dict:
        return {"kind": "char", "chars": self.chars, "ends_texts": self.end_of_text is not None}


class ByteTokenizer:
    """One token per UTF-8 byte, any text at all, and one to end a document if wanted."""

    def __init__(self, ends_texts: bool = False):
        self.vocab_size = 256 + ends_texts
        self.end_of_text = 256 if ends_texts else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def parts(self, texts: Iterable[str]) -> Iterable[str]:
        return texts

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids)

    def to_json(self) -> dict:
        return {"kind": "byte", "ends_texts": self.end_of_text is not None}


class BPETokenizer:
    """A byte-pair encoding, GPT-2's own or one learned as GPT-2's was, by tiktoken.

    Special tokens in a text are ordinary characters.
    """

    # What cuts a text into pre-tokens before bytes are merged: GPT-2's, as tiktoken writes it.
    _PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    # A split before a blank that follows a non-blank never cuts a GPT-2 pre-token in two.
    _SAFE_SPLIT = re.compile(r"(?<=\S)(?=[ \n])")
    _PART_CHARS = 1 << 18

    def __init__(self, tokens: list[bytes], special: list[str]):
        """tokens: in the order of their ids, which is that of their merges; `special` follow.

        Raises ValueError when they do not make a tokenizer: each byte must be one of the tokens.
        """
        distinct = {*tokens}
        if len(distinct) < len(tokens) or not {bytes([b]) for b in range(256)} <= distinct:
            raise ValueError("its tokens are not distinct, or lack one of the 256 bytes")
        if b"" in distinct or len({*special}) < len(special):
            raise ValueError("it has an empty token, or the same special token twice")
        self.tokens, self.special = tokens, special
        self.vocab_size = len(tokens) + len(special)
        special_ids = {name: len(tokens) + i for i, name in enumerate(special)}
        self.end_of_text = special_ids.get(END_OF_TEXT)
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=self._PATTERN,
            mergeable_ranks={token: i for i, token in enumerate(tokens)},
            special_tokens=special_ids,
        )

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's own, which tiktoken downloads once, to TIKTOKEN_CACHE_DIR if that is set."""
        import requests  # here, because it takes 0.1 s and prepare.py of a small text not much more

        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except requests.RequestException as error:
            raise RunError(
                f"the GPT-2 tokenizer could not be downloaded ({type(error).__name__}): connect "
                "once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=byte"
            ) from None
        special = sorted(gpt2.special_tokens_set)
        n_ordinary = gpt2.n_vocab - len(special)
        return cls([gpt2.decode_single_token_bytes(i) for i in range(n_ordinary)], special)

    def encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    @classmethod
    def parts(cls, texts: Iterable[str]) -> Iterator[str]:
        pending = ""
        for text in texts:
            pending += text
            start = 0
            while split := cls._SAFE_SPLIT.search(pending, start + cls._PART_CHARS):
                yield pending[start : split.start()]
                start = split.start()
            pending = pending[start:]
        yield pending

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def to_json(self) -> dict:
        words = " ".join(base64.b64encode(token).decode("ascii") for token in self.tokens)
        return {"kind": "gpt2", "tokens": words, "special": self.special}


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer


def from_json(spec: object, source: str) -> Tokenizer:
    """The tokenizer of a `to_json()`; raises `InputError` naming `source` when it is not one."""
    kinds = KeyError, TypeError, ValueError, AttributeError
    with blames_input(f"{source}: no usable tokenizer in it", *kinds):
        ends_texts = spec.get("ends_texts", False)
        if type(ends_texts) is not bool:
            raise ValueError("ends_texts is neither true nor false")
        if spec["kind"] == "char":
            chars = spec["chars"]
            if type(chars) is not str or not chars or len(set(chars)) < len(chars):
                raise ValueError("chars must be distinct")
            return CharTokenizer(chars, ends_texts)
        if spec["kind"] == "byte":
            return ByteTokenizer(ends_texts)
        if spec["kind"] == "gpt2":
            tokens = [base64.b64decode(word, validate=True) for word in spec["tokens"].split(" ")]
            special = spec["special"]
            if type(special) is not list or not all(type(name) is str for name in special):
                raise ValueError("special is not a list of texts")
            return BPETokenizer(tokens, special)
        raise ValueError(f"unknown kind {spec['kind']!r}")


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Like `encode`, but `END_OF_TEXT` becomes that token if the tokenizer has it."""
    if tokenizer.end_of_text is None:
        return tokenizer.encode(text)
    end = np.array([tokenizer.end_of_text])
    parts = [part for text in text.split(END_OF_TEXT) for part in (end, tokenizer.encode(text))]
    return np.concatenate(parts[1:])


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids as they come; returns a character as soon as all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def code_points(text: str) -> np.ndarray:
    """One unsigned integer per character."""
    if text.isascii():  # one byte a character instead of four
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
