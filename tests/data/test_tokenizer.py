from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO
from hypothesis import given
from hypothesis import strategies as st

from quill.data import tokenizers
from quill.errors import InputError

texts = st.text(min_size=1)  # any Unicode but lone surrogates


EVERY_BYTE = [bytes([b]) for b in range(256)]


def tiny_bpe() -> tokenizers.BPETokenizer:
    """Every byte and a few merges, so that no download is needed."""
    merges = [b"th", b"the", b" t", b" the", b"in", b"ing", b"\n\n", "é".encode()]
    return tokenizers.BPETokenizer(EVERY_BYTE + merges, ["<|endoftext|>"])


def chars_of(text: str) -> tokenizers.CharTokenizer:
    return tokenizers.CharTokenizer("".join(sorted(set(text))))


@given(texts)
def test_char_round_trip_through_json(text):
    spec = json.loads(json.dumps(chars_of(text).to_json()))
    tokenizer = tokenizers.from_json(spec, "here")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and ids.max() < tokenizer.vocab_size == len(set(text))
    assert tokenizers.decode(tokenizer, ids.tolist()) == text


@given(texts)
def test_byte_round_trip(text):
    tokenizer = tokenizers.from_json({"kind": "byte"}, "here")
    assert tokenizers.decode(tokenizer, tokenizer.encode(text).tolist()) == text


@given(texts)
def test_bpe_round_trip_through_json(text):
    spec = json.loads(json.dumps(tiny_bpe().to_json()))
    tokenizer = tokenizers.from_json(spec, "here")
    assert tokenizers.decode(tokenizer, tokenizer.encode(text).tolist()) == text


def test_bpe_uses_merges_and_takes_special_tokens_as_text():
    tokenizer = tiny_bpe()
    assert tokenizer.encode(" the").tolist() == [259]
    assert tokenizer.encode("<|endoftext|>").max() < 264


@given(st.lists(st.text(alphabet="the ing\n\t é.1", max_size=30), max_size=20), st.integers(1, 9))
def test_bpe_in_pieces_equals_bpe_of_the_whole(texts, piece_chars):
    tokenizer = tiny_bpe()
    tokenizer._PART_CHARS = piece_chars
    whole = tokenizer.encode("".join(texts)).tolist()
    parts = [tokenizer.encode(part) for part in tokenizer.parts(texts)]
    assert np.concatenate(parts).tolist() == whole


@given(texts, st.sampled_from(["byte", "bpe", "char"]))
def test_streamed_text_equals_decoded_text(text, kind):
    tokenizer = {"byte": tokenizers.ByteTokenizer(), "bpe": tiny_bpe(), "char": chars_of(text)}[
        kind
    ]
    stream = tokenizers.StreamDecoder(tokenizer)
    parts = [stream.feed([token]) for token in tokenizer.encode(text).tolist()]
    assert "".join(parts) + stream.finish() == text


@given(st.binary())
def test_streamed_bytes_that_are_not_utf8_become_replacement_characters(data):
    tokenizer = tokenizers.ByteTokenizer()
    stream = tokenizers.StreamDecoder(tokenizer)
    streamed = "".join(stream.feed([byte]) for byte in data) + stream.finish()
    assert streamed == tokenizers.decode(tokenizer, data)


def test_unknown_characters_are_named_and_counted():
    with pytest.raises(InputError, match=r"3 characters lacks '\\n' \(U\+000A\), 'é'.*3 of 5"):
        chars_of("abc").encode("aé\néb")


def test_a_character_above_and_below_the_known_ones_is_unknown():
    tokenizer = chars_of("bd")
    for char in ("a", "c", "e", "\U0010ffff"):
        with pytest.raises(InputError):
            tokenizer.encode(char)


@pytest.mark.parametrize(
    "tokenizer",
    [tokenizers.CharTokenizer("<>|abc", True), tokenizers.ByteTokenizer(True), tiny_bpe()],
)
def test_the_end_of_a_text_is_one_token_in_a_prompt_and_ordinary_elsewhere(tokenizer):
    end = tokenizer.end_of_text
    again = tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json())), "here")
    assert again.end_of_text == end == tokenizer.vocab_size - 1
    prompt = tokenizers.encode_prompt(tokenizer, "a<|endoftext|>bc<|endoftext|>")
    a, bc = tokenizer.encode("a").tolist(), tokenizer.encode("bc").tolist()
    assert prompt.tolist() == [*a, end, *bc, end]
    assert tokenizers.decode(tokenizer, prompt.tolist()) == "a<|endoftext|>bc<|endoftext|>"
    without = tokenizers.ByteTokenizer()
    assert len(tokenizers.encode_prompt(without, "<|endoftext|>")) == 13


WORDS = tokenizers.BPETokenizer(EVERY_BYTE, []).to_json()["tokens"]


@pytest.mark.parametrize(
    "spec",
    [
        None,
        [],
        {},
        {"kind": "morse"},
        {"kind": "char"},
        {"kind": "char", "chars": ""},
        {"kind": "char", "chars": "aba"},
        {"kind": "char", "chars": "ab", "ends_texts": 1},
        {"kind": "char", "chars": ["a", "b"]},
        {"kind": "char", "chars": 7},
        {"kind": "gpt2", "special": []},
        {"kind": "gpt2", "tokens": "!", "special": []},
        {"kind": "gpt2", "tokens": "YQ==", "special": []},
        {"kind": "gpt2", "tokens": WORDS + " YQ==", "special": []},
        {"kind": "gpt2", "tokens": WORDS + " ", "special": []},
        {"kind": "gpt2", "tokens": WORDS, "special": ["a", "a"]},
        {"kind": "gpt2", "tokens": WORDS, "special": {"a": 10**12}},
        {"kind": "gpt2", "tokens": WORDS, "special": [7]},
    ],
)
def test_foreign_json_is_refused(spec):
    with pytest.raises(InputError, match=r"meta\.json: no usable tokenizer"):
        tokenizers.from_json(spec, "meta.json")


gpt2_cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", REPO.parent / "shared/tiktoken"))


@pytest.mark.skipif(not gpt2_cache.is_dir(), reason="needs GPT-2's files in TIKTOKEN_CACHE_DIR")
def test_gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    tokenizer = tokenizers.BPETokenizer.gpt2()
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    again = tokenizers.from_json(tokenizer.to_json(), "here")
    assert (
        again.encode("Hello, wörld <|endoftext|>").tolist()
        == tokenizer.encode("Hello, wörld <|endoftext|>").tolist()
    )
