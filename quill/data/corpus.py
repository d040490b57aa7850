"""Texts to read: a file, a folder or a pattern of files, as documents in pieces of any size.

A .jsonl file has a document a line, {"text": ...} or {"prompt": ..., "completion": ...}; a .parquet
file has one a row, in its column `text`; any other is one document. .gz is unpacked on the way.
"""

import codecs
import contextlib
import errno
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quill.data.tokenizers import code_points
from quill.errors import InputError, blames_input, needs_extra
from quill.files import open_file, sha256_of_file, show_progress

CHUNK_BYTES = 1 << 20
LONGEST_LINE = 1 << 26  # bytes of a .jsonl file
ROWS_AT_ONCE = 16  # of a .parquet file
IN_FOLDERS = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


class Section(NamedTuple):
    """A document is a list of these: one, or a prompt and its completion."""

    texts: Iterable[str]  # in pieces, to be read before the next section is asked for
    has_loss: bool


class Corpus:
    """Files that are read in order, once or more often."""

    def __init__(self, name: str):
        """name: a file, a folder with everything below it, or a pattern such as books/*.txt."""
        self.files = _find(name)
        self.is_one_text = len(self.files) == 1 and _kind(self.files[0]) == "txt"
        self.n_bytes = sum(path.stat().st_size for path in self.files)
        self.n_documents = self.n_chars = 0  # so far, in the latest pass

    def documents(self, doing: str) -> Iterator[list[Section]]:
        """doing: for the progress line. Raises InputError naming the first wrong file or line."""
        self.n_documents = self.n_chars = 0
        n_before = 0
        for path in self.files:
            show = partial(self._show, doing, path, n_before)
            for document in _READERS[_kind(path)](path, show):
                self.n_documents += 1
                yield [Section(self._counted(texts), has_loss) for texts, has_loss in document]
            n_before += path.stat().st_size

    def _show(self, doing: str, path: Path, n_before: int, n_bytes: int) -> None:
        show_progress(f"{doing} {path}", n_before + n_bytes, self.n_bytes)

    def _counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.n_chars += len(text)
            yield text


class Survey(NamedTuple):
    """What a first pass over a corpus finds."""

    n_documents: int
    n_chars: int
    chars: str  # the distinct ones, in code point order
    has_prompts: bool
    sha256: str  # of the file; of the files' hashes where there are several


def survey(corpus: Corpus) -> Survey:
    """Raises InputError for an empty corpus, and where only some documents have a prompt."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    n_with_prompts = 0
    for document in corpus.documents("reading"):
        n_with_prompts += len(document) > 1
        for section in document:
            for text in section.texts:
                seen[code_points(text)] = True
    name = corpus.files[0] if len(corpus.files) == 1 else f"{len(corpus.files)} files"
    if corpus.n_chars == 0:
        raise InputError(f"{name}: empty, there is no text")
    if 0 < n_with_prompts < corpus.n_documents:
        raise InputError(
            f"{name}: {n_with_prompts:,} of {corpus.n_documents:,} documents are a prompt and a "
            "completion, the others are not: prepare them separately"
        )
    digests = [f"{_kind(path)} {sha256_of_file(path)}" for path in corpus.files]
    sha256 = digests[0].split()[1]
    if len(digests) > 1:
        sha256 = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    chars = "".join(map(chr, np.flatnonzero(seen)))
    return Survey(corpus.n_documents, corpus.n_chars, chars, n_with_prompts > 0, sha256)


def _find(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = [p for p in _walk(name) if p.lower().endswith(IN_FOLDERS)]
        wanted = f"no {', '.join(IN_FOLDERS)} in it"
    elif not path.exists() and glob.has_magic(name):
        found, wanted = _glob(name), "no file matches"
    else:
        return [path]
    if not (files := sorted(p for p in map(Path, found) if p.is_file())):
        raise InputError(f"input={name}: {wanted}")
    return files


def _walk(folder: str) -> Iterator[str]:
    """The files at any depth, but for hidden ones; raises OSError for a folder it cannot read."""

    def fail(error: OSError):
        raise error

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (f"{root}/{name}" for name in names if not name.startswith("."))


def _glob(pattern: str) -> list[str]:
    """The paths that match; raises OSError for a folder that glob would leave out, unreadable."""
    parts = Path(pattern).parts
    for n in range(1, len(parts)):
        needed = os.R_OK | os.X_OK if glob.has_magic(parts[n]) else os.X_OK
        for folder in glob.glob(f"{Path(*parts[:n])}/", recursive=True):  # noqa: PTH207
            if not os.access(folder, needed):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path's takes no absolute pattern)


# Each yields documents, as lists of (texts, has_loss), and calls `show` with the bytes it has read.


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(".gz") and not name.endswith(IN_FOLDERS):
        raise InputError(f"{path}: only .txt.gz and .jsonl.gz are unpacked here; unpack it first")
    name = name.removesuffix(".gz")
    return next((kind for kind in ("jsonl", "parquet") if name.endswith(f".{kind}")), "txt")


@contextlib.contextmanager
def _open(path: Path):
    """-> a file of the contents, and the file itself, whose position is the progress."""
    with open_file(path) as raw:  # a pipe could not be read twice
        kinds = gzip.BadGzipFile, zlib.error, EOFError
        with blames_input(f"{path} cannot be unpacked, it is damaged", *kinds):
            yield (gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw), raw


def _read_txt(path: Path, show: Callable) -> Iterator[list]:
    pieces = _pieces(path, show)
    for first in pieces:  # at most once: an empty file is no document
        yield [(itertools.chain([first], pieces), True)]


def _pieces(path: Path, show: Callable) -> Iterator[str]:
    """The file's text, without a byte order mark; line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    is_over = False
    with _open(path) as (file, raw):
        while not is_over:
            data = file.read(CHUNK_BYTES)
            is_over = not data
            try:
                piece = decoder.decode(data, final=is_over)
            except UnicodeDecodeError as error:
                wrong = file.tell() - len(error.object) + error.start  # the object ends at tell()
                raise InputError(f"{path} is not UTF-8: byte {wrong:,}; convert it first") from None
            show(raw.tell())
            if piece:
                yield piece


def _read_jsonl(path: Path, show: Callable) -> Iterator[list]:
    with _open(path) as (file, raw):
        lines = iter(partial(file.readline, LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            with blames_input(f"{path}, line {number}", ValueError, RecursionError):
                document = _document(line)
            if document:
                yield document
            show(raw.tell())


def _document(line: bytes) -> list:
    """-> its sections, none for an empty line or text. Raises ValueError if it is no document."""
    if line.isspace():
        return []
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
    record = json.loads(line.decode("utf-8-sig"))  # given bytes, json lets half characters pass
    has_loss = {"text": True, "prompt": False, "completion": True}
    fields = [field for field in has_loss if isinstance(record, dict) and field in record]
    if fields not in (["text"], ["prompt", "completion"]):
        raise ValueError(
            f'neither {{"text": ...}} nor {{"prompt": ..., "completion": ...}}, but {record!r:.80}'
        )
    for field in fields:
        text = record[field]
        if type(text) is not str or (not text and field != "text"):
            raise ValueError(f"{field!r} is not a text, or empty")
        if b"\\u" in line and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{field!r} holds half a character (a lone surrogate)")
    return [((record[field],), has_loss[field]) for field in fields if record[field]]


def _read_parquet(path: Path, show: Callable) -> Iterator[list]:
    with needs_extra("data"):
        from pyarrow import ArrowException, parquet
    with _open(path) as (file, raw):
        try:
            for rows in parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=["text"]):
                for text in rows.column("text").to_pylist():
                    if type(text) is not str:
                        raise InputError(f"{path}: its column text holds {text!r:.80}")
                    if text:
                        yield [((text,), True)]
                show(raw.tell())
        except (ArrowException, ValueError, KeyError, OSError) as error:
            raise InputError(f"{path} is not a table with a column text: {error}") from None


_READERS = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}
