from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import edit_meta
from hypothesis import given
from hypothesis import strategies as st

from quill.data import dataset, dataset_files
from quill.errors import InputError

CPU = torch.device("cpu")


def described(vocab_size=10):
    return {"vocab_size": vocab_size, "tokenizer": {}, "source": "x.txt", "sha256": "0"}


def written(folder, vocab_size=10, is_masked=False):
    ids = [("train", np.arange(9)), ("train", np.array([9])), ("val", np.array([1, 2, 3]))]
    chunks = [(split, part, part % 2) for split, part in ids]
    return dataset_files.write(folder, chunks, is_masked, **described(vocab_size))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_round_trip_and_raw_format(folder, vocab_size, dtype):
    meta = written(folder / "d", vocab_size)
    raw = np.fromfile(folder / "d" / "train.bin", dtype=dtype)
    assert raw.tolist() == list(range(10))
    read, data = dataset_files.read(folder / "d")
    assert read == meta and list(data) == ["train", "val"]
    assert data["train"].tolist() == list(range(10)) and data["val"].tolist() == [1, 2, 3]


def test_masks_are_written_read_and_removed(folder):
    written(folder / "d", is_masked=True)
    _, data = dataset_files.read(folder / "d")
    assert data["train.mask"].tolist() == [0, 1] * 5 and data["val.mask"].tolist() == [1, 0, 1]
    (folder / "d" / "val.mask.bin").write_bytes(b"\1\1\1")
    with pytest.raises(InputError, match=r"val\.mask\.bin was changed or damaged"):
        dataset_files.read(folder / "d")
    written(folder / "d")
    assert [*dataset_files.read(folder / "d")[1]] == ["train", "val"]
    assert not [*(folder / "d").glob("*mask*")]


def test_a_write_that_fails_leaves_what_was_there(folder):
    before = written(folder / "d")

    def breaks():
        yield "train", np.zeros(5, dtype=int), None
        raise InputError("the text is broken")

    with pytest.raises(InputError):
        dataset_files.write(folder / "d", breaks(), **described())
    assert dataset_files.read(folder / "d")[0] == before
    assert sorted(p.name for p in (folder / "d").iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: (d / "meta.json").unlink(), "python prepare.py d"),
        (lambda d: (d / "meta.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "meta.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda d: (d / "meta.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda d: (d / "meta.json").write_text("[1]"), "does not describe a dataset"),
        (lambda d: (d / "meta.json").write_text('{"vocab_size": 65}'), "does not describe"),
        (lambda d: edit_meta(d, vocab_size="10"), "vocab_size not usable"),
        (lambda d: edit_meta(d, vocab_size=True), "vocab_size not usable"),
        (lambda d: edit_meta(d, dtype="float64"), "dtype"),
        (lambda d: edit_meta(d, format_version=99), "format version"),
        (lambda d: edit_meta(d, train_tokens=11), "train.bin has 20 bytes"),
        (lambda d: (d / "val.bin").unlink(), "val.bin is missing"),
        (lambda d: (d / "val.bin").write_bytes(b""), "val.bin has 0 bytes"),
        (lambda d: (d / "val.bin").write_bytes(b"12345"), "val.bin has 5 bytes"),
    ],
)
def test_what_does_not_agree_is_refused(folder, damage, complaint):
    written(folder / "d")
    damage(folder / "d")
    with pytest.raises(InputError, match=complaint):
        dataset_files.read(folder / "d")


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_a_write_killed_between_its_renames_is_finished(folder, n_renamed):
    """All three are on the disk then, and meta.json is away."""
    expected = written(folder / "d")
    for name in ("train.bin", "val.bin", "meta.json")[n_renamed:]:
        (folder / "d" / name).rename(folder / "d" / f"{name}.tmp")
    assert dataset_files.read(folder / "d")[0] == expected
    assert not [*(folder / "d").glob("*.tmp")]


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_a_write_interrupted_between_its_renames_is_finished(folder, monkeypatch, n_renamed):
    """By Ctrl-C, which Python may act on between any two lines."""
    written(folder / "d")
    replace, calls = Path.replace, []

    def interrupted(self, target):
        if len(calls) == n_renamed:
            raise KeyboardInterrupt
        calls.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        chunks = [("train", np.arange(5), None), ("val", np.arange(3), None)]
        dataset_files.write(folder / "d", chunks, **described())
    assert dataset_files.read(folder / "d")[0].train_tokens == 5


def test_a_write_killed_before_its_renames_is_not_finished(folder):
    written(folder / "d")
    (folder / "d" / "meta.json").rename(folder / "d" / "meta.json.tmp")
    with (folder / "d" / "meta.json.tmp").open("r+") as file:
        file.truncate(50)
    with pytest.raises(InputError, match="is not prepared"):
        dataset_files.read(folder / "d")


def plain(n_tokens: int, block_size: int, vocab_size: int | None = None) -> dataset.Split:
    """The text 0, 1, 2, ..."""
    ids = np.arange(n_tokens, dtype=np.uint16)
    return dataset.Split(ids, None, vocab_size or n_tokens, block_size, CPU, Path("x.bin"))


@pytest.mark.parametrize("limit", [0, 2**26])  # memory-mapped, on the device
def test_get_batch(monkeypatch, limit):
    monkeypatch.setattr(dataset, "MAX_TOKENS_ON_DEVICE", limit)
    idx, targets = plain(10, 3).get_batch(np.array([0, 6, 8, 10]))
    assert idx[0].tolist() == [0, 1, 2] and targets[0].tolist() == [1, 2, 3]
    assert idx[1].tolist() == [6, 7, 8] and targets[1].tolist() == [7, 8, 9]
    assert targets[2].tolist() == [9, -1, -1], "beyond the end there is nothing to predict"
    assert targets[3].tolist() == [-1, -1, -1]
    assert idx.min() >= 0 and idx.max() < 10 and idx.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("limit", [0, 2**26])
def test_an_id_outside_the_vocabulary_is_refused(monkeypatch, limit):
    monkeypatch.setattr(dataset, "MAX_TOKENS_ON_DEVICE", limit)
    with pytest.raises(InputError, match=r"x\.bin: token id 9 does not fit .* vocabulary of 9"):
        plain(10, 3, vocab_size=9).get_batch(np.array([6]))


@given(st.integers(2, 200), st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 10**6))
def test_train_rows_fit_and_depend_on_seed_and_step_alone(n_tokens, block_size, seed, step):
    if n_tokens <= block_size:
        return
    starts = plain(n_tokens, block_size).train_offsets(20, seed, step)
    assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
    assert (starts == plain(n_tokens, block_size).train_offsets(20, seed, step)).all()


def test_train_rows_reach_every_token():
    starts = plain(8, 3).train_offsets(1000, seed=0, step=0)
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}


def test_an_epoch_has_every_token_at_most_once_in_an_order_of_its_own():
    steps = [plain(1003, 10).train_offsets(11, seed=0, step=step) for step in range(18)]
    epochs = np.concatenate(steps).reshape(2, 99)  # steps of 11 rows, epochs of 99
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 10).all() and len(starts) * 10 > 1003 - 2 * 10
    assert len(set(epochs[:, 0])) == 2 and (np.diff(epochs[0]) != 10).any()
    across = plain(1003, 10).train_offsets(200, seed=0, step=0)
    assert (across[:198] == epochs.ravel()).all(), "however the steps cut them"


@given(st.integers(2, 200), st.integers(1, 50))
def test_whole_evaluation_predicts_every_token_but_the_first_once(n_tokens, block_size):
    if n_tokens <= block_size:
        return
    split = plain(n_tokens, block_size)
    _, targets = split.get_batch(split.eval_offsets(7, whole=True))
    assert sorted(targets[targets >= 0].tolist()) == list(range(1, n_tokens))


@given(st.integers(2, 200), st.integers(1, 50), st.integers(1, 20))
def test_spread_evaluation_stays_inside(n_tokens, block_size, n_rows):
    if n_tokens <= block_size:
        return
    starts = plain(n_tokens, block_size).eval_offsets(n_rows, whole=False)
    assert 1 <= len(starts) <= n_rows and len(set(starts)) == len(starts)
    assert starts[0] == 0 and starts[-1] + block_size + 1 <= n_tokens


# Lengths of prompts and answers, an example each.
examples = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@pytest.mark.parametrize("limit", [0, 2**26])
@given(examples=examples, block_size=st.integers(1, 30))
def test_every_answer_is_predicted_once_and_nothing_else(limit, examples, block_size):
    mask = np.concatenate([[0] * prompt + [1] * answer for prompt, answer in examples])
    ids = np.arange(len(mask), dtype=np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "MAX_TOKENS_ON_DEVICE", limit)
        split = dataset.Split(ids, mask, len(ids), block_size, CPU, Path("x.bin"))
        starts = split.eval_offsets(1, whole=True)
        idx, targets = split.get_batch(np.append(starts, len(ids)))
    assert sorted(targets[targets >= 0].tolist()) == np.flatnonzero(mask).tolist()
    counts = targets >= 0
    assert (targets[counts] == idx[counts] + 1).all() and counts[:-1].any(dim=1).all()
    assert (idx[:-1, 0].numpy() == starts).all(), "prompts are read, only not predicted"
    begins = np.cumsum([0, *(prompt + answer for prompt, answer in examples)])
    for begin, end in itertools.pairwise(begins):
        if end - begin <= block_size + 1:  # it fits into a row
            at = np.searchsorted(starts, begin, side="right") - 1
            assert targets[at].max() >= end - 1, "an answer is not cut from a prompt that fits"


def test_examples_are_all_read_in_each_epoch():
    mask = np.tile([0, 0, 1], 10)
    split = dataset.Split(np.arange(30), mask, 30, 2, CPU, Path("x.bin"))
    epochs = split.train_offsets(20, seed=0, step=0).reshape(2, 10)
    assert (np.sort(epochs) == np.arange(0, 30, 3)).all() and (epochs[0] != epochs[1]).any()
    assert (split.train_offsets(5, seed=0, step=3) == epochs[1, 5:]).all()


def test_a_mask_without_loss_is_refused():
    with pytest.raises(InputError, match=r"x\.bin: none of its tokens carries loss"):
        dataset.Split(np.arange(9), np.zeros(9), 9, 3, CPU, Path("x.bin"))
