"""Folders, patterns, packed files, tables, prompts with answers: read by prepare.py."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import is_one_error_line
from hypothesis import given
from hypothesis import strategies as st

from quill.data import corpus, dataset_files, encode, tokenizers
from quill.errors import InputError

END = tokenizers.END_OF_TEXT
DOCUMENTS = ["the first", "ein zweites, naïve", "third\nof two lines", *"abcdefg"]


def jsonl(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def decoded(folder: str) -> tuple[str, str]:
    meta, data = dataset_files.read(Path(folder))
    tokenizer = tokenizers.from_json(meta.tokenizer, "meta")
    return tuple(tokenizers.decode(tokenizer, data[name].tolist()) for name in dataset_files.SPLITS)


def write_texts(folder: Path, documents: list[str]) -> None:
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:04}.txt").write_bytes(text.encode())


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("form", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "mixed"])
def test_documents_are_split_whole_and_end_with_their_own_token(folder, call, kind, form):
    records = [{"text": text, "id": i} for i, text in enumerate(DOCUMENTS)]
    Path("in").mkdir()
    if form == "mixed":
        Path("in/a.jsonl").write_bytes(jsonl(records[:4]) + b"\n" + jsonl([{"text": ""}]))
        Path("in/b.txt").write_bytes(DOCUMENTS[4].encode())
        Path("in/c.jsonl.gz").write_bytes(gzip.compress(jsonl(records[5:])))
        Path("in/notes.md").write_text("not one of the texts")
        Path("in/.hidden.txt").write_text("neither")
        Path("in/empty.txt").touch()
        Path("in/z.txt.gz").write_bytes(gzip.compress(b""))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": DOCUMENTS, "n": [*range(10)]}), "in/a.parquet")
    elif "txt" in form:
        for i, text in enumerate(DOCUMENTS):
            data = text.encode()
            Path(f"in/{i}.{form}").write_bytes(gzip.compress(data) if "gz" in form else data)
    else:
        data = jsonl(records)
        Path(f"in/a.{form}").write_bytes(gzip.compress(data) if "gz" in form else data)
    code, out, err = call("prepare", "mine", "--input=in", f"--tokenizer={kind}")
    assert (code, err) == (0, "") and "10 documents" in out
    train, val = (END.join([*texts, ""]) for texts in (DOCUMENTS[:9], DOCUMENTS[9:]))
    assert decoded("data/mine") == (train, val)
    assert call("prepare", "mine", "--input=in", f"--tokenizer={kind}")[1].startswith("up to date")


def test_a_pattern_chooses_files_in_order(folder, call):
    write_texts(Path("in"), ["one ", "two ", "three "])
    Path("in/0001.md").write_text("seven ")
    assert call("prepare", "mine", "--input=in/*[12].*")[0] == 0
    assert decoded("data/mine") == (f"seven {END}two {END}", f"three {END}")


def test_a_lone_file_is_one_text_packed_or_not_in_a_folder_or_not(folder, call, text):
    Path("in").mkdir()
    Path("in/a.txt.gz").write_bytes(gzip.compress(text.encode()))
    n_train = int(len(text) * 0.9)
    for name in ("in/a.txt.gz", "in"):
        assert call("prepare", "mine", f"--input={name}")[0] == 0
        assert decoded("data/mine") == (text[:n_train], text[n_train:])


def test_only_completions_carry_loss(folder, call):
    pairs = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(10)]
    Path("pairs.jsonl").write_bytes(jsonl(pairs))
    assert call("prepare", "sums", "--input=pairs.jsonl")[0] == 0
    meta, data = dataset_files.read(Path("data/sums"))
    tokenizer = tokenizers.from_json(meta.tokenizer, "meta")
    for split, expected in (("train", pairs[:9]), ("val", pairs[9:])):
        ids, mask = data[split], data[f"{split}.mask"]
        everything = "".join(f"{pair['prompt']}{pair['completion']}{END}" for pair in expected)
        assert tokenizers.decode(tokenizer, ids.tolist()) == everything
        answers = "".join(f"{pair['completion']}{END}" for pair in expected)
        assert tokenizers.decode(tokenizer, ids[mask == 1].tolist()) == answers
    Path("pairs.jsonl").write_bytes(jsonl([{"text": str(i)} for i in range(10)]))
    assert call("prepare", "sums", "--input=pairs.jsonl", "--overwrite=true")[0] == 0
    assert [*dataset_files.read(Path("data/sums"))[1]] == ["train", "val"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'{"text": "a"}\n{"text": 7}\n', "line 2: 'text' is not a text"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2: neither"),
        (b'{"text": "a", "prompt": "b"}\n', "line 1: neither"),
        (b'{"prompt": "a", "completion": ""}\n', "line 1: 'completion'"),
        (b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n', "1 of 2 documents are a prompt"),
        (b'{"text": "\\ud800"}\n', "line 1: 'text' holds half a character"),
        (b'{"text": "a\n', "line 1: "),
        (b"[" * 100_000, "line 1: "),
        (b'{"text": "\xff"}\n', "line 1: "),
        (b'{"text": "only one"}\n', "one document cannot be split"),
        (b'{"text": "a\xed\xa0\x80"}\n', "line 1: 'utf-8' codec can't decode"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "a"}\n', "line 1: 'utf-8' codec"),
        (b'{"prompt": "a", "completion": "\xed\xa0\x80"}\n', "line 1: 'utf-8' codec"),
        (b'{"text": ""}\n', "in.jsonl: empty"),
        (b"\n\n", "in.jsonl: empty"),
    ],
)
def test_wrong_lines_are_named(folder, call, data, complaint):
    Path("in.jsonl").write_bytes(data)
    code, _, err = call("prepare", "mine", "--input=in.jsonl")
    assert code == 2 and is_one_error_line(err) and complaint in err
    assert not list(folder.rglob("*.bin*"))


def test_what_cannot_be_unpacked_or_is_no_table_is_named(folder, call):
    Path("a.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-20])
    Path("b.txt.gz").write_bytes(b"not packed at all")
    Path("c.parquet").write_bytes(b"no table")
    for name in ("a.txt.gz", "b.txt.gz"):
        code, _, err = call("prepare", "mine", f"--input={name}")
        assert code == 2 and is_one_error_line(err) and f"{name} cannot be unpacked" in err
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"words": ["a", "b"]}), "d.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), "e.parquet")
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([b"\xff"]).view("string")}), "f.parquet"
    )
    Path("g.tar.gz").write_bytes(gzip.compress(b"abc" * 1000))
    code, _, err = call("prepare", "mine", "--input=g.tar.gz")
    assert code == 2 and is_one_error_line(err) and "unpack it first" in err
    cases = [("c", "no table"), ("d", "no table"), ("e", "holds None"), ("f", "no table")]
    for name, complaint in cases:
        code, _, err = call("prepare", "mine", f"--input={name}.parquet")
        complaint = complaint.replace("no table", "not a table with a column text")
        assert code == 2 and is_one_error_line(err) and complaint in err


def test_without_pyarrow_a_table_names_what_to_install(folder, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"PAR1")
    code, _, err = call("prepare", "mine", "--input=a.parquet")
    assert code == 2 and is_one_error_line(err) and "pip install '.[data]'" in err


def test_a_line_too_long_is_refused(folder, call, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 20)
    Path("in.jsonl").write_bytes(jsonl([{"text": "a" * 30}]))
    assert "line 1: longer than 20 bytes" in call("prepare", "mine", "--input=in.jsonl")[2]


documents = st.lists(st.text("ab é\n", min_size=1, max_size=40), min_size=2, max_size=12)


@given(documents, st.integers(1, 50), st.booleans())
def test_batches_of_any_size_give_the_same_ids(documents, batch_chars, has_prompts):
    class Texts(corpus.Corpus):
        def __init__(self):
            self.files, self.is_one_text = [Path("x.jsonl")], False

        def documents(self, doing):
            self.n_documents = self.n_chars = 0
            for text in documents:
                self.n_documents += 1
                sections = [(text, True)] if not has_prompts else [("a", False), (text, True)]
                yield [corpus.Section(self._counted([t]), has_loss) for t, has_loss in sections]

    n_chars = sum(map(len, documents)) + has_prompts * len(documents)
    found = corpus.Survey(len(documents), n_chars, " \nabé", has_prompts, "")
    tokenizer = tokenizers.CharTokenizer(found.chars, ends_texts=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARS", batch_chars)
        chunks = [*encode.encode_corpus(Texts(), found, tokenizer)]
    n_train = int(0.9 * len(documents))
    for split, expected in (("train", documents[:n_train]), ("val", documents[n_train:])):
        ids = np.concatenate([ids for name, ids, _ in chunks if name == split])
        prompt = "a" if has_prompts else ""
        assert tokenizers.decode(tokenizer, ids) == "".join(prompt + d + END for d in expected)
        if has_prompts:
            mask = np.concatenate([mask for name, _, mask in chunks if name == split])
            assert tokenizers.decode(tokenizer, ids[mask]) == "".join(d + END for d in expected)


def test_a_windows_mark_is_no_character(folder, call):
    Path("in.txt").write_bytes(b"\xef\xbb\xbfab\r\nab")
    assert call("prepare", "mine", "--input=in.txt")[0] == 0
    assert "".join(decoded("data/mine")) == "ab\r\nab"


def test_each_file_and_its_kind_count(folder, call):
    write_texts(Path("in"), ["one ", "two ", "three "])
    argv = ("prepare", "mine", "--input=in", "--tokenizer=byte", "--overwrite=true")
    assert call(*argv)[1].startswith("made")
    Path("in/0002.txt").write_text("four ")
    assert call(*argv)[1].startswith("made")
    Path("in/0001.txt").write_bytes(jsonl([{"text": "x"}]))
    assert call(*argv)[1].startswith("made")
    Path("in/0001.txt").rename("in/0001.jsonl")
    assert call(*argv)[1].startswith("made") and call(*argv)[1].startswith("up to date")


def test_a_tokenizer_that_cannot_end_documents_is_refused(folder, call):
    Path("one.txt").write_text("abcdef")
    call("prepare", "one", "--input=one.txt")
    write_texts(Path("in"), ["ab", "cd"])
    code, _, err = call("prepare", "two", "--input=in", "--tokenizer=data/one/meta.json")
    assert code == 2 and is_one_error_line(err) and "no token to end a document" in err


def test_work_is_spread_over_threads_in_order(monkeypatch):
    monkeypatch.setattr(encode.os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=10)  # passed only by two at the same time
    assert [*encode.map_in_parallel(lambda i: (both.wait(), i)[1], range(8))] == [*range(8)]


def test_a_corpus_that_changes_while_it_is_read_is_refused(folder):
    Path("in.jsonl").write_bytes(jsonl([{"text": "abc"}] * 10))
    texts = corpus.Corpus("in.jsonl")
    found = corpus.survey(texts)
    for n in (11, 0):
        Path("in.jsonl").write_bytes(jsonl([{"text": "abc"}] * n))
        with pytest.raises(InputError, match="changed while it was read"):
            [*encode.encode_corpus(texts, found, tokenizers.CharTokenizer("abc", True))]
