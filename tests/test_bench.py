from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, TINY, is_one_error_line


def figures_of(call, *flags) -> dict:
    code, out, err = call("bench", *flags, "--json=figures.json")
    assert (code, err) == (0, "")
    figures = json.loads(Path("figures.json").read_text())
    assert [line.split()[0] for line in out.splitlines()] == list(figures)
    return figures


def test_the_figures_of_a_run_belong_together(tiny, call):
    figures = figures_of(call, *TINY, "--timed_steps=10")
    assert figures["tokens_per_step"] == 2 * 4 * 16
    per_s = 1000 * figures["tokens_per_step"] / figures["ms_per_step"]
    assert figures["tokens_per_s"] == pytest.approx(per_s)
    assert figures["tflops_per_s"] == pytest.approx(per_s * figures["flops_per_token"] / 1e12)
    assert figures["ms_per_step_lowest"] <= figures["ms_per_step"] <= figures["ms_per_step_highest"]
    assert figures["mfu"] is None and figures["start_up_s"] > 0
    assert all(
        figures[f"{what}_{n}_tokens_per_s"] > 0
        for what in ("prefill", "decode")
        for n in (1, 10, 64)
    )
    assert not Path("out").exists()


def test_a_plan_counts_every_kind_of_memory(folder, call):
    flags = [*TINY, "--vocab_size=65", "--gradient_accumulation_steps=1", "--batch_size=64"]
    one = figures_of(call, *flags, "--plan")
    weights_bytes = 4 * one["parameters"] + 4 * 16 * 16  # and the table of positions
    assert one["weights_MB"] == pytest.approx(weights_bytes / 1e6)
    assert one["optimizer_MB"] == pytest.approx(2 * weights_bytes / 1e6, rel=0.01)  # AdamW's two
    assert one["tokens"] == 6 * 64 * 16
    kinds = ("weights_MB", "gradients_MB", "optimizer_MB", "activations_MB")
    assert one["memory_MB"] == pytest.approx(sum(one[kind] for kind in kinds))
    four = figures_of(call, *flags, "--plan", "--devices=4")
    assert four["activations_MB"] == pytest.approx(one["activations_MB"] / 4, rel=0.1)
    assert four["training_s"] == pytest.approx(one["training_s"] / 4)


PEAK = """
import sys
import runtime, settings
from train import TrainConfig
from trainer import Trainer
import torch
trainer = Trainer(settings.load(TrainConfig, sys.argv[1:], usage=""))
for _ in range(2):
    trainer.train_step()
print(runtime.peak_memory_bytes(trainer.device) / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the process's memory as Linux does")
@pytest.mark.parametrize("flags", [["--mlp=swiglu"], ["--dropout=0.2", "--position=rotary"]])
def test_a_plan_is_close_to_what_training_takes(tiny, call, flags):
    flags = [*TINY, "--n_embd=128", "--n_layer=4", "--gradient_accumulation_steps=1", *flags]
    # Every larger tensor is given back when it is freed, so that the process's peak is theirs.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(REPO)}
    planned, measured = [], []
    for batch in ("--batch_size=8", "--batch_size=1024"):
        line = [sys.executable, "-c", PEAK, *flags, batch]
        run = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        measured.append(float(run.stdout))
        planned.append(figures_of(call, *flags, batch, "--plan")["memory_MB"])
    # The difference leaves out what Python and PyTorch themselves take.
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.1)
    assert planned[1] > 200


def test_what_cannot_be_planned_or_measured(folder, call):
    for flags, complaint in [
        (["--plan", "--dataset=nowhere"], "not prepared"),
        (
            [
                "--plan",
                "--vocab_size=65",
                "--devices=3",
                "--batch_size=4",
                "--gradient_accumulation_steps=1",
            ],
            "do not divide",
        ),
        (["--dataset=nowhere"], "not prepared"),
        (["--timed_steps=1"], "timed_steps"),
    ]:
        code, _, err = call("bench", *flags)
        assert code == 2 and is_one_error_line(err) and complaint in err
