"""Tokenizers in Hugging Face's form, a tokenizer.json: read it, write one of Quill's, learn one.

There a byte-pair encoding is a vocabulary and a list of merges, and tokens are spelled with one
visible character for each byte, as OpenAI published GPT-2's.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from quill.data.tokenizers import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from quill.errors import InputError, blames_input, needs_extra
from quill.files import open_file

_BYTES = [bytes([b]) for b in range(256)]
# GPT-2's byte encoder: a visible byte is spelled as itself, the others from U+0100 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [b for b in range(256) if b not in _VISIBLE]
_BYTE_ENCODER = [chr(b if b in _VISIBLE else 256 + _OTHERS.index(b)) for b in range(256)]
_BYTE_DECODER = {char: b for b, char in enumerate(_BYTE_ENCODER)}

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_REGEX = {"Regex": r"[\s\S]"}
_EACH_CHARACTER = {"type": "Split", "pattern": _REGEX, "behavior": "Isolated", "invert": False}


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer in a model's folder, or None if there is none.

    Raises `InputError` for a tokenizer that is not one of Quill's.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        spec = read_json(path)
    elif (path := folder / "vocab.json").exists():
        lines = _read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        spec = {"pre_tokenizer": _BYTE_LEVEL, "model": {"vocab": read_json(path), "merges": merges}}
    else:
        return None
    try:
        is_char = spec["model"].get("type") == "WordLevel"
        return _char_tokenizer(spec) if is_char else _bpe_tokenizer(spec)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        kind = type(error).__name__
        raise InputError(f"{path}: not a tokenizer that Quill has ({kind}: {error})") from None


def read_json(path: Path) -> dict:
    """A JSON object; raises `InputError` when the file does not hold one."""
    with blames_input(f"{path} is not JSON, or damaged", ValueError, RecursionError):
        contents = json.loads(_read_text(path))
    if not isinstance(contents, dict):
        raise InputError(f"{path} is not a JSON object")
    return contents


def _read_text(path: Path) -> str:
    with open_file(path) as file:
        try:
            return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 at byte {error.start}") from None


def _char_tokenizer(spec: dict) -> CharTokenizer:
    vocab = spec["model"]["vocab"]
    text = "".join(sorted(vocab, key=vocab.get))
    tokenizer = CharTokenizer(text.removesuffix(END_OF_TEXT), text.endswith(END_OF_TEXT))
    if specification(tokenizer) != spec:
        raise ValueError("of words, not as Quill writes one of characters")
    return tokenizer


def _bpe_tokenizer(spec: dict) -> BPETokenizer | ByteTokenizer:
    _refuse_other_rules(spec)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    vocab = spec["model"]["vocab"] | added
    merges = [m if type(m) is str else " ".join(m) for m in spec["model"]["merges"]]
    names = sorted(vocab, key=vocab.get)
    if [vocab[name] for name in names] != [*range(len(names))]:
        raise ValueError("its ids are not 0, 1, 2 and so on")
    n_ordinary = len(_BYTES) + len(merges)
    ordinary, special = names[:n_ordinary], names[n_ordinary:]
    if not added.keys() <= {*special} or not {*"".join(ordinary)} <= _BYTE_DECODER.keys():
        raise ValueError("its special tokens are not the last, or the others not of bytes")
    tokens = [*map(_bytes_of, ordinary)]
    tokenizer = BPETokenizer(tokens, special)
    if merges_of(tokens) != merges:
        raise ValueError("its merges are not in the order of its ids")
    if tokens == _BYTES and special in ([], [END_OF_TEXT]):
        return ByteTokenizer(bool(special))
    return tokenizer


def _refuse_other_rules(spec: dict) -> None:
    """Raise ValueError for rules that would give a text other ids than GPT-2's do."""
    model, split = spec["model"], spec.get("pre_tokenizer") or {}
    post = (spec.get("post_processor") or _BYTE_LEVEL)["type"]
    if post == "TemplateProcessing" and not spec["post_processor"]["special_tokens"]:
        post = "ByteLevel"  # neither adds a token
    for name, value, needed in [
        ("its model", model.get("type", "BPE"), "BPE"),
        ("its normalizer", spec.get("normalizer"), None),
        ("its pre_tokenizer", split.get("type"), "ByteLevel"),
        ("add_prefix_space", split.get("add_prefix_space", True), False),
        ("use_regex", split.get("use_regex", True), True),
        ("its post_processor", post, "ByteLevel"),
        ("truncation", spec.get("truncation"), None),
        ("ignore_merges", model.get("ignore_merges", False), False),
        ("dropout", model.get("dropout") or None, None),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix") or "", ""),
        ("end_of_word_suffix", model.get("end_of_word_suffix") or "", ""),
    ]:
        if value != needed:
            raise ValueError(f"{name} is {value!r:.80}, not {needed!r}")


def specification(tokenizer: Tokenizer) -> dict:
    """The contents of a tokenizer.json that gives every text the ids of `encode_prompt`.

    Raises ValueError where merging pairs of tokens does not make all the longer ones.
    """
    special = [] if tokenizer.end_of_text is None else [END_OF_TEXT]
    if isinstance(tokenizer, CharTokenizer):
        names, split, decoder = [*tokenizer.chars], _EACH_CHARACTER, {"type": "Fuse"}
        # <unk> is not in the vocabulary, so an unknown character is an error.
        model = {"type": "WordLevel", "unk_token": "<unk>"}
    else:
        tokens = _BYTES
        if isinstance(tokenizer, BPETokenizer):
            tokens, special = tokenizer.tokens, tokenizer.special
        elif not isinstance(tokenizer, ByteTokenizer):
            raise ValueError(f"a {type(tokenizer).__name__} has no form in a tokenizer.json")
        names = [_spelled(token) for token in tokens]
        split, decoder = _BYTE_LEVEL, _BYTE_LEVEL
        model = {"type": "BPE", "merges": merges_of(tokens)}
    model["vocab"] = {name: i for i, name in enumerate(names + special)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": model["vocab"][name], "content": name, **flags, "special": True}
            for name in special
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def merges_of(tokens: list[bytes]) -> list[str]:
    """For each longer token, the two parts left when only lower ids have merged: 'Ġ t' and so on.

    Raises ValueError when more than two parts are left.
    """
    rank, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [a + b for a, b in itertools.pairwise(parts)]
            ranks = [rank.get(pair, len(tokens)) for pair in pairs]
            i = ranks.index(min(ranks))
            if ranks[i] > rank[token]:
                raise ValueError(f"no merges make its token {token!r}")
            parts[i : i + 2] = [pairs[i]]
        if len(parts) == 2:
            merges.append(" ".join(_spelled(part) for part in parts))
    return merges


def _spelled(token: bytes) -> str:
    return "".join(_BYTE_ENCODER[b] for b in token)


def _bytes_of(name: str) -> bytes:
    return bytes(_BYTE_DECODER[letter] for letter in name)


def learn_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn the merges of pairs (Sennrich et al. 2016) that are the most frequent in the texts.

    The tokens are the 256 bytes, then the merged ones, and END_OF_TEXT. Raises InputError for
    another vocab_size than 257 to the number of tokens that these texts can fill.
    """
    with needs_extra("hf"):
        import tokenizers
    n_merged = vocab_size - len(_BYTES) - 1
    if n_merged < 0:
        raise InputError(
            f"tokenizer=bpe:{vocab_size}: 256 bytes and {END_OF_TEXT} are 257 tokens; use bpe:257 "
            "or more"
        )
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    learner.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    merged = [_bytes_of(name) for name in sorted(vocab, key=vocab.get) if len(name) > 1]
    if len(merged) < n_merged:
        raise InputError(
            f"tokenizer=bpe:{vocab_size}: the text has only {len(merged):,} pairs that occur twice "
            f"or more; use bpe:{len(_BYTES) + len(merged) + 1} or less"
        )
    return BPETokenizer(_BYTES + merged, [END_OF_TEXT])
