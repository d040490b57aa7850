"""Twenty kills at random moments of one run, many inside a checkpoint write; nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, command

KILLS = 20
# Evaluating and saving after every step, a model of a few megabytes: most of the time is writing.
FLAGS = [
    *TINY,
    *("--n_embd=128", "--max_iters=600", "--eval_interval=1", "--eval_iters=1", "--log_interval=7"),
    *("--dropout=0.1", "--optimizer=muon"),
]


def start(*flags: str) -> subprocess.Popen:
    line = [sys.executable, REPO / "train.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_a_step(run: subprocess.Popen) -> None:
    while "val loss" not in (line := run.stdout.readline()):
        assert line, f"ended with {run.wait()}"


def steps_of(out_dir: str) -> list[int]:
    lines = Path(out_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
def test_killed_and_resumed_twenty_times(tiny):
    rng = random.Random(1)
    assert command("train", *FLAGS, "--out_dir=whole", timeout=600).returncode == 0
    run = start(*FLAGS, "--out_dir=parts")
    inside_a_write = 0
    for kill in range(KILLS):
        wait_for_a_step(run)
        time.sleep(rng.uniform(0, 0.3))
        while kill % 2 and not any(Path("parts").glob("*.pt.tmp")):
            pass  # every other kill waits for a write to begin
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        inside_a_write += any(Path("parts").glob("*.tmp"))
        assert torch.load("parts/ckpt.pt", weights_only=True)["step"] < 600, "killed before the end"
        run = start("--out_dir=parts", "--init_from=resume")
    run.communicate(timeout=600)
    assert run.returncode == 0
    whole, parts = (torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert steps_of("whole") == steps_of("parts")
    assert inside_a_write >= 5, f"{inside_a_write} of {KILLS} kills were inside a write"
    print(f"{inside_a_write} of {KILLS} kills were inside a write")
