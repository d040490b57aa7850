"""Turn text into a dataset folder of token ids.

Usage:
    python prepare.py                    Tiny Shakespeare, by character: data/shakespeare_char/
    python prepare.py shakespeare        Tiny Shakespeare, GPT-2 BPE: data/shakespeare/
    python prepare.py addition           all sums of numbers of up to three digits: data/addition/
    python prepare.py calculator         sums, differences, products, quotients: data/calculator/
    python prepare.py mine --input=PATH  your own text, of any size: data/mine/

PATH is a UTF-8 text file, a folder or a pattern of .txt, .jsonl (also .gz) and .parquet files, or
the meta.pkl of a dataset that nanoGPT prepared. In .jsonl a line is {"text": ...}, or {"prompt":
..., "completion": ...}, of which only the completion carries loss.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from quill import arithmetic, settings
from quill.data import dataset, tokenizers
from quill.data.corpus import Corpus, Section, Survey, survey
from quill.data.download import download
from quill.errors import InputError, run_command
from quill.files import dataset_folder, file_lock, sha256_of_file
from quill.interop import hf_tokenizers, nanogpt
from quill.settings import option

BATCH_CHARS = 1 << 18  # encoded at once, by one core
TRAIN_SHARE = 0.9

SHAKESPEARE = Path("data/tinyshakespeare.txt")
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILT_IN = {"shakespeare_char": "char", "shakespeare": "gpt2"}  # dataset -> tokenizer


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    dataset: str = option("shakespeare_char", "folder to make below data/")
    input: str = option("", "text to use: a file, a folder or a pattern; nothing is downloaded")
    tokenizer: str = option("", "char, byte, gpt2, or a meta.json, meta.pkl or folder that has it")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a dataset is to be made of."""

    described: dict  # the fields of dataset.Meta that are known before
    chunks: Iterable[tuple]  # for dataset.write
    is_masked: bool
    facts: str  # for the last line on the screen


def main(argv: list[str]) -> int:
    config = settings.load(PrepareConfig, argv, usage=__doc__, positional="dataset")
    folder = dataset_folder(config.dataset)
    if config.dataset in arithmetic.CHARS and not config.input:
        source = from_problems(config)
    elif config.input.endswith(".pkl"):
        source = from_nanogpt(config)
    else:
        source = from_text(config)
    with file_lock(folder):
        meta = up_to_date(folder, source)
        done = "up to date:"
        if meta is None:
            meta = dataset.write(folder, source.chunks, source.is_masked, **source.described)
            done = "made"
    size = (meta.train_tokens + meta.val_tokens) * np.dtype(meta.dtype).itemsize
    print(
        f"{done} {folder}/: {source.facts}, vocabulary {meta.vocab_size:,}, "
        f"{meta.train_tokens:,} train + {meta.val_tokens:,} val tokens, {size:,} bytes of "
        f"{meta.dtype}"
    )
    return 0


def from_text(config: PrepareConfig) -> Source:
    name = config.input or str(built_in_text(config.dataset))
    corpus = Corpus(name)
    found = survey(corpus)
    if int((found.n_chars if corpus.is_one_text else found.n_documents) * TRAIN_SHARE) == 0:
        what = f"{found.n_chars} characters" if corpus.is_one_text else "one document"
        raise InputError(f"{name}: {what} cannot be split into train and val")
    tokenizer = choose_tokenizer(
        config.tokenizer or BUILT_IN.get(config.dataset, "char"), found, not corpus.is_one_text
    )
    described = describe(tokenizer, Path(name).name, found.sha256)
    facts = f"{found.n_chars:,} characters ({len(found.chars)} distinct) of {name}"
    if not corpus.is_one_text:
        facts += f", {found.n_documents:,} documents"
    return Source(described, tokenize(corpus, found, tokenizer), found.has_prompts, facts)


def from_nanogpt(config: PrepareConfig) -> Source:
    path = Path(config.input)
    refuse_tokenizer(config, config.input)
    tokenizer = nanogpt.read_tokenizer(path)
    chunks, sha256 = nanogpt.read_bins(path.parent, tokenizer.vocab_size)
    described = describe(tokenizer, path.parent.name, sha256)
    return Source(described, chunks, False, f"the dataset of {path}")


def from_problems(config: PrepareConfig) -> Source:
    refuse_tokenizer(config, config.dataset)
    problems = [*arithmetic.problems(config.dataset)]
    tokenizer = arithmetic.tokenizer_of(config.dataset)
    sha256 = hashlib.sha256("\n".join(map(" ".join, problems)).encode()).hexdigest()
    described = describe(tokenizer, config.dataset, sha256)
    documents = (
        (split, [Section([prompt], False), Section([completion], True)])
        for split, prompt, completion in problems
    )
    chunks = encoded(documents, tokenizer, ends_texts=True, is_masked=True)
    return Source(described, chunks, True, f"{len(problems):,} problems")


def refuse_tokenizer(config: PrepareConfig, source: str) -> None:
    if config.tokenizer:
        raise InputError(f"tokenizer={config.tokenizer}: {source} has its own; leave it out")


def describe(tokenizer: tokenizers.Tokenizer, source: str, sha256: str) -> dict:
    fields = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json()}
    return fields | {"source": source, "sha256": sha256}


def built_in_text(name: str) -> Path:
    if name not in BUILT_IN:
        raise InputError(
            f"dataset {name!r} needs a text: python prepare.py {name} --input=FILE "
            f"(without one: {', '.join([*BUILT_IN, *arithmetic.CHARS])})"
        )
    if SHAKESPEARE.exists():
        if sha256_of_file(SHAKESPEARE) == SHAKESPEARE_SHA256:
            return SHAKESPEARE
        print(f"{SHAKESPEARE} is not the expected text; downloading it anew", file=sys.stderr)
    advice = f"check the network, put the file at {SHAKESPEARE}, or give a text with --input=FILE"
    download(SHAKESPEARE_URLS, SHAKESPEARE, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256, advice)
    return SHAKESPEARE


def choose_tokenizer(name: str, found: Survey, ends_texts: bool) -> tokenizers.Tokenizer:
    if name == "char":
        return tokenizers.CharTokenizer(found.chars, ends_texts)
    if name == "byte":
        return tokenizers.ByteTokenizer(ends_texts)
    if name == "gpt2":
        return tokenizers.BPETokenizer.gpt2()
    tokenizer = read_tokenizer(Path(name))
    try:
        tokenizer.encode(found.chars)
    except InputError as error:
        raise InputError(f"tokenizer={name}: {error}; --tokenizer=byte lacks nothing") from None
    if ends_texts and tokenizer.end_of_text is None:
        raise InputError(f"tokenizer={name} has no token to end a document with, as is needed here")
    return tokenizer


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """That of a dataset's meta.json, nanoGPT's meta.pkl, a model's folder or a run's."""
    if path.name.endswith("meta.json"):
        return tokenizers.from_json(dataset.read_meta(path).tokenizer, str(path))
    if path.suffix == ".pkl":
        return nanogpt.read_tokenizer(path)
    if not path.is_dir():
        raise InputError(
            f"tokenizer={path}: use char, byte, gpt2, a dataset's meta.json, nanoGPT's meta.pkl, "
            "or the folder of a run or of a Hugging Face model"
        )
    tokenizer = hf_tokenizers.read(path)
    if tokenizer is None:
        from quill.interop import pretrained  # needs torch

        tokenizer = pretrained.from_folder(path).tokenizer
    return tokenizer


def up_to_date(folder: Path, source: Source) -> dataset.Meta | None:
    """The dataset's meta when it was made from the same text with the same tokenizer."""
    try:
        meta = dataset.read_meta(folder / "meta.json")
        if any(getattr(meta, name) != value for name, value in source.described.items()):
            return None
        return dataset.read(folder)[0]  # which reads all of it, for the checksums
    except InputError:
        return None


def tokenize(corpus: Corpus, found: Survey, tokenizer) -> Iterator[tuple]:
    """-> (split, ids, mask) chunks; raises InputError when the corpus is not what was surveyed."""
    documents = split_in_two(corpus, found)
    yield from encoded(documents, tokenizer, not corpus.is_one_text, found.has_prompts)
    if (corpus.n_documents, corpus.n_chars) != (found.n_documents, found.n_chars):
        raise InputError(f"{corpus.files[0]} changed while it was read; run the same command again")


def encoded(documents: Iterable, tokenizer, ends_texts: bool, is_masked: bool) -> Iterator[tuple]:
    """(split, document) pairs -> (split, ids, mask) chunks, encoded on all cores."""
    end = np.array([tokenizer.end_of_text] if ends_texts else [], dtype=np.int32)

    def encode(batch):
        split, parts = batch
        ids = [end if text is None else tokenizer.encode(text) for text, _ in parts]
        mask = None
        if is_masked:
            mask = np.repeat([has_loss for _, has_loss in parts], [*map(len, ids)])
        return split, np.concatenate(ids), mask

    return in_parallel(encode, batches(documents, tokenizer))


def split_in_two(corpus: Corpus, found: Survey) -> Iterator[tuple[str, list[Section]]]:
    """(split, document) pairs: the first 90 % of the documents, or characters of one, are train."""
    documents = corpus.documents("tokenizing")
    if not corpus.is_one_text:
        n_train = int(found.n_documents * TRAIN_SHARE)
        for i, document in enumerate(documents):
            yield ("train" if i < n_train else "val"), document
        return
    pieces = split_text((text for ((texts, _),) in documents for text in texts), found.n_chars)
    for split, group in itertools.groupby(pieces, key=lambda pair: pair[0]):
        yield split, [Section((piece for _, piece in group), has_loss=True)]


def split_text(texts: Iterable[str], n_chars: int) -> Iterator[tuple[str, str]]:
    """(split, piece of text) pairs."""
    left = int(n_chars * TRAIN_SHARE)
    for piece in texts:
        if left > 0:
            yield "train", piece[:left]
        if left < len(piece):
            yield "val", piece[left:]
        left = max(0, left - len(piece))


def batches(documents: Iterable[tuple[str, list[Section]]], tokenizer) -> Iterator[tuple]:
    """(split, parts) of about `BATCH_CHARS`; a part is (text or None at an end, has_loss)."""
    batch, n_chars, latest = [], 0, None
    for split, document in documents:
        if split != latest and batch:
            yield latest, batch
            batch, n_chars = [], 0
        latest = split
        for texts, has_loss in document:
            for text in tokenizer.parts(texts):
                batch.append((text, has_loss))
                n_chars += len(text)
                if n_chars >= BATCH_CHARS:
                    yield split, batch
                    batch, n_chars = [], 0
        batch.append((None, has_loss))
    if batch:
        yield latest, batch


def in_parallel(function, items: Iterable) -> Iterator:
    """`map` on all cores, in order, with a few items under way."""
    n_cores = os.cpu_count() or 1
    under_way = collections.deque()
    with ThreadPoolExecutor(n_cores) as pool:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > 2 * n_cores:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


if __name__ == "__main__":
    run_command(main)
