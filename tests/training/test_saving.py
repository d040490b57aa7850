"""When a run saves, what is then on the disk, and what the training meanwhile must not change."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, flat_tensors, is_one_error_line

import train
from quill.errors import RunError
from quill.training import checkpoint, state_dict
from quill.training.log import Logger
from quill.training.saving import Saver

BY_TIME = [*TINY, "--checkpoint_seconds=180"]
EACH = [*BY_TIME, "--eval_interval=1"]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """For the saves, a clock that shows 50 s more after each step."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(
        "quill.training.saving.time", SimpleNamespace(monotonic=lambda: clock.seconds)
    )
    after_step(monkeypatch, lambda: setattr(clock, "seconds", clock.seconds + 50))
    return clock


def after_step(monkeypatch, do, number: int | None = None) -> None:
    """Call do() after the update of that number, or after each."""
    train_step = train.train_step

    def step_and_do(run):
        result = train_step(run)
        if number in (None, run.progress.step):
            do()
        return result

    monkeypatch.setattr(train, "train_step", step_and_do)


@pytest.fixture
def saves(monkeypatch) -> list:
    """The saves as they are made: (file, step, best val loss)."""
    made, save_checkpoint = [], checkpoint.save_checkpoint

    def watched(path, contents, previous=None):
        save_checkpoint(path, contents, previous)
        made.append((path.name, contents["step"], contents["best_val_loss"]))

    monkeypatch.setattr(checkpoint, "save_checkpoint", watched)
    return made


def losses(monkeypatch, *values: float) -> None:
    """The val losses of the evaluations to come."""
    left = iter(values)
    found = {"train_loss": 1.0}
    monkeypatch.setattr(train, "estimate_loss", lambda run: found | {"val_loss": next(left)})


def raised(error: BaseException):
    raise error


def signal_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ---- when --------------------------------------------------------------------------------------


def test_saves_are_so_far_apart_and_the_best_comes_first(tiny, call, monkeypatch, clock, saves):
    losses(monkeypatch, 9, 8, 7, 7.1, 7.2, 7.3, 6, 7, 7, 7, 7)
    assert call("train", *EACH, "--max_iters=10")[0] == 0
    assert saves == [
        ("best.pt", 2, 7), ("ckpt.pt", 4, 7),
        ("best.pt", 6, 6), ("ckpt.pt", 8, 6),
        ("ckpt.pt", 10, 6),
    ]  # fmt: skip


def test_without_always_save_a_save_waits_for_a_new_best(tiny, call, monkeypatch, clock, saves):
    losses(monkeypatch, 9, 8, 7, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7)
    assert call("train", *EACH, "--max_iters=12", "--always_save_checkpoint=false")[0] == 0
    assert saves == [
        ("best.pt", 2, 7), ("ckpt.pt", 4, 7),
        ("best.pt", 9, 6), ("ckpt.pt", 9, 6),
        ("ckpt.pt", 12, 6),
    ]  # fmt: skip


def test_zero_seconds_save_at_each_evaluation(tiny, call, monkeypatch, saves):
    losses(monkeypatch, 9, 8, 8.5)
    assert call("train", *TINY, "--checkpoint_seconds=0")[0] == 0
    steps = [(name, step) for name, step, _ in saves]
    assert steps == [("best.pt", 0), ("ckpt.pt", 0), ("best.pt", 3), ("ckpt.pt", 3), ("ckpt.pt", 6)]


def test_a_signal_saves_the_best_too(tiny, call, monkeypatch, saves):
    losses(monkeypatch, 9, 8, 8.5)
    after_step(monkeypatch, signal_self, 5)
    assert call("train", *BY_TIME)[0] == 143
    assert saves == [("best.pt", 3, 8), ("ckpt.pt", 5, 8)]


def test_the_next_save_is_copied_when_the_last_is_written(tiny, call, monkeypatch):
    """So that no two of them take memory."""
    training_state, write = state_dict.training_state, Saver._write
    under_way = threading.Event()

    def watched_copy(*parts):
        assert not under_way.is_set()
        return training_state(*parts)

    def slow_save(*args):
        under_way.set()
        time.sleep(0.1)
        write(*args)
        under_way.clear()

    monkeypatch.setattr(state_dict, "training_state", watched_copy)
    monkeypatch.setattr(Saver, "_write", slow_save)
    assert call("train", *TINY)[0] == 0


# ---- what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--dropout=0.1"], ["--optimizer=muon", "--average_decay=0.5"]])
def test_steps_made_during_a_save_do_not_change_it(tiny, call, monkeypatch, flags):
    """The save of step 3 is held up until step 5 is made; it is that of a run that ends at 3."""
    flags = [*TINY, *flags, "--lr_decay_iters=9", "--tied_head=true"]
    assert call("train", *flags, "--max_iters=3", "--out_dir=short")[0] == 0
    save_checkpoint, is_made = checkpoint.save_checkpoint, threading.Event()

    def held_up(path, contents, previous=None):
        if contents["step"] == 3:
            assert is_made.wait(timeout=60)
        save_checkpoint(path, contents, previous)
        if contents["step"] == 3:
            shutil.copy(path, f"during-{path.name}")

    monkeypatch.setattr(checkpoint, "save_checkpoint", held_up)
    after_step(monkeypatch, is_made.set, 5)
    assert call("train", *flags, "--max_iters=9", "--out_dir=long")[0] == 0
    for name in ("best.pt", "ckpt.pt"):
        a, b = (checkpoint.load_checkpoint(Path(f)) for f in (f"short/{name}", f"during-{name}"))
        tensors = [
            flat_tensors([s["model"], s.get("optimizers"), s.get("average")]) for s in (a, b)
        ]
        assert len(tensors[0]) == len(tensors[1]) > 4
        assert all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))
        for saved in (a, b):
            saved.get("progress", {}).pop("seconds", None)
        names = ("step", "best_val_loss", "progress")
        assert [a.get(n) for n in names] == [b.get(n) for n in names] and a["step"] == 3


def test_a_tied_head_is_saved_once(tiny, call):
    call("train", *TINY, "--tied_head=true", "--max_iters=1")
    for name in ("best.pt", "ckpt.pt"):
        weights = torch.load(f"out/{name}", weights_only=True)["model"]
        head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
        assert head.data_ptr() == embedding.data_ptr()


def test_the_metrics_are_on_the_disk_before_the_checkpoint(tiny, call, monkeypatch):
    sync, start = Logger.sync, Saver.start
    synced, checked = [], []

    def watched_sync(self):
        sync(self)
        synced[:] = map(json.loads, self.path.read_text().splitlines())

    def watched_start(self, contents):
        evaluated = [line["step"] for line in synced if "val_loss" in line]
        checked.append((evaluated[-1], contents["progress"]["evaluated_step"]))
        start(self, contents)

    monkeypatch.setattr(Logger, "sync", watched_sync)
    monkeypatch.setattr(Saver, "start", watched_start)
    assert call("train", *TINY)[0] == 0
    assert checked == [(0, 0), (3, 3), (6, 6)]


# ---- failures ----------------------------------------------------------------------------------


def test_no_error_of_the_last_save_is_lost(folder):
    with pytest.raises(RunError, match="missing"), Saver(Path("missing"), 0) as saver:
        saver.start({})


@pytest.mark.parametrize("name", ["best.pt", "ckpt.pt"])
@pytest.mark.parametrize("moment", ["in the loop", "at the end", "at a signal"])
def test_a_full_disk_is_one_line_and_exit_code_1(tiny, call, full_disk, monkeypatch, name, moment):
    Path("out").mkdir()
    full_disk(f"out/{name}")
    if moment == "in the loop":
        flags = [*TINY, "--max_iters=2000", "--eval_interval=2000"]
    else:
        flags = BY_TIME
    if moment == "at a signal":
        after_step(monkeypatch, signal_self, 1)
    code, out, err = call("train", *flags)
    assert code == 1 and is_one_error_line(err)
    assert err.startswith(f"error: out/{name}: No space left on device; free some space")
    assert "step 2000" not in out, "it stops at the next step"
    assert "saved after step" not in out and "done after step" not in out
    assert Path("out/best.pt").exists() == (name == "ckpt.pt"), "best.pt comes first"
    assert not Path("out/ckpt.pt").exists()


@pytest.mark.parametrize("is_disk_full", [False, True])
def test_an_error_leaves_the_best_on_the_disk(tiny, call, monkeypatch, is_disk_full):
    losses(monkeypatch, 9, 7, 8, 8)
    lost = OSError(errno.ENOSPC, "No space left on device")
    no_memory = torch.OutOfMemoryError("out of memory")
    after_step(monkeypatch, lambda: raised(no_memory), 8)
    if is_disk_full:
        monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: raised(lost))
    code, _, err = call("train", *BY_TIME, "--max_iters=90")
    assert code == 1 and is_one_error_line(err) and "out of memory: halve batch_size" in err
    assert [path.name for path in Path("out").glob("*.pt")] == ([] if is_disk_full else ["best.pt"])
    if not is_disk_full:
        assert checkpoint.load_checkpoint(Path("out/best.pt"))["step"] == 3


def test_a_folder_that_is_removed_meanwhile_is_said(tiny, call, monkeypatch):
    after_step(monkeypatch, lambda: shutil.rmtree("out"), 4)
    code, _, err = call("train", *TINY, "--checkpoint_seconds=1000")  # it saves at the end alone
    assert code == 1 and err == "error: out was removed while the run was going on\n"


def test_a_checkpoint_knows_of_no_best_that_is_not_there(tiny, call, monkeypatch):
    """At each moment of a run in which every evaluation is a new best."""
    replace, n_checked = Path.replace, []

    def best_val_loss(name: str) -> float:
        path = Path("out", name)
        return checkpoint.load_checkpoint(path)["best_val_loss"] if path.exists() else math.inf

    def watched(self, target):
        result = replace(self, target)
        if target.suffix == ".pt":
            assert best_val_loss("best.pt") <= best_val_loss("ckpt.pt")
            n_checked.append(target)
        return result

    monkeypatch.setattr(Path, "replace", watched)
    losses(monkeypatch, *range(9, 0, -1))
    assert call("train", *TINY, "--max_iters=8", "--eval_interval=1")[0] == 0
    assert len(n_checked) == 9 + 9 + 8
