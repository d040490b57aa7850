"""Turn a text into a dataset folder of token ids.

Usage:
    python prepare.py                    Tiny Shakespeare, by character: data/shakespeare_char/
    python prepare.py shakespeare        Tiny Shakespeare, GPT-2 BPE: data/shakespeare/
    python prepare.py mine --input=FILE  your own UTF-8 text, of any size: data/mine/
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import dataset
import settings
import tokenizer as tokenizers
from errors import InputError, RunError, run_script
from files import dataset_folder, locked, staged
from settings import option

CHUNK_BYTES = 1 << 22
TRAIN_SHARE = 0.9

SHAKESPEARE = Path("data/tinyshakespeare.txt")
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILT_IN = {"shakespeare_char": "char", "shakespeare": "gpt2"}  # dataset -> tokenizer

TIMEOUT_SECONDS = 20  # without a byte
DOWNLOAD_SECONDS = 300  # in all
ATTEMPTS = 3  # at each address


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    dataset: str = option("shakespeare_char", "folder to make below data/")
    input: str = option("", "a UTF-8 text file to use; nothing is downloaded")
    tokenizer: str = option("", "char, byte, gpt2, or DIR/meta.json to reuse a dataset's")


@dataclasses.dataclass(frozen=True)
class Text:
    """What a first pass over a text file finds out."""

    path: Path
    n_bytes: int
    n_chars: int
    chars: str  # the distinct ones, in code point order
    sha256: str


def main(argv: list[str]) -> int:
    config = settings.load(PrepareConfig, argv, usage=__doc__, positional="dataset")
    folder = dataset_folder(config.dataset)
    path = Path(config.input) if config.input else built_in_text(config.dataset)
    text = survey(path)
    tokenizer = choose_tokenizer(config.tokenizer or BUILT_IN.get(config.dataset, "char"), text)
    described = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.to_json(),
        "source": path.name,
        "sha256": text.sha256,
    }
    if int(text.n_chars * TRAIN_SHARE) in (0, text.n_chars):
        raise InputError(f"{path}: {text.n_chars} characters are too short for two splits")
    with locked(folder):
        meta = up_to_date(folder, described)
        done = "up to date:"
        if meta is None:
            meta = dataset.write(folder, tokenize(text, tokenizer), **described)
            done = "made"
    print(done, summary(folder, meta, text))
    return 0


def built_in_text(name: str) -> Path:
    if name not in BUILT_IN:
        raise InputError(
            f"dataset {name!r} needs a text: python prepare.py {name} --input=FILE "
            f"(without one: {', '.join(BUILT_IN)})"
        )
    if SHAKESPEARE.exists():
        if hashlib.sha256(SHAKESPEARE.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
            return SHAKESPEARE
        print(f"{SHAKESPEARE} is not the expected text; downloading it anew", file=sys.stderr)
    download(SHAKESPEARE_URLS, SHAKESPEARE, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256)
    return SHAKESPEARE


def download(urls, path: Path, n_bytes: int, sha256: str, wait_seconds: float = 1.0) -> None:
    """Fetch a file of known size and hash from the first of `urls` that delivers it.

    Each is tried `ATTEMPTS` times with a doubling wait. Raises RunError when none does; `path`
    is written only when everything is right.
    """
    import requests
    import urllib3

    reasons = {}
    for attempt in range(ATTEMPTS):
        for url in urls:
            try:
                body = _fetch(url, n_bytes)
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                reasons[url] = f"{type(error).__name__}"
                continue
            if hashlib.sha256(body).hexdigest() == sha256:
                path.parent.mkdir(parents=True, exist_ok=True)
                with staged(path) as (file,):
                    file.write(body)
                return
            reasons[url] = f"sent {len(body):,} bytes that are not the expected text"
        if attempt < ATTEMPTS - 1:
            time.sleep(wait_seconds * 2**attempt)
    raise RunError(
        f"could not download the text ({'; '.join(f'{u}: {r}' for u, r in reasons.items())}): "
        f"check the network, put the file at {path}, or give a text with --input=FILE"
    )


def _fetch(url: str, n_bytes: int) -> bytes:
    """At most a byte more than `n_bytes`, so that a wrong file cannot fill the memory."""
    import requests

    deadline = time.monotonic() + DOWNLOAD_SECONDS
    with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response:
        response.raise_for_status()
        body = b""
        while piece := response.raw.read1(n_bytes + 1 - len(body), decode_content=True):
            body += piece
            show_progress(f"downloading {url}", len(body), n_bytes)
            if time.monotonic() > deadline:
                raise requests.Timeout
    return body


def survey(path: Path) -> Text:
    """Read the file once: its size, hash and characters. Raises InputError when not UTF-8."""
    digest = hashlib.sha256()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    n_chars = 0
    for piece in read_text(path, "reading", digest.update):
        n_chars += len(piece)
        seen[tokenizers.code_points(piece)] = True
    if n_chars == 0:
        raise InputError(f"{path} is empty")
    chars = "".join(map(chr, np.flatnonzero(seen)))
    return Text(path, path.stat().st_size, n_chars, chars, digest.hexdigest())


def read_text(path: Path, doing: str, each: Callable = lambda data: None) -> Iterator[str]:
    """The file's text in pieces; `each` sees the raw bytes. Line ends stay as they are."""
    try:
        total = path.stat().st_size
        if not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is not a file that can be read twice; save it to one first")
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with file:
        while True:
            data = file.read(CHUNK_BYTES)
            each(data)
            pending = len(decoder.getstate()[0])
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = position - pending + error.start
                raise InputError(
                    f"{path} is not UTF-8: byte {offset:,} is wrong; convert it first"
                ) from None
            position += len(data)
            show_progress(f"{doing} {path}", position, total)
            if piece:
                yield piece
            if not data:
                return


def choose_tokenizer(name: str, text: Text) -> tokenizers.Tokenizer:
    if name == "char":
        return tokenizers.CharTokenizer(text.chars)
    if name == "byte":
        return tokenizers.ByteTokenizer()
    if name == "gpt2":
        return tokenizers.BPETokenizer.gpt2()
    if name.endswith(".json"):
        tokenizer = tokenizers.from_json(dataset.read_meta(Path(name)).tokenizer, name)
        tokenizer.encode(text.chars)  # names every character that it lacks
        return tokenizer
    raise InputError(f"tokenizer={name}: use char, byte, gpt2, or DIR/meta.json of a dataset")


def up_to_date(folder: Path, described: dict) -> dataset.Meta | None:
    """The dataset's meta when it was made from the same text with the same tokenizer."""
    try:
        meta = dataset.read_meta(folder / "meta.json")
        if any(getattr(meta, name) != value for name, value in described.items()):
            return None
        return dataset.read(folder)[0]  # which reads all of it, for the checksums
    except InputError:
        return None


def tokenize(text: Text, tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) chunks: the first 90 % of the characters are train, the rest val."""
    for split, pieces in itertools.groupby(split_text(text), key=lambda pair: pair[0]):
        for part in tokenizer.parts(piece for _, piece in pieces):
            yield split, tokenizer.encode(part)


def split_text(text: Text) -> Iterator[tuple[str, str]]:
    """(split, piece of text) pairs."""
    left, n_chars = int(text.n_chars * TRAIN_SHARE), 0
    for piece in read_text(text.path, "tokenizing"):
        if left > 0:
            yield "train", piece[:left]
        if left < len(piece):
            yield "val", piece[left:]
        left, n_chars = max(0, left - len(piece)), n_chars + len(piece)
    if n_chars != text.n_chars:
        raise InputError(f"{text.path} changed while it was read; run the same command again")


def summary(folder: Path, meta: dataset.Meta, text: Text) -> str:
    size = (meta.train_tokens + meta.val_tokens) * np.dtype(meta.dtype).itemsize
    return (
        f"{folder}/: {text.n_chars:,} characters ({len(text.chars)} distinct) of {text.path}, "
        f"vocabulary {meta.vocab_size:,}, {meta.train_tokens:,} train + {meta.val_tokens:,} val "
        f"tokens, {size:,} bytes of {meta.dtype}"
    )


_last_shown = 0.0


def show_progress(what: str, done: int, total: int) -> None:
    """A line on stderr, rewritten a few times a second, when a person is looking."""
    global _last_shown
    if not sys.stderr.isatty():
        return
    is_done = done >= total
    if is_done or time.monotonic() - _last_shown > 0.2:
        _last_shown = time.monotonic()
        share = done / total if total else 1.0
        print(f"\r{what}: {share:4.0%}\x1b[K", end="\n" if is_done else "", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
