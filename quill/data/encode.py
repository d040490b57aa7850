"""From documents to chunks of token ids, on all cores and with bounded memory."""

import collections
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from quill.data.corpus import Corpus, Section, Survey
from quill.data.tokenizers import BPETokenizer, Tokenizer
from quill.errors import InputError

BATCH_CHARS = 1 << 18  # encoded at once, by one core
TRAIN_FRACTION = 0.9

Document = list[Section]


def encode_corpus(corpus: Corpus, found: Survey, tokenizer: Tokenizer) -> Iterator[tuple]:
    """-> (split, ids, mask) chunks; raises InputError if the corpus has changed since `found`."""
    documents = split_corpus(corpus, found, "tokenizing")
    yield from encode_documents(documents, tokenizer, ends_texts=not corpus.is_one_text)
    if (corpus.n_documents, corpus.n_chars) != (found.n_documents, found.n_chars):
        raise InputError(f"{corpus.files[0]} changed while it was read; run the same command again")


def train_sample(corpus: Corpus, found: Survey, n_chars: int) -> Iterator[str]:
    """The texts of the train split; of more than n_chars, pieces spread evenly over all of it."""
    n_seen = n_kept = 0
    for split, document in split_corpus(corpus, found, "learning tokens from"):
        if split == "val":
            return
        for section in document:
            for text in BPETokenizer.parts(section.texts):
                if n_kept * found.n_chars <= n_seen * n_chars:
                    n_kept += len(text)
                    yield text
                n_seen += len(text)


def split_corpus(corpus: Corpus, found: Survey, doing: str) -> Iterator[tuple[str, Document]]:
    """(split, document) pairs: the first 90 % of the documents, or characters of one, are train."""
    documents = corpus.documents(doing)
    if not corpus.is_one_text:
        n_train = int(found.n_documents * TRAIN_FRACTION)
        for i, document in enumerate(documents):
            yield ("train" if i < n_train else "val"), document
        return
    texts = (text for (section,) in documents for text in section.texts)
    pieces = split_text(texts, int(found.n_chars * TRAIN_FRACTION))
    for split, group in itertools.groupby(pieces, key=lambda pair: pair[0]):
        yield split, [Section((piece for _, piece in group), has_loss=True)]


def split_text(texts: Iterable[str], n_train: int) -> Iterator[tuple[str, str]]:
    """One text in pieces -> (split, piece) pairs; the first n_train characters are train."""
    for piece in texts:
        if n_train > 0:
            yield "train", piece[:n_train]
        if n_train < len(piece):
            yield "val", piece[n_train:]
        n_train = max(0, n_train - len(piece))


def encode_documents(
    documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer, ends_texts: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(split, document) pairs -> (split, ids, mask) chunks in the same order.

    ends_texts: put the tokenizer's end_of_text behind each document.
    """
    end = np.array([tokenizer.end_of_text] if ends_texts else [], dtype=np.int32)

    def encode(batch):
        split, parts = batch
        ids = [end if text is None else tokenizer.encode(text) for text, _ in parts]
        mask = np.repeat([has_loss for _, has_loss in parts], [*map(len, ids)])
        return split, np.concatenate(ids), mask

    return map_in_parallel(encode, batches(documents, tokenizer))


def batches(documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer) -> Iterator[tuple]:
    """(split, parts) of about `BATCH_CHARS`; a part is (text or None at an end, has_loss)."""
    for split, group in itertools.groupby(documents, key=lambda pair: pair[0]):
        batch, n_chars = [], 0
        for _, document in group:
            for texts, has_loss in document:
                for text in tokenizer.parts(texts):
                    batch.append((text, has_loss))
                    n_chars += len(text)
                    if n_chars >= BATCH_CHARS:
                        yield split, batch
                        batch, n_chars = [], 0
            batch.append((None, has_loss))
        yield split, batch


def map_in_parallel(function, items: Iterable) -> Iterator:
    """`map` on all cores, in order; few items are read ahead, which bounds the memory."""
    n_cores = os.cpu_count() or 1
    results = collections.deque()
    with ThreadPoolExecutor(n_cores) as pool:
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > 2 * n_cores:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
