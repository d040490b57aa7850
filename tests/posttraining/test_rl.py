"""quill.rl from outside: it learns, resumes bit for bit, and says what it cannot do."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY, flat_tensors, is_one_error_line

from quill import settings
from quill.data import problems
from quill.posttraining.loop import Loop, load_start
from quill.posttraining.rewards import FileReward
from quill.rl import RLConfig, RLTask
from quill.training.checkpoint import load_checkpoint

START = [flag for flag in TINY if not flag.startswith(("--dataset", "--max_iters", "--block_size"))]
START += ["--dataset=addition", "--block_size=6", "--max_iters=60", "--eval_interval=60"]
RL = ["--start_from=out", "--out_dir=rl", "--max_iters=4", "--eval_interval=2", "--warmup_iters=0"]
RL += ["--prompts_per_step=8", "--completions=4", "--log_interval=1", "--checkpoint_seconds=0"]
RL += ["--learning_rate=1e-3", "--updates=2", "--kl_weight=0.01"]


@pytest.fixture
def policy(sums, call) -> Path:
    """A working folder with a run, `out`, of a model that adds single digits, not yet well."""
    assert call("train", *START)[0] == 0
    return sums


def records(out_dir: str) -> list[dict]:
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def weights(path: str) -> list:
    return flat_tensors(load_checkpoint(Path(path))["model"])


def write_reward(name: str, expression: str) -> None:
    Path(f"{name}.py").write_text(f"def reward(prompt, completion):\n    return {expression}\n")


def test_a_step_that_is_not_finite_is_skipped_once_and_told(policy, call, monkeypatch):
    """However many updates it has."""
    write_reward("ones", "completion.count('1')")
    losses = RLTask.losses

    def poisoned(task, step):
        for loss, report in losses(task, step):
            yield loss * (math.nan if step == 1 else 1.0), report

    monkeypatch.setattr(RLTask, "losses", poisoned)
    code, out, err = call("rl", *RL, "--reward=ones.py", "--skip_nonfinite=1")
    assert (code, err) == (0, ""), err
    assert "step 2: not finite, update skipped (1 of 1)" in out and "objective nan" in out
    assert load_checkpoint(Path("rl/ckpt.pt"))["progress"]["skipped_steps"] == [2]


def test_rewards_are_raised(policy, call):
    """By a policy that is paid for writing one digit; what it learned is sampled as any other."""
    write_reward("ones", "completion.count('1')")
    flags = [*RL, "--reward=ones.py", "--max_iters=40", "--eval_interval=40"]
    code, out, err = call("rl", *flags, "--learning_rate=1e-2", "--kl_weight=0")
    assert (code, err) == (0, ""), err
    evaluations = [record for record in records("rl") if "val_loss" in record]
    first, last = evaluations[0], evaluations[-1]
    assert last["val_reward"] > first["val_reward"] + 1 and last["val_kl"] > first["val_kl"] == 0
    names = {"reward", "kl", "entropy", "clipped", "length", "groups_used"}
    assert names < records("rl")[1].keys() and "val_exact" in last
    code, out, _ = call("sample", "--out_dir=rl", "--start=2+3=", "--num_samples=1")
    assert code == 0 and "1" in out
    assert call("evaluate", "--out_dir=rl")[0] == 0
    assert call("plot", "--out_dir=rl", "--pictures=loss")[0] == 0
    assert {"val reward", "val exact"} < {*re.findall(">([^<]+)<", Path("rl/loss.svg").read_text())}


@pytest.mark.parametrize("value", ["1", "True", "np.bool_(1)", "np.array(1)", "torch.ones(1)"])
def test_whatever_is_a_number_is_a_reward(folder, value):
    Path("one.py").write_text(f"import numpy as np, torch\ndef reward(*_):\n    return {value}\n")
    assert FileReward(Path("one.py")).of("a", "b") == 1.0


def test_the_answers_of_the_dataset_are_the_reward(policy, call):
    """Each completion of an evaluation is compared with the answer as a person reads it."""
    flags = [*RL, "--max_iters=0", "--val_prompts=20", "--temperature=0.001"]
    assert call("rl", *flags)[0] == 0
    [record] = records("rl")
    assert record["val_reward"] == pytest.approx(record["val_exact"]), "at 0.001 it is greedy"


def test_screening_picks_the_prompts_that_a_first_try_got_wrong(policy):
    write_reward("even", "int(prompt[0] in '02468')")
    flags = [*RL, "--dataset=addition", "--reward=even.py", "--screened=4"]
    config = settings.load(RLConfig, flags, usage="")
    task = Loop(config, None, load_start(config), RLTask).task
    for step in range(3):
        prompts = [task.train.prompt(i) for i in task.pick_prompts(step)]
        first = [task.data.tokenizer.chars[ids[0]] for ids in prompts]
        assert len(first) == 8 and not {*first} & {*"02468"}


def test_rewards_that_are_all_the_same_change_no_weight(policy, call):
    write_reward("zero", "0")
    assert call("rl", *RL, "--reward=zero.py", "--kl_weight=0")[0] == 0
    pairs = zip(weights("rl/ckpt.pt"), weights("out/best.pt"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(record["groups_used"] == 0 for record in records("rl") if "reward" in record)


def test_a_resumed_run_is_the_run_that_was_not_stopped(policy, call):
    assert call("rl", *RL)[0] == 0
    whole = load_checkpoint(Path("rl/ckpt.pt"), for_resume=True), records("rl")
    flags = [*RL, "--lr_decay_iters=4", "--out_dir=parts"]
    assert call("rl", *flags, "--max_iters=2")[0] == 0
    assert call("rl", "--out_dir=parts", "--init_from=resume", "--max_iters=4")[0] == 0
    parts = load_checkpoint(Path("parts/ckpt.pt"), for_resume=True), records("parts")
    for name in ("model", "optimizers"):
        a, b = flat_tensors(whole[0][name]), flat_tensors(parts[0][name])
        assert all(map(torch.equal, a, b)) and len(a) == len(b) > 2
    clocks = ("ms_per_step", "seconds")
    for record in whole[1] + parts[1]:
        for name in clocks:
            record.pop(name, None)
    assert whole[1] == parts[1] and len(parts[1]) == 4 + 3


def test_only_evaluating_writes_nothing(policy, call):
    code, out, err = call("rl", *RL, "--eval_only=true")
    assert (code, err) == (0, "") and "val reward" in out and not Path("rl").exists()


def test_a_resume_of_something_else_is_refused(policy, call, monkeypatch):
    assert call("rl", *RL)[0] == 0
    code, _, err = call("rl", "--out_dir=rl", "--init_from=resume", "--max_iters=3")
    assert code == 2 and is_one_error_line(err) and "max_iters=3" in err
    write_reward("mine", "len(completion)")
    assert call("rl", *RL, "--reward=mine.py", "--out_dir=rl-mine", "--max_iters=1")[0] == 0
    write_reward("mine", "-len(completion)")
    code, _, err = call("rl", "--out_dir=rl-mine", "--init_from=resume", "--max_iters=2")
    assert (
        code == 2
        and is_one_error_line(err)
        and "reward=mine.py is not what the run began with" in err
    )
    monkeypatch.setattr(problems, "SEED", 1)
    assert call("prepare", "addition", "--overwrite=true")[0] == 0
    code, _, err = call("rl", "--out_dir=rl", "--init_from=resume")
    assert code == 2 and is_one_error_line(err) and "another text" in err


def test_a_start_with_dropout_is_trained_without(sums, call):
    """Or the policy that is trained would not be the one that wrote the completions."""
    assert call("train", *START, "--dropout=0.5")[0] == 0
    assert call("rl", *RL, "--max_iters=1", "--updates=1", "--learning_rate=0")[0] == 0
    steps = [record for record in records("rl") if "reward" in record]
    assert [record["kl"] for record in steps] == [0.0]
    assert load_checkpoint(Path("rl/ckpt.pt"))["model_config"]["dropout"] == 0


def test_ctrl_c_saves_and_says_how_to_go_on(policy, call, monkeypatch):
    step = Loop.step

    def interrupted(self):
        record = step(self)
        signal.raise_signal(signal.SIGINT)
        return record

    monkeypatch.setattr(Loop, "step", interrupted)
    code, out, _ = call("rl", *RL)
    assert code == 130 and "python -m quill.rl --out_dir=rl --init_from=resume" in out
    assert load_checkpoint(Path("rl/ckpt.pt"), for_resume=True)["step"] == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--start_from="], "--start_from=DIR"),
        (["--start_from=nowhere"], "nowhere"),
        (["--out_dir=out"], "already holds a run"),
        (["--out_dir=out", "--overwrite=true"], "the run that it starts from"),
        (["--dtype=float16"], "loss scaling"),
        (["--dataset=tiny"], "tokenizer"),
        (["--dataset=texts", "--start_from=texts"], "without prompts"),
        (["--reward=nowhere.py"], "nowhere.py"),
        (["--reward=nowhere"], "nowhere"),
        (["--reward=out"], "no run of quill.reward"),
        (["--reward=empty.py"], "defines no function"),
        (["--reward=broken.py"], "broken.py, line 1: ZeroDivisionError"),
        (["--reward=fails.py"], "fails.py"),
        (["--reward=text.py"], "'much'"),
        (["--reward=large.py"], "no number that float32 holds"),
        (["--reward=exits.py"], "exits.py"),
        (["--judge=exits.py"], "exits.py"),
        (["--reward=pipe.py"], "no reward file"),
        (["--init_from=resume", "--out_dir=out"], "python train.py --out_dir=out"),
        (["--completions=1"], "completions"),
        (["--learning_rate=1e9", "--grad_clip=0"], ""),
    ],
)
def test_what_cannot_work_is_one_line(policy, call, text, flags, said):
    Path("text.txt").write_text(text)
    for name in ("tiny", "texts"):
        assert call("prepare", name, "--input=text.txt")[0] == 0
    train = [*TINY, "--dataset=texts", "--out_dir=texts", "--max_iters=0"]
    assert call("train", *train)[0] == 0
    Path("empty.py").write_text("")
    Path("broken.py").write_text("1 / 0\n")
    write_reward("fails", "{}[completion]")
    write_reward("text", "'much'")
    write_reward("large", "10**400")
    write_reward("exits", "exit()")
    os.mkfifo("pipe.py")
    code, _, err = call("rl", *RL, *flags)
    assert code == (1 if "1e9" in flags[0] else 2) and is_one_error_line(err) and said in err, err


@pytest.mark.parametrize("n", ["2", "two", ""])
def test_several_processes_are_refused(folder, call, monkeypatch, n):
    monkeypatch.setenv("WORLD_SIZE", n)
    code, _, err = call("rl", *RL)
    assert code == 2 and is_one_error_line(err) and "one process" in err


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_a_run_is_resumed_by_its_own_command(policy, call, init_from):
    assert call("rl", *RL)[0] == 0
    before = weights("rl/ckpt.pt")
    code, _, err = call("train", *START, "--out_dir=rl", f"--init_from={init_from}")
    assert code == 2 and is_one_error_line(err) and "python -m quill.rl" in err, err
    assert all(map(torch.equal, before, weights("rl/ckpt.pt")))
