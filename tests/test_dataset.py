from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_meta
from hypothesis import given
from hypothesis import strategies as st

import dataset
from errors import InputError

CPU = torch.device("cpu")


def described(vocab_size=10):
    return {"vocab_size": vocab_size, "tokenizer": {}, "source": "x.txt", "sha256": "0"}


def written(folder, vocab_size=10):
    chunks = [("train", np.arange(9)), ("train", np.array([9])), ("val", np.array([1, 2, 3]))]
    return dataset.write(folder, chunks, **described(vocab_size))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_round_trip_and_raw_format(folder, vocab_size, dtype):
    meta = written(folder / "d", vocab_size)
    raw = np.fromfile(folder / "d" / "train.bin", dtype=dtype)
    assert raw.tolist() == list(range(10))
    read, train, val = dataset.read(folder / "d")
    assert (read, train.tolist(), val.tolist()) == (meta, list(range(10)), [1, 2, 3])


def test_a_write_that_fails_leaves_what_was_there(folder):
    before = written(folder / "d")

    def breaks():
        yield "train", np.zeros(5, dtype=int)
        raise InputError("the text is broken")

    with pytest.raises(InputError):
        dataset.write(folder / "d", breaks(), **described())
    assert dataset.read(folder / "d")[0] == before
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
        (lambda d: (d / "val.bin").unlink(), "val.bin: No such file"),
        (lambda d: (d / "val.bin").write_bytes(b""), "val.bin has 0 bytes"),
        (lambda d: (d / "val.bin").write_bytes(b"12345"), "val.bin has 5 bytes"),
    ],
)
def test_what_does_not_agree_is_refused(folder, damage, complaint):
    written(folder / "d")
    damage(folder / "d")
    with pytest.raises(InputError, match=complaint):
        dataset.read(folder / "d")


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_a_write_killed_between_its_renames_is_finished(folder, n_renamed):
    """All three are on the disk then, and meta.json is away."""
    expected = written(folder / "d")
    for name in ("train.bin", "val.bin", "meta.json")[n_renamed:]:
        (folder / "d" / name).rename(folder / "d" / f"{name}.tmp")
    assert dataset.read(folder / "d")[0] == expected
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
        dataset.write(folder / "d", [("train", np.arange(5)), ("val", np.arange(3))], **described())
    assert dataset.read(folder / "d")[0].train_tokens == 5


def test_a_write_killed_before_its_renames_is_not_finished(folder):
    written(folder / "d")
    (folder / "d" / "meta.json").rename(folder / "d" / "meta.json.tmp")
    with (folder / "d" / "meta.json.tmp").open("r+") as file:
        file.truncate(50)
    with pytest.raises(InputError, match="is not prepared"):
        dataset.read(folder / "d")


@pytest.mark.parametrize("limit", [0, 2**26])  # memory-mapped, on the device
def test_windows(monkeypatch, limit):
    monkeypatch.setattr(dataset, "MAX_TOKENS_ON_DEVICE", limit)
    split = dataset.Split(np.arange(10, dtype=np.uint16), 10, CPU, "x.bin")
    idx, targets = split.windows(np.array([0, 6, 8, 10]), 3)
    assert idx[0].tolist() == [0, 1, 2] and targets[0].tolist() == [1, 2, 3]
    assert idx[1].tolist() == [6, 7, 8] and targets[1].tolist() == [7, 8, 9]
    assert targets[2].tolist() == [9, -1, -1], "beyond the end there is nothing to predict"
    assert targets[3].tolist() == [-1, -1, -1]
    assert idx.min() >= 0 and idx.max() < 10 and idx.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("limit", [0, 2**26])
def test_an_id_outside_the_vocabulary_is_refused(monkeypatch, limit):
    monkeypatch.setattr(dataset, "MAX_TOKENS_ON_DEVICE", limit)
    with pytest.raises(InputError, match=r"x\.bin: token id 9 does not fit .* vocabulary of 9"):
        dataset.Split(np.arange(10, dtype=np.uint16), 9, CPU, "x.bin").windows(np.array([6]), 3)


@given(st.integers(2, 200), st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 10**6))
def test_train_windows_fit_and_depend_on_seed_and_step_alone(n_tokens, block_size, seed, step):
    if n_tokens <= block_size:
        return
    starts = dataset.train_starts(n_tokens, block_size, 20, seed, step)
    assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
    assert (starts == dataset.train_starts(n_tokens, block_size, 20, seed, step)).all()


def test_train_windows_reach_every_token():
    starts = dataset.train_starts(8, 3, 1000, seed=0, step=0)
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}


def test_an_epoch_has_every_token_at_most_once_in_an_order_of_its_own():
    steps = [dataset.train_starts(1003, 10, 11, seed=0, step=step) for step in range(18)]
    epochs = np.concatenate(steps).reshape(2, 99)  # steps of 11 windows, epochs of 99
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 10).all() and len(starts) * 10 > 1003 - 2 * 10
    assert len(set(epochs[:, 0])) == 2 and (np.diff(epochs[0]) != 10).any()
    across = dataset.train_starts(1003, 10, 200, seed=0, step=0)
    assert (across[:198] == epochs.ravel()).all(), "however the steps cut them"


@given(st.integers(2, 200), st.integers(1, 50))
def test_whole_evaluation_predicts_every_token_but_the_first_once(n_tokens, block_size):
    split = dataset.Split(np.arange(n_tokens, dtype=np.uint16), n_tokens, CPU, "x.bin")
    starts = dataset.eval_starts(n_tokens, block_size, 7, whole=True)
    _, targets = split.windows(starts, block_size)
    assert sorted(targets[targets >= 0].tolist()) == list(range(1, n_tokens))


@given(st.integers(2, 200), st.integers(1, 50), st.integers(1, 20))
def test_spread_evaluation_stays_inside(n_tokens, block_size, n_windows):
    if n_tokens <= block_size:
        return
    starts = dataset.eval_starts(n_tokens, block_size, n_windows, whole=False)
    assert 1 <= len(starts) <= n_windows and len(set(starts)) == len(starts)
    assert starts[0] == 0 and starts[-1] + block_size + 1 <= n_tokens
