"""The loop's promises, in this process: what a step, an evaluation and a resume are."""

from __future__ import annotations

import errno
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, is_one_error_line

import train
from quill import settings
from quill.data import dataset
from quill.errors import RunError
from quill.training import checkpoint, devices
from quill.training.checkpoint import Progress
from quill.training.ema import EMA
from quill.training.log import Logger
from quill.training.optimizers import Muon, get_lr
from train import Run, TrainConfig


def new_run(*flags: str) -> Run:
    return train.setup(settings.load(TrainConfig, [*TINY, *flags], usage=""))


def weights(path="out/ckpt.pt") -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(Path(path))["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(path="out/metrics.jsonl") -> list[dict]:
    """The lines without what depends on the clock."""
    clock = {"seconds", "ms_per_step", "tokens_per_s"}
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


# ---- files and counts --------------------------------------------------------------------------


def test_max_iters_updates_and_evaluations_at_both_ends(tiny, call):
    code, out, err = call("train", *TINY, "--max_iters=7", "--log_interval=2")
    assert (code, err) == (0, "")
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert saved["step"] == 7 and saved["progress"]["tokens"] == 7 * 2 * 4 * 16
    adamw = saved["optimizers"][0]["state"]
    assert {int(state["step"]) for state in adamw.values()} == {7}
    lines = metrics()
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6, 7]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6]
    assert set(lines[0]) == {"step", "train_loss", "val_loss", "val_bpb", "lr", "tokens"}
    assert set(lines[1]) == {"step", "loss", "grad_norm", "lr", "mfu"}
    assert lines[1]["mfu"] is None, "a CPU's peak is not known"
    assert "step 7: train loss" in out and "ms/step" in out and "to go" in out


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return type(value) in (int, float, str, bool, type(None), torch.Tensor)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_hold_only_plain_types_and_all_that_is_promised(tiny, call, optimizer):
    call("train", *TINY, f"--optimizer={optimizer}")
    for name in ("ckpt.pt", "best.pt"):
        saved = torch.load(f"out/{name}", weights_only=True)
        assert plain(saved) and {"model", "model_config", "config", "tokenizer"} <= saved.keys()
        assert saved["config"]["n_embd"] == 16 and saved["tokenizer"]["kind"] == "char"


@pytest.mark.parametrize("seconds", [0, 180])
def test_best_holds_the_weights_of_the_lowest_val_loss(tiny, call, seconds):
    wild = ["--learning_rate=0.5", "--decay_lr=false", "--grad_clip=0", "--beta2=0.5"]
    call("train", *TINY, "--max_iters=60", *wild, f"--checkpoint_seconds={seconds}")
    evaluations = {line["step"]: line["val_loss"] for line in metrics() if "val_loss" in line}
    best = torch.load("out/best.pt", weights_only=True)
    assert best["step"] == min(evaluations, key=evaluations.get) < 60
    again = new_run()
    again.model.load_state_dict(best["model"])
    assert train.evaluate(again)["val_loss"] == evaluations[best["step"]]
    assert torch.load("out/ckpt.pt", weights_only=True)["step"] == 60


def test_without_always_save_only_improvements_and_the_end_are_saved(tiny, call, monkeypatch):
    saves = []
    monkeypatch.setattr(
        checkpoint,
        "save_checkpoint",
        lambda path, saved, keep=None: saves.append((path.name, saved["step"])),
    )
    losses = iter([3.0, 2.0, 2.5, 2.6])
    monkeypatch.setattr(
        train, "estimate_loss", lambda run: {"train_loss": 1.0, "val_loss": next(losses)}
    )
    call("train", *TINY, "--max_iters=9", "--always_save_checkpoint=false")
    assert [step for name, step in saves if name == "ckpt.pt"] == [0, 3, 9]
    assert [step for name, step in saves if name == "best.pt"] == [0, 3]


def test_patience_stops_early_and_saves(tiny, call, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 9.9])
    monkeypatch.setattr(
        train, "estimate_loss", lambda run: {"train_loss": 1.0, "val_loss": next(losses)}
    )
    assert call("train", *TINY, "--max_iters=90", "--patience=2")[0] == 0
    assert torch.load("out/ckpt.pt", weights_only=True)["step"] == 9


def test_eval_only_writes_nothing(tiny, call):
    code, out, _ = call("train", *TINY, "--eval_only=true")
    assert code == 0 and "val loss" in out and not Path("out").exists()


# ---- determinism -------------------------------------------------------------------------------

DROPOUT = ["--dropout=0.2", "--max_iters=12", "--log_interval=1"]


def test_the_same_command_makes_the_same_run(tiny, call):
    call("train", *TINY, *DROPOUT, "--out_dir=a")
    call("train", *TINY, *DROPOUT, "--out_dir=b")
    assert same(weights("a/ckpt.pt"), weights("b/ckpt.pt"))
    assert metrics("a/metrics.jsonl") == metrics("b/metrics.jsonl")
    call("train", *TINY, *DROPOUT, "--out_dir=c", "--seed=2")
    assert not same(weights("a/ckpt.pt"), weights("c/ckpt.pt"))


def test_evaluating_does_not_touch_the_training(tiny, call):
    call("train", *TINY, *DROPOUT, "--out_dir=a", "--eval_interval=1")
    call("train", *TINY, *DROPOUT, "--out_dir=b", "--eval_interval=1000", "--eval_iters=1")
    assert same(weights("a/ckpt.pt"), weights("b/ckpt.pt"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--average_decay=0.5", "--sample_at_eval=20"],
        ["--optimizer=muon", "--position=rotary", "--norm=rmsnorm", "--average_decay=0.9"],
        ["--dtype=bfloat16"],
        ["--dtype=float16"],
        ["--lr_schedule=wsd", "--gradient_accumulation_steps=1", "--tied_head=false"],
        ["--distill_from=teacher"],
    ],
)
@pytest.mark.parametrize("stop_at", [1, 6, 8])  # between evaluations, at one
def test_resume_is_bitwise_equal_to_never_stopping(tiny, call, monkeypatch, flags, stop_at):
    flags = [*TINY, *DROPOUT, *flags]
    if "--distill_from=teacher" in flags:
        assert call("train", *TINY, "--out_dir=teacher")[0] == 0
    assert call("train", *flags, "--out_dir=whole")[0] == 0
    train_step = train.train_step

    def interrupted(run):
        result = train_step(run)
        if run.progress.step == stop_at:
            signal_self()
        return result

    monkeypatch.setattr(train, "train_step", interrupted)
    assert call("train", *flags, "--out_dir=parts")[0] == 143
    monkeypatch.setattr(train, "train_step", train_step)
    code, out, _ = call("train", "--out_dir=parts", "--init_from=resume")
    assert code == 0 and f"resuming after step {stop_at}" in out
    whole, parts = (torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("whole", "parts"))
    assert same(whole["model"], parts["model"])
    for a, b in zip(whole["optimizers"], parts["optimizers"], strict=True):
        assert all(same_state(a["state"][i], b["state"][i]) for i in a["state"])
    assert metrics("whole/metrics.jsonl") == metrics("parts/metrics.jsonl")
    assert same(weights("whole/best.pt"), weights("parts/best.pt"))


@pytest.mark.parametrize("stop_at", [1, 5, 12])  # the last is in the evaluation of step 3
def test_a_signal_stops_an_evaluation_after_a_batch(tiny, call, monkeypatch, stop_at):
    flags = [*TINY, "--eval_iters=8", "--average_decay=0.9"]
    assert call("train", *flags, "--out_dir=whole")[0] == 0
    get_batch, n_evaluated = dataset.Split.get_batch, [0]

    def interrupted(split, offsets):
        n_evaluated[0] += not torch.is_grad_enabled()
        if n_evaluated[0] == stop_at:
            signal_self()
        return get_batch(split, offsets)

    with monkeypatch.context() as patch:
        patch.setattr(dataset.Split, "get_batch", interrupted)
        assert call("train", *flags, "--out_dir=parts")[0] == 143
    assert n_evaluated == [stop_at]
    assert call("train", "--out_dir=parts", "--init_from=resume")[0] == 0
    assert metrics("whole/metrics.jsonl") == metrics("parts/metrics.jsonl")
    assert same(weights("whole/ckpt.pt"), weights("parts/ckpt.pt"))
    assert same(weights("whole/best.pt"), weights("parts/best.pt"))


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_compiler_that_fails_is_one_line_or_the_signal_that_ended_it(
    tiny, call, monkeypatch, is_stopped
):
    from torch._inductor.exc import InductorError

    def fail(run):
        if is_stopped:
            signal_self()
        raise InductorError(RuntimeError("C++ compile error"), None)

    monkeypatch.setattr(train, "train_step", fail)
    code, out, err = call("train", *TINY)
    if is_stopped:
        assert code == 143 and "SIGTERM: saved after step 0" in out and err == ""
        assert checkpoint.load_checkpoint(Path("out/ckpt.pt"), for_resume=True)["step"] == 0
    else:
        assert code == 1 and is_one_error_line(err) and "C++ compile error" in err
        assert "--compile=false" in err


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def signal_self():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def test_resume_drops_lines_beyond_the_checkpoint_and_a_half_written_one(tiny, call):
    call("train", *TINY, "--log_interval=1")
    before = metrics()
    with Path("out/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert call("train", "--init_from=resume", "--max_iters=9")[0] == 0
    after = metrics()
    assert after[: len(before)] == before
    assert [line["step"] for line in after[len(before) :]] == [7, 8, 9, 9]


def test_a_line_of_the_metrics_that_is_nested_deeply_is_left_out(tiny, call):
    call("train", *TINY)
    with Path("out/metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "]" * 100_000 + "\n")
    assert call("train", "--init_from=resume", "--max_iters=7")[0] == 0
    assert metrics()[-1]["step"] == 7


@pytest.mark.parametrize("text", ["to be or not to be\n", "it's a $text without line ends; "])
def test_the_command_that_is_offered_in_the_end_runs(folder, call, text):
    Path("text.txt").write_text(text * 30)
    call("prepare", "tiny", "--input=text.txt")
    _, out, _ = call("train", *TINY)
    argv = shlex.split(out.partition("next: ")[2])
    assert argv[:2] == ["python", "sample.py"]
    assert call("sample", *argv[2:], "--num_samples=1")[0] == 0


def test_resume_of_a_finished_run_changes_nothing(tiny, call):
    call("train", *TINY)
    before = weights(), metrics()
    code, out, _ = call("train", "--init_from=resume")
    assert code == 0 and "done after step 6" in out
    assert same(weights(), before[0]) and metrics() == before[1]


def test_flags_beside_a_resume_take_effect(tiny, call):
    call("train", *TINY)
    flags = ["--init_from=resume", "--max_iters=9", "--learning_rate=0.5", "--min_lr=0.5"]
    assert call("train", *flags, "--weight_decay=0.7", "--beta1=0.3")[0] == 0
    group = torch.load("out/ckpt.pt", weights_only=True)["optimizers"][0]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"], group["betas"][0]) == (0.5, 0.7, 0.3)
    assert group["lr"] == 0.5


def test_a_run_can_be_moved(tiny, call):
    call("train", *TINY, "--out_dir=a", "--max_iters=3")
    Path("a").rename("b")
    assert call("train", "--out_dir=b", "--init_from=resume", "--max_iters=6")[0] == 0
    assert not Path("a").exists() and torch.load("b/ckpt.pt", weights_only=True)["step"] == 6


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(tiny):
    """A signal saves step 3 before its evaluation; the resumed run evaluates and is killed."""
    evaluation = {"step": 3, "train_loss": 1.0, "val_loss": 1.0}
    lines = [{"step": 0, "val_loss": 2.0}, {"step": 3, "loss": 1.5}, evaluation]
    Path("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = new_run("--out_dir=.", "--max_iters=9")
    run.progress, run.is_resumed = Progress(step=3, evaluated_step=0), True
    log = Logger(run)
    log.evaluation(evaluation, is_best=False)
    log.close()
    assert metrics("metrics.jsonl") == lines


def test_dropout_differs_from_step_to_step_and_seed_to_seed():
    draws = set()
    for seed, step in ((1, 0), (1, 1), (2, 0), (2, 1)):
        devices.seed_step(seed, step)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4


# ---- one step ----------------------------------------------------------------------------------


def gradients_of(monkeypatch, run: Run) -> dict[str, torch.Tensor]:
    kept = {}

    def keep(loss, grad_norm, step):
        kept.update({name: p.grad.clone() for name, p in run.model.named_parameters()})
        return torch.ones(())  # leave the weights as they are

    with monkeypatch.context() as patch:
        patch.setattr(run.guard, "record", keep)
        kept["loss"] = train.train_step(run)[0]
    return kept


def test_masked_accumulation_equals_one_big_batch(tiny, monkeypatch):
    """The micro-steps hold 61, 3, ... targets that count: a mean of means would be wrong."""
    get_batch = dataset.Split.get_batch

    def masked(self, offsets):
        idx, targets = get_batch(self, offsets)
        rows = torch.from_numpy(offsets)[:, None]
        return idx, targets.masked_fill((idx * 7 + rows) % 64 < rows % 64, -1)

    monkeypatch.setattr(dataset.Split, "get_batch", masked)
    big = gradients_of(monkeypatch, new_run("--batch_size=8", "--gradient_accumulation_steps=1"))
    for flags in (
        ("--batch_size=2", "--gradient_accumulation_steps=4"),
        ("--batch_size=1", "--gradient_accumulation_steps=8"),
    ):
        parts = gradients_of(monkeypatch, new_run(*flags))
        for name, expected in big.items():
            torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_targets(tiny):
    run = new_run()
    idx, targets = run.data.train.get_batch(run.data.train.train_offsets(8, 1337, 0))
    expected = run.model(idx, targets)[1].item()
    assert train.train_step(run)[0].item() == pytest.approx(expected, rel=1e-6)


def test_gradients_are_clipped_and_their_norm_before_is_reported(tiny):
    free, clipped = new_run("--grad_clip=0"), new_run("--grad_clip=0.01")
    norms = [float(train.train_step(run)[1]) for run in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.01
    moments = [
        math.sqrt(sum(float(s["exp_avg"].square().sum()) for s in run.optimizers[0].state.values()))
        for run in (free, clipped)
    ]
    assert moments[1] / moments[0] == pytest.approx(0.01 / norms[0], rel=1e-3)


def test_only_matrices_are_decayed(tiny):
    run = new_run("--weight_decay=0.5", "--optimizer=muon")
    decays = {
        id(p): group["weight_decay"]
        for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]
    }  # fmt: skip
    for p in run.model.parameters():
        assert decays[id(p)] == (0.5 if p.dim() == 2 else 0.0)


@pytest.mark.parametrize(
    "flags", [["--optimizer=adamw"], ["--optimizer=muon"], ["--dtype=float16"]]
)
def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, call, monkeypatch, flags):
    train_step = train.train_step
    kept = {}

    def poisoned(run):
        if run.progress.step == 4:
            kept.update({name: p.clone() for name, p in run.model.state_dict().items()})
            forward = run.forward
            run.forward = lambda *a, **k: (None, forward(*a, **k)[1] * math.nan)
            try:
                return train_step(run)
            finally:
                run.forward, kept["run"] = forward, run
        return train_step(run)

    monkeypatch.setattr(train, "train_step", poisoned)
    code, _, err = call(
        "train", *TINY, *flags, "--max_iters=12", "--eval_interval=6", "--log_interval=2"
    )
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert "at step 5" in err and "learning_rate" in err
    run = kept.pop("run")
    assert same(kept, run.model.state_dict())
    assert torch.load("out/ckpt.pt", weights_only=True)["step"] == 0


def poison(monkeypatch, steps: set[int], value: float = math.nan):
    """Multiply the losses of these steps, counted from 1."""
    train_step = train.train_step

    def poisoned(run):
        forward = run.forward
        if run.progress.step + 1 in steps:
            run.forward = lambda *a, **k: (None, forward(*a, **k)[1] * value)
        try:
            return train_step(run)
        finally:
            run.forward = forward

    monkeypatch.setattr(train, "train_step", poisoned)


@pytest.mark.parametrize(
    "flags",
    [["--optimizer=adamw"], ["--optimizer=muon", "--average_decay=0.5"], ["--dtype=float16"]],
)
def test_updates_that_are_not_finite_are_skipped_and_told(tiny, call, monkeypatch, flags):
    flags = [*TINY, *flags, "--max_iters=9", "--skip_nonfinite=2", "--log_interval=2"]
    poison(monkeypatch, {4, 5})
    code, out, err = call("train", *flags, "--out_dir=whole")
    assert (code, err) == (0, "")
    assert "step 4: not finite, update skipped (1 of 2)" in out and "step 5: not finite" in out
    saved = torch.load("whole/ckpt.pt", weights_only=True)
    assert saved["step"] == 9 and saved["progress"]["skipped_steps"] == [4, 5]
    assert all(torch.isfinite(p).all() for p in saved["model"].values())
    moments = [s for o in saved["optimizers"] for s in o["state"].values()]
    assert all(torch.isfinite(t).all() for state in moments for t in state.values())
    assert {int(state["step"]) for state in moments if "step" in state} == {7}
    lines = metrics("whole/metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [4, 5]
    assert [line["loss"] for line in lines if line["step"] == 4 and "loss" in line] == [None]
    # A run that was stopped between the two goes on as if it had not been.
    call("train", *flags, "--out_dir=parts", "--max_iters=4", "--lr_decay_iters=9")
    call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=9", "--eval_interval=3")
    assert same(weights("whole/ckpt.pt"), weights("parts/ckpt.pt"))
    again = torch.load("parts/ckpt.pt", weights_only=True)
    assert again["progress"]["skipped_steps"] == [4, 5]
    poison(monkeypatch, {10})
    code, _, err = call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=12")
    assert code == 1 and is_one_error_line(err) and "at step 10" in err, "two were all"


def test_a_skipped_update_is_as_if_it_had_not_been_made(tiny, monkeypatch):
    for optimizer in ("adamw", "muon"):
        flags = ("--skip_nonfinite=1", f"--optimizer={optimizer}", "--average_decay=0.9")
        run = new_run(*flags)
        train.train_step(run)

        before = state_of(run)
        with monkeypatch.context() as patch:
            poison(patch, {2})
            train.train_step(run)
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True))
        train.train_step(run)
        assert not any(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True))


def state_of(run) -> list:
    """Copies of the moments and of the averaged weights."""
    moments = [p for o in run.optimizers for s in o.state.values() for p in s.values()]
    return [p.clone() for p in (*moments, *run.ema.average)]


@pytest.mark.parametrize(
    "flags", [["--optimizer=adamw"], ["--optimizer=muon"], ["--dtype=float16"]]
)
def test_an_infinite_loss_with_finite_gradients_leaves_the_weights(tiny, flags):
    run = new_run(*flags)
    forward = run.forward
    run.forward = lambda *a, **k: (None, forward(*a, **k)[1] + math.inf)
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    train.train_step(run)
    assert same(before, run.model.state_dict()) and run.guard.bad_steps.tolist() == [1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_lowers_the_loss_scale_and_makes_the_step_again(tiny, optimizer):
    """One overflow: nothing is updated by it, and the step is made after all."""
    flags = ("--dtype=float16", f"--optimizer={optimizer}", "--dropout=0.1")
    plain, overflowed = new_run(*flags), new_run(*flags)
    unscale = overflowed.scaler.unscale_
    calls = []

    def overflow_once(optimizer):
        if not calls:
            next(overflowed.model.transformer.h.parameters()).grad.fill_(math.inf)
            overflowed.model.transformer.h[0].attn.c_attn.weight.grad[0, 0] = math.inf
        calls.append(optimizer)
        unscale(optimizer)

    overflowed.scaler.unscale_ = overflow_once
    scale = overflowed.scaler.get_scale()
    train.train_step(plain), train.train_step(overflowed)
    assert overflowed.scaler.get_scale() == scale / 2 and overflowed.progress.step == 1
    for a, b in zip(plain.model.parameters(), overflowed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    adamw = overflowed.optimizers[-1]
    assert {int(state["step"]) for state in adamw.state.values()} == {1}


def test_a_val_loss_that_is_not_finite_saves_nothing(tiny, call, monkeypatch):
    monkeypatch.setattr(train, "evaluate_split", lambda *arguments: (math.inf, 0.0))
    code, _, err = call("train", *TINY)
    assert code == 1 and "not finite" in err and not list(Path("out").glob("[!.]*"))


def test_out_of_memory_says_what_to_do(tiny, call, monkeypatch):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(train, "train_step", full)
    code, _, err = call("train", *TINY)
    assert code == 1 and err.count("\n") == 1
    assert "halve batch_size=4 and double gradient_accumulation_steps" in err


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "MPS backend out of memory",
    ],
)
def test_every_allocators_complaint_is_recognised(message):
    with pytest.raises(RunError, match="out of memory: less"), devices.out_of_memory_advice("less"):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="a bug"), devices.out_of_memory_advice("less"):
        raise RuntimeError("a bug")


def test_a_full_disk_in_the_metrics_names_the_file(tiny, call, monkeypatch):
    write = Logger._write

    class FullDisk:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def failing(self, record):
        if record["step"] == 3:
            self.file.close()
            self.file = FullDisk()
        write(self, record)

    monkeypatch.setattr(Logger, "_write", failing)
    monkeypatch.setattr(Logger, "close", lambda self: None)
    code, _, err = call("train", *TINY)
    assert code == 1 and err.startswith("error: out/metrics.jsonl: No space left on device")


def test_a_slow_run_on_a_cpu_says_so_at_its_first_log_line(tiny, call, monkeypatch):
    monkeypatch.setattr("quill.training.log.SLOW_RUN_SECONDS", 0)
    out = call("train", *TINY)[1]
    assert out.index("config/shakespeare_char_cpu.py") < out.index("step 3")
    assert out.count("config/shakespeare_char_cpu.py") == 1


# ---- evaluation --------------------------------------------------------------------------------


def test_val_loss_is_the_mean_over_every_val_token_but_the_first(tiny):
    run = new_run()
    val = run.data.val.ids.long()
    total = 0.0
    for start in range(0, len(val) - 1, 16):
        window = val[start : start + 17]
        _, loss = run.model(window[None, :-1], window[None, 1:], reduction="sum")
        total += loss.item()
    assert train.evaluate(run)["val_loss"] == pytest.approx(total / (len(val) - 1), rel=1e-6)
    assert train.evaluate(run) == train.evaluate(run)


def test_bits_per_byte_count_the_bytes_of_the_text(folder, call):
    """Characters of one to three bytes, and ends of documents, which are no text."""
    Path("text.jsonl").write_text('{"text": "été — naïve"}\n{"text": "to sleep"}\n' * 60)
    val_text = ("été — naïve" + "to sleep") * 6
    for tokenizer in ("char", "byte"):
        argv = ("prepare", tokenizer, "--input=text.jsonl", f"--tokenizer={tokenizer}")
        assert call(*argv)[0] == 0
        run = new_run(f"--dataset={tokenizer}")
        n_tokens = len(val_text if tokenizer == "char" else val_text.encode()) + 12
        assert len(run.data.val) == n_tokens
        found = train.evaluate(run)
        bits = found["val_loss"] * n_tokens / math.log(2)
        assert found["val_bpb"] == pytest.approx(bits / len(val_text.encode()))


def test_evaluation_does_not_depend_on_the_batch_size(tiny):
    losses = [train.evaluate(new_run(f"--batch_size={n}"))["val_loss"] for n in (1, 7, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_samples_at_evaluations_change_nothing_else(tiny, call):
    flags = [*TINY, *DROPOUT, "--vocab_multiple=64"]
    call("train", *flags, "--out_dir=a")
    out = call("train", *flags, "--out_dir=b", "--sample_at_eval=30")[1]
    assert same(weights("a/ckpt.pt"), weights("b/ckpt.pt"))
    lines = metrics("b/metrics.jsonl")
    samples = [line.pop("sample") for line in lines if "val_loss" in line]
    assert lines == metrics("a/metrics.jsonl")
    assert len(set(samples)) == 5 and all(len(s) == 31 and f"\n{s}\n" in out for s in samples)
    out = call("train", "--out_dir=b", "--init_from=resume", "--eval_only=true")[1]
    assert out.endswith(f"\n{samples[-1]}\n")


def test_a_large_val_split_is_evaluated_in_part(tiny, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_TOKENS_EVALUATED_WHOLE", 100)
    run = new_run("--eval_iters=5")
    seen = []
    get_batch = run.data.val.get_batch
    run.data.val.get_batch = lambda starts: seen.extend(starts.tolist()) or get_batch(starts)
    train.evaluate(run)
    assert len([start for start in seen if start < len(run.data.val)]) == 5


# ---- schedule, device, dtype -------------------------------------------------------------------


def rate(step, **changes):
    config = TrainConfig(
        **{"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110} | changes
    )
    return get_lr(config, step)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("linear", {10: 1.0, 35: 0.775, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("wsd", {10: 1.0, 60: 1.0, 90: 1.0, 100: 0.55, 110: 0.1, 500: 0.1}),
    ],
)
def test_schedules(schedule, expected):
    warmup = {0: 1 / 11, 4: 5 / 11, 9: 10 / 11}
    for step, value in (warmup | expected).items():
        assert rate(step, lr_schedule=schedule) == pytest.approx(value), step
    early = rate(60, lr_schedule=schedule, lr_decay_iters=60)
    assert early == pytest.approx(0.1), "lr_decay_iters is where min_lr is reached"


def test_constant_schedules():
    assert rate(0, lr_schedule="constant") == rate(500, decay_lr=False) == 1.0
    assert rate(60, lr_schedule="wsd", wsd_decay_share=0.0) == 1.0


def test_no_warmup_and_no_steps():
    assert rate(0, warmup_iters=0) == 1.0
    assert rate(0, warmup_iters=0, max_iters=0) == 0.1


def test_muon_has_no_rate_of_its_own_schedule(tiny, call):
    code, _, err = call("train", *TINY, "--optimizer=muon", "--learning_rate=0")
    assert code == 2 and "Muon's rate rises and falls in proportion" in err


def test_a_rate_that_rises_instead_of_falling_is_said(tiny, call):
    code, out, _ = call("train", *TINY, "--learning_rate=1e-5", "--min_lr=1e-4", "--max_iters=1")
    assert code == 0 and "min_lr=0.0001 is above learning_rate=1e-05" in out


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_has_instructions_for_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert devices.pick_dtype("auto", torch.device("cpu")) is dtype
    assert devices.pick_dtype("float32", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_known_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert devices.peak_flops(cuda, torch.bfloat16) == peak
    assert devices.peak_flops(cuda, torch.float32) is None
    assert devices.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_padded_vocabulary(tiny, call):
    assert call("train", *TINY, "--vocab_multiple=64")[0] == 0
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert saved["model_config"]["vocab_size"] == 64 > len(saved["tokenizer"]["chars"])
    assert call("train", "--init_from=resume", "--max_iters=8")[0] == 0


def test_the_average_is_what_is_evaluated_and_kept_as_best(tiny, call):
    flags = ["--average_decay=0.5", "--max_iters=4", "--eval_interval=4"]
    run = new_run(*flags)
    expected = [p.detach().clone() for p in run.model.parameters()]
    for decay in (1 / 10, 2 / 11, 3 / 12, 4 / 13):
        train.train_step(run)
        expected = [
            decay * a + (1 - decay) * p
            for a, p in zip(expected, run.model.parameters(), strict=True)
        ]
    assert call("train", *TINY, *flags)[0] == 0
    best, latest = (torch.load(f"out/{f}.pt", weights_only=True) for f in ("best", "ckpt"))
    named = [name for name, _ in run.model.named_parameters()]
    for name, a in zip(named, expected, strict=True):
        assert torch.allclose(best["model"][name], a, atol=1e-6)
        assert torch.equal(latest["model"][name], run.model.state_dict()[name])
    run.model.load_state_dict(best["model"])
    run.ema = EMA(run.model, 0.0)
    assert train.evaluate(run)["val_loss"] == latest["best_val_loss"]


def test_an_average_that_does_not_fit_is_refused(tiny, call):
    call("train", *TINY, "--average_decay=0.5")
    saved = torch.load("out/ckpt.pt", weights_only=True)
    Path("out/ckpt.previous.pt").unlink()
    for broken in ([torch.ones(1)], [torch.ones(1)] * len(saved["average"]), "no list"):
        checkpoint.save_checkpoint(Path("out/ckpt.pt"), saved | {"average": broken})
        code, _, err = call("train", "--init_from=resume", "--max_iters=8")
        assert code == 2 and is_one_error_line(err) and "usable" in err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_what_has_not_begun(tiny, call, optimizer):
    flags = [*TINY, *DROPOUT, f"--optimizer={optimizer}"]
    call("train", *flags, "--out_dir=whole")
    call("train", *flags, "--out_dir=parts", "--max_iters=0", "--lr_decay_iters=12")
    call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=12")
    assert same(weights("whole/ckpt.pt"), weights("parts/ckpt.pt"))


def test_muon_is_pytorchs_with_query_key_and_value_apart():
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in ((24, 8), (8, 8), (8, 8), (32, 8), (8, 32))]
    ours = [torch.nn.Parameter(p.clone()) for p in whole]
    parts = [*whole[0].chunk(3), *whole[1:]]
    theirs = [torch.nn.Parameter(p.clone()) for p in parts]
    groups = [{"params": ours[:1], "parts": 3}, {"params": ours[1:], "parts": 1}]
    optimizers = [
        Muon(groups, 0.1, 0.9, 0.1, torch.bfloat16),
        torch.optim.Muon(theirs, 0.1, 0.1, 0.9),
    ]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in whole]
        for p, grad in zip(ours, grads, strict=True):
            p.grad = grad
        for p, grad in zip(theirs, [*grads[0].chunk(3), *grads[1:]], strict=True):
            p.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip([*ours[0].chunk(3), *ours[1:]], theirs, strict=True):
        assert torch.allclose(a, b, atol=0.02), "to bfloat16's rounding"
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_runs_and_samples_are_the_plain_ones(tiny, call):
    flags = [*TINY, "--position=rotary", "--qk_norm=true", "--mlp=swiglu"]
    call("train", *flags, "--out_dir=plain")
    call("train", *flags, "--out_dir=compiled", "--compile=true")
    losses = [
        [line["val_loss"] for line in metrics(f"{name}/metrics.jsonl") if "val_loss" in line]
        for name in ("plain", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 3
    sample = ["--out_dir=plain", "--device=cpu", "--dtype=float32", "--max_new_tokens=60"]
    plain = call("sample", *sample, "--num_samples=2")
    assert call("sample", *sample, "--num_samples=2", "--compile=true") == plain
    assert plain[0] == 0
