from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO, is_one_error_line

import prepare
from quill.data import corpus, dataset_files, download, encode, tokenizers

SHARED_TEXT = REPO.parent / "shared/data/tinyshakespeare.txt"
GPT2_CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR", REPO.parent / "shared/tiktoken"))


def decoded(folder: Path) -> tuple[str, str]:
    meta, data = dataset_files.read(folder)
    tokenizer = tokenizers.from_json(meta.tokenizer, "meta")
    return tuple(tokenizers.decode(tokenizer, data[name].tolist()) for name in dataset_files.SPLITS)


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("chunk_bytes", [7, 1 << 22])  # 7 cuts characters in two
def test_own_text_decodes_back_split_at_90_percent(
    folder, text, call, monkeypatch, kind, chunk_bytes
):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    text = text[:2000] + "\r\nend"
    Path("in.txt").write_bytes(text.encode())
    code, out, err = call("prepare", "mine", "--input=in.txt", f"--tokenizer={kind}")
    assert (code, err) == (0, "")
    n_train = int(len(text) * 0.9)
    assert decoded(folder / "data/mine") == (text[:n_train], text[n_train:])
    meta = dataset_files.read_meta(folder / "data/mine/meta.json")
    assert meta.sha256 == hashlib.sha256(text.encode()).hexdigest()
    for fact in (
        f"{len(text):,} characters",
        f"vocabulary {meta.vocab_size}",
        "uint16",
        "data/mine",
    ):
        assert fact in out


def test_again_says_up_to_date_and_a_change_is_prepared_anew(folder, call):
    Path("in.txt").write_text("hello world, how are you")
    argv = ("prepare", "mine", "--input=in.txt")
    assert call(*argv)[1].startswith("made ")
    made = (folder / "data/mine/train.bin").stat().st_mtime_ns
    assert call(*argv)[1].startswith("up to date: ")
    assert (folder / "data/mine/train.bin").stat().st_mtime_ns == made
    prepare_anew(call, *argv, "--tokenizer=byte")
    Path("in.txt").write_text("hello world, how are we")
    prepare_anew(call, *argv, "--tokenizer=byte")
    (folder / "data/mine/val.bin").write_bytes(b"")
    prepare_anew(call, *argv, "--tokenizer=byte")


def test_a_text_is_not_replaced_by_its_own_dataset(folder, call):
    Path("data/own").mkdir(parents=True)
    Path("data/own/val.bin").write_text("a text of some words " * 20)
    argv = ["own", "--input=data/own/val.bin", "--overwrite=true"]
    code, _, err = call("prepare", *argv)
    assert code == 2 and is_one_error_line(err) and "is a file of the dataset" in err
    assert Path("data/own/val.bin").read_text().startswith("a text")


def prepare_anew(call, *argv):
    """It takes --overwrite=true where there is another dataset, or a damaged one."""
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    code, _, err = call(*argv)
    assert code == 2 and is_one_error_line(err) and "or replace it by --overwrite=true" in err
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before
    assert call(*argv, "--overwrite=true")[1].startswith("made ")
    assert call(*argv)[1].startswith("up to date: ")


@pytest.mark.parametrize("input", ["texts/pairs.jsonl", "texts", "texts/*"])
def test_the_same_bytes_of_another_kind_are_another_dataset(folder, call, input):
    """A file of JSON lines taken for text, then renamed."""
    lines, text = Path("texts/pairs.jsonl"), Path("pairs.txt")
    lines.parent.mkdir()
    lines.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 40)
    assert call("prepare", "first", f"--input={input}", "--tokenizer=byte")[0] == 0
    tokenizer = "--tokenizer=data/first/meta.json"
    lines.rename(text)
    assert call("prepare", "mine", "--input=pairs.txt", tokenizer)[0] == 0
    text.rename(lines)
    prepare_anew(call, "prepare", "mine", f"--input={input}", tokenizer)


def test_another_datasets_tokenizer_is_reused(folder, call):
    Path("a.txt").write_text("abcdefghij")
    Path("b.txt").write_text("jihgfedcba" * 3)
    Path("c.txt").write_text("abcXYZX" * 3)
    call("prepare", "a", "--input=a.txt")
    code, _, _ = call("prepare", "b", "--input=b.txt", "--tokenizer=data/a/meta.json")
    assert code == 0 and dataset_files.read(folder / "data/b")[1]["train"][:3].tolist() == [9, 8, 7]
    code, _, err = call("prepare", "c", "--input=c.txt", "--tokenizer=data/a/meta.json")
    assert code == 2 and "'X' (U+0058), 'Y' (U+0059), 'Z' (U+005A)" in err
    assert not Path("data/c").exists()


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_vocabulary_of_its_own_is_learned_from_the_train_split(folder, call, text, suffix):
    pytest.importorskip("tokenizers")
    parts = [*(text[i : i + 1000] for i in range(0, 9000, 1000)), "zygote zygote zygote " * 50]
    written = "".join(parts)
    if suffix == "jsonl":
        written = "".join(json.dumps({"text": part}) + "\n" for part in parts)
    Path(f"in.{suffix}").write_text(written)
    argv = ["mine", f"--input=in.{suffix}", "--tokenizer=bpe:300"]
    code, out, _ = call("prepare", *argv)
    assert code == 0 and "vocabulary 300, " in out
    meta = dataset_files.read_meta(folder / "data/mine/meta.json")
    tokenizer = tokenizers.from_json(meta.tokenizer, "meta")
    assert b" queen" in tokenizer.tokens
    assert not any(b"zy" in token for token in tokenizer.tokens)
    assert tokenizer.end_of_text == 299
    train, val = decoded(folder / "data/mine")
    assert (train + val).replace(tokenizers.END_OF_TEXT, "") == "".join(parts)
    assert call("prepare", *argv)[1].startswith("up to date: ")
    code, _, err = call("prepare", "more", *argv[1:-1], "--tokenizer=bpe:9999")
    assert code == 2 and is_one_error_line(err)
    most = re.search("use (bpe:[0-9]+) or less", err)[1]
    assert call("prepare", "more", *argv[1:-1], f"--tokenizer={most}")[0] == 0
    assert call("prepare", "less", *argv[1:-1], "--tokenizer=bpe:256")[0] == 2


def test_tokens_are_learned_from_a_sample_of_a_long_text(folder, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tokenizers.BPETokenizer, "_PART_CHARS", 1000)
    words = "".join(f"word{i} " for i in range(10_000))
    Path("in.txt").write_text(words)
    text = corpus.Corpus("in.txt")
    pieces = [*encode.train_sample(text, corpus.survey(text), n_chars=20_000)]
    numbers = [int(n) for n in re.findall(r"word(\d{4})\b", "".join(pieces))]
    assert 17_000 < sum(map(len, pieces)) < 20_000
    assert max(numbers) < 9100 and max(np.diff(sorted(numbers))) < 700
    assert (
        "".join(encode.train_sample(text, corpus.survey(text), 10**6))
        == words[: len(words) * 9 // 10]
    )


@pytest.mark.parametrize(
    ("data", "argv", "complaint"),
    [
        (None, ["mine", "--input=in.txt"], "in.txt: No such file"),
        (b"", ["mine", "--input=in.txt"], "in.txt: empty"),
        (b"a", ["mine", "--input=in.txt"], "cannot be split"),
        (b"abc\xe9def", ["mine", "--input=in.txt"], "not UTF-8: byte 3"),
        (b"x" * 5000 + b"\xff", ["mine", "--input=in.txt"], "byte 5,000"),
        (b"abcde\xe2\x82", ["mine", "--input=in.txt"], "not UTF-8: byte 5"),
        (b"abc", ["mine"], "needs a text"),
        (b"abc", ["../mine", "--input=in.txt"], "plain folder name"),
        (b"abc", ["..", "--input=in.txt"], "plain folder name"),
        (b"abc", ["a/b", "--input=in.txt"], "plain folder name"),
        (b"abc", ["--dataset=", "--input=in.txt"], "plain folder name"),
        (b"abc", ["mine", "--input=in.txt", "--tokenizer=words"], "use char, byte, gpt2"),
        (b"abc", ["mine", "--input=in.txt", "--tokenizer=x/meta.json"], "x/meta.json: No such"),
        (b"abc", ["mine", "--input=*.md"], "no file matches"),
        (b"abc", ["mine", "--input=/dev/null"], "not a regular file"),
        (b"abc", ["mine", "yours", "--input=in.txt"], "one dataset at a time"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    folder, call, monkeypatch, data, argv, complaint
):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 6)
    if data is not None:
        Path("in.txt").write_bytes(data)
    code, out, err = call("prepare", *argv)
    assert (code, out) == (2, "") and is_one_error_line(err) and complaint in err
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_keeps_the_dataset(folder, call, full_disk):
    Path("in.txt").write_text("hello world, how are you")
    call("prepare", "mine", "--input=in.txt")
    before = decoded(folder / "data/mine")
    Path("in.txt").write_text("hello world, how are we")
    full_disk("data/mine/train.bin")
    code, _, err = call("prepare", "mine", "--input=in.txt", "--overwrite=true")
    assert code == 1 and is_one_error_line(err) and "No space left" in err and "data/mine" in err
    assert decoded(folder / "data/mine") == before


def test_without_a_network_the_error_names_the_ways_on(folder, call, monkeypatch):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URLS", ("http://127.0.0.1:9/x",))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    code, _, err = call("prepare")
    assert code == 1 and is_one_error_line(err)
    assert "--input=FILE" in err and "data/tinyshakespeare.txt" in err


def test_a_text_put_in_place_is_used_and_a_wrong_one_is_not(folder, call, monkeypatch):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URLS", ("http://127.0.0.1:9/x",))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    body = b"To be, or not to be"
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    Path("data").mkdir()
    Path("data/tinyshakespeare.txt").write_bytes(b"something else")
    assert call("prepare")[0] == 1
    Path("data/tinyshakespeare.txt").write_bytes(body)
    assert call("prepare")[0] == 0
    assert "".join(decoded(folder / "data/shakespeare_char")).encode() == body


def test_a_file_that_changes_while_it_is_read_is_refused(folder, call, monkeypatch):
    Path("in.txt").write_text("hello world, how are you")
    survey = prepare.survey

    def then_grow(texts):
        found = survey(texts)
        with texts.files[0].open("a") as file:
            file.write(" you")
        return found

    monkeypatch.setattr(prepare, "survey", then_grow)
    code, _, err = call("prepare", "mine", "--input=in.txt")
    assert code == 2 and "changed while it was read" in err and not list(folder.rglob("*.bin"))


@pytest.mark.skipif(
    not GPT2_CACHE.is_dir() or not SHARED_TEXT.exists(), reason="needs GPT-2's files"
)
def test_tiny_shakespeare_in_gpt2_tokens(folder, call, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    assert call("prepare", "shakespeare", f"--input={SHARED_TEXT}")[0] == 0
    meta = dataset_files.read_meta(Path("data/shakespeare/meta.json"))
    assert (meta.train_tokens, meta.val_tokens, meta.vocab_size) == (301_966, 36_059, 50257)


@pytest.mark.skipif(not SHARED_TEXT.exists(), reason="needs Tiny Shakespeare beside the checkout")
def test_tiny_shakespeare(folder, call):
    assert call("prepare", f"--input={SHARED_TEXT}")[0] == 0
    meta = json.loads(Path("data/shakespeare_char/meta.json").read_text())
    counts = [meta["train_tokens"], meta["val_tokens"], meta["vocab_size"], meta["dtype"]]
    assert counts == [1_003_854, 111_540, 65, "uint16"]
    assert meta["sha256"] == prepare.SHAKESPEARE_SHA256
    assert "".join(decoded(folder / "data/shakespeare_char")) == SHARED_TEXT.read_text()
    assert np.fromfile("data/shakespeare_char/train.bin", dtype="<u2")[:5].tolist() == [
        18,
        47,
        56,
        57,
        58,
    ]  # "First"
