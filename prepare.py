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

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quill import settings
from quill.data import dataset_files, problems, tokenizers
from quill.data.corpus import Corpus, Section, Survey, survey
from quill.data.encode import encode_corpus, encode_documents, train_sample
from quill.errors import InputError, print_note, run_command
from quill.files import dataset_folder, file_lock, sha256_of_file
from quill.interop import hf_tokenizers, nanogpt
from quill.settings import option

SHAKESPEARE = Path("data/tinyshakespeare.txt")
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
CHARS_TO_LEARN_FROM = 100_000_000  # by --tokenizer=bpe:SIZE; of a longer corpus, a sample
BUILT_IN = {"shakespeare_char": "char", "shakespeare": "gpt2"}  # dataset -> tokenizer


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    dataset: str = option("shakespeare_char", "folder to make below data/")
    input: str = option("", "text to use: a file, a folder or a pattern; nothing is downloaded")
    tokenizer: str = option(
        "", "char, byte, gpt2, bpe:SIZE (of its own), or a meta.json, meta.pkl or folder with one"
    )
    overwrite: bool = option(
        False, "replace a dataset of that name which is made of something else"
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """What a dataset is made of."""

    described: dict  # the fields of dataset_files.Meta that are known already
    chunks: Iterable[tuple]  # for dataset_files.write
    is_masked: bool
    facts: str  # for the line that is printed at the end


def main(argv: list[str]) -> int:
    config = settings.load(PrepareConfig, argv, usage=__doc__, positional="dataset")
    folder = dataset_folder(config.dataset)
    make = from_text
    if config.dataset in problems.CHARS and not config.input:
        make = from_problems
    elif config.input.endswith(".pkl"):
        make = from_nanogpt
    if config.tokenizer and make != from_text:
        given = config.input or config.dataset
        raise InputError(f"tokenizer={config.tokenizer}: {given} has its own; leave it out")
    if os.path.realpath(config.input) in map(os.path.realpath, dataset_files.paths(folder)):
        raise InputError(f"input={config.input} is a file of the dataset that would be made of it")
    source = make(config)
    with file_lock(folder):
        meta = up_to_date(folder, source, config.overwrite)
        done = "up to date:" if meta else "made"
        if meta is None:
            meta = dataset_files.write(folder, source.chunks, source.is_masked, **source.described)
    size = (meta.train_tokens + meta.val_tokens) * np.dtype(meta.dtype).itemsize
    print(
        f"{done} {folder}/: {source.facts}, vocabulary {meta.vocab_size:,}, {meta.train_tokens:,} "
        f"train + {meta.val_tokens:,} val tokens, {size:,} bytes of {meta.dtype}"
    )
    return 0


def from_text(config: PrepareConfig) -> Source:
    name = config.input or str(built_in_text(config.dataset))
    corpus = Corpus(name)
    found = survey(corpus)
    unit = "character" if corpus.is_one_text else "document"
    if (found.n_chars if corpus.is_one_text else found.n_documents) == 1:
        raise InputError(f"{name}: one {unit} cannot be split into train and val")
    kind = config.tokenizer or BUILT_IN.get(config.dataset, "char")
    tokenizer = choose_tokenizer(kind, corpus, found)
    source = corpus.files[0] if len(corpus.files) == 1 else Path(name)
    described = describe(tokenizer, source.name, found.sha256)
    facts = f"{found.n_chars:,} characters ({len(found.chars)} distinct) of {name}"
    if not corpus.is_one_text:
        facts += f", {found.n_documents:,} documents"
    return Source(described, encode_corpus(corpus, found, tokenizer), found.has_prompts, facts)


def from_nanogpt(config: PrepareConfig) -> Source:
    path = Path(config.input)
    tokenizer = nanogpt.read_tokenizer(path)
    chunks, sha256 = nanogpt.read_bins(path.parent, tokenizer.vocab_size)
    described = describe(tokenizer, path.parent.name, sha256)
    return Source(described, chunks, False, f"the dataset of {path}")


def from_problems(config: PrepareConfig) -> Source:
    made = [*problems.problems(config.dataset)]
    tokenizer = problems.tokenizer_of(config.dataset)
    sha256 = hashlib.sha256("\n".join(map(" ".join, made)).encode()).hexdigest()
    described = describe(tokenizer, config.dataset, sha256)
    described["tokenizer"]["reverses_answers"] = True
    documents = (
        (split, [Section([prompt], has_loss=False), Section([completion], has_loss=True)])
        for split, prompt, completion in made
    )
    chunks = encode_documents(documents, tokenizer, ends_texts=True)
    return Source(described, chunks, True, f"{len(made):,} problems")


def describe(tokenizer: tokenizers.Tokenizer, source: str, sha256: str) -> dict:
    fields = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json()}
    return fields | {"source": source, "sha256": sha256}


def built_in_text(name: str) -> Path:
    if name not in BUILT_IN:
        raise InputError(
            f"dataset {name!r} needs a text: python prepare.py {name} --input=FILE "
            f"(without one: {', '.join([*BUILT_IN, *problems.CHARS])})"
        )
    if SHAKESPEARE.exists():
        if sha256_of_file(SHAKESPEARE) == SHAKESPEARE_SHA256:
            return SHAKESPEARE
        print_note(f"{SHAKESPEARE} is not the expected text; downloading it again")
    from quill.data.download import download  # here, because it takes 0.1 s to import requests

    advice = f"check the network, put the file at {SHAKESPEARE}, or give a text with --input=FILE"
    download(SHAKESPEARE_URLS, SHAKESPEARE, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256, advice)
    return SHAKESPEARE


def choose_tokenizer(name: str, corpus: Corpus, found: Survey) -> tokenizers.Tokenizer:
    ends_texts = not corpus.is_one_text
    if name == "char":
        return tokenizers.CharTokenizer(found.chars, ends_texts)
    if name == "byte":
        return tokenizers.ByteTokenizer(ends_texts)
    if name == "gpt2":
        return tokenizers.BPETokenizer.gpt2()
    if learned := re.fullmatch("bpe:([0-9]{1,7})", name):
        texts = train_sample(corpus, found, CHARS_TO_LEARN_FROM)
        return hf_tokenizers.learn_bpe(texts, vocab_size=int(learned[1]))
    tokenizer = read_tokenizer(Path(name))
    try:
        tokenizer.encode(found.chars)
    except InputError as error:
        raise InputError(f"tokenizer={name}: {error}; --tokenizer=byte lacks nothing") from None
    if ends_texts and tokenizer.end_of_text is None:
        raise InputError(f"tokenizer={name} has no token to end a document with, as is needed here")
    return tokenizer


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """From a dataset's meta.json, nanoGPT's meta.pkl, or the folder of a model or a run."""
    if path.name.endswith("meta.json"):
        return tokenizers.from_json(dataset_files.read_meta(path).tokenizer, str(path))
    if path.suffix == ".pkl":
        return nanogpt.read_tokenizer(path)
    if not path.is_dir():
        raise InputError(
            f"tokenizer={path}: use char, byte, gpt2, bpe:4096 (or another size), a dataset's "
            "meta.json, nanoGPT's meta.pkl, or the folder of a run or of a Hugging Face model"
        )
    if tokenizer := hf_tokenizers.read(path):
        return tokenizer
    from quill.interop import pretrained  # here, because it imports torch: over a second

    return pretrained.from_folder(path).tokenizer


def up_to_date(folder: Path, source: Source, overwrite: bool) -> dataset_files.Meta | None:
    """The dataset's meta, if it was made from the same text with the same tokenizer, else None.

    Raises InputError where there is another dataset, or a damaged one, unless it may be replaced.
    """
    try:
        meta, _ = dataset_files.read(folder)  # compares the checksums of all files
        new = source.described
        # A .txt that was renamed to .jsonl has the same bytes, but other documents. (Where there
        # are several files, the hash is of their kinds as well.)
        is_of_kind = (".jsonl" in meta.source) == (".jsonl" in new["source"])
        if is_of_kind and (meta.sha256, meta.tokenizer) == (new["sha256"], new["tokenizer"]):
            return meta
        found = f"another dataset, of {meta.source} with a vocabulary of {meta.vocab_size:,}"
    except InputError:
        found = "a dataset that is damaged, or not one of this Quill"
    if not overwrite and any((folder / f"{split}.bin").exists() for split in dataset_files.SPLITS):
        raise InputError(
            f"{folder} holds {found}: choose another name, or replace it by --overwrite=true"
        )
    return None


if __name__ == "__main__":
    run_command(main)
