from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, TINY, is_one_error_line

DROP = "--dropout=0.1"
ON_A_GPU = ["--device=cuda", "--dtype=auto"]


def figures_of(call, *flags) -> dict:
    Path("figures.json").unlink(missing_ok=True)
    code, out, err = call("bench", *flags, "--json=figures.json")
    assert (code, err) == (0, "")
    figures = json.loads(Path("figures.json").read_text())
    assert [line.split()[0] for line in out.splitlines()] == list(figures)
    return figures


def test_a_bigram_is_measured_as_well(tiny, call):
    figures = figures_of(call, *TINY, "--model=bigram", "--timed_steps=10")
    assert figures["decode_1_tokens_per_s"] > 0


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
    assert one["weights_MB"] == one["gradients_MB"] == pytest.approx(weights_bytes / 1e6)
    assert one["optimizer_MB"] == pytest.approx(2 * weights_bytes / 1e6, rel=0.01)  # AdamW's two
    assert one["tokens"] == 6 * 64 * 16
    at_most = sum(
        one[f"{kind}_MB"] for kind in ("weights", "gradients", "optimizer", "activations")
    )
    assert at_most - one["gradients_MB"] <= one["memory_MB"] <= at_most
    four = figures_of(call, *flags, "--plan", "--devices=4")
    assert four["activations_MB"] == pytest.approx(one["activations_MB"] / 4, rel=0.1)
    assert four["training_s"] == pytest.approx(one["training_s"] / 4)


def test_a_plan_knows_what_else_takes_memory(folder, call):
    def memory(*more) -> float:
        flags = [*TINY, "--vocab_size=65", "--gradient_accumulation_steps=1", "--batch_size=64"]
        return figures_of(call, *flags, "--plan", *more)["memory_MB"]

    once = memory()
    weights = figures_of(call, *TINY, "--vocab_size=65", "--plan")["weights_MB"]
    assert memory("--average_decay=0.9") == pytest.approx(once + weights, rel=0.01)
    accumulated = memory("--gradient_accumulation_steps=2")
    assert accumulated == pytest.approx(once + weights, rel=0.02), (
        "the first micro-step's gradients"
    )
    assert memory("--gradient_accumulation_steps=2", "--devices=2") == once
    as_gpu = [memory(*ON_A_GPU, "--compile=false", flag) for flag in ("--dropout=0", DROP)]
    assert as_gpu[0] < 0.9 * once, "bfloat16"
    assert as_gpu[0] < as_gpu[1] < 0.8 * memory(DROP), "no masks in attention"


def test_a_plan_is_of_the_compiled_step_where_the_training_is_compiled(folder, call):
    def planned(*more) -> dict:
        flags = [*TINY, "--vocab_size=65", "--gradient_accumulation_steps=1", "--batch_size=64"]
        return figures_of(call, *flags, "--plan", *more)

    eager, compiled = planned(*ON_A_GPU, "--compile=false"), planned(*ON_A_GPU)
    assert (eager["compiled"], compiled["compiled"]) == (False, True)
    assert not planned()["compiled"] and planned("--compile=true")["compiled"]
    assert compiled["memory_MB"] < 0.95 * eager["memory_MB"]
    assert compiled["optimizer_MB"] == eager["optimizer_MB"]
    twice = planned(*ON_A_GPU, "--batch_size=128")
    assert twice["activations_MB"] == pytest.approx(2 * compiled["activations_MB"], rel=0.05)
    accumulated = planned(*ON_A_GPU, "--gradient_accumulation_steps=2")
    both = compiled["memory_MB"] + compiled["gradients_MB"]
    assert accumulated["memory_MB"] == pytest.approx(both)
    blocks = planned(*ON_A_GPU, "--compile_mode=blocks")
    assert blocks["memory_MB"] > compiled["memory_MB"], "its loss is not compiled"


GPT2 = ["gpt2.py", "--vocab_multiple=50304", "--gradient_accumulation_steps=1"]


@pytest.mark.parametrize(
    "flags, peak_GB",
    [
        (["speedrun.py", "--dropout=0.2"], 1.60),
        *(
            pytest.param(flags, peak_GB, marks=pytest.mark.slow)
            for flags, peak_GB in [
                (["speedrun.py", "--dropout=0.2", "--compile=false"], 2.10),
                (["shakespeare_char.py"], 1.77),
                (["shakespeare_char.py", "--compile=false"], 2.14),
                (GPT2, 6.81),
                ([*GPT2, "--batch_size=64"], 28.07),
                ([*GPT2, "--gradient_accumulation_steps=2"], 7.30),
                ([*GPT2, "--compile_mode=blocks"], 7.19),
                ([*GPT2, "--compile=false"], 7.64),
                ([*GPT2, "--compile=false", "--batch_size=64"], 25.51),
            ]
        ),
    ],
)
def test_a_plan_for_a_gpu_is_close_to_the_peak_of_its_allocator(folder, call, flags, peak_GB):
    """Which was read on a null GPU: docs/results.md, "Planning"."""
    flags = [str(REPO / "config" / flags[0]), *flags[1:], "--vocab_size=65", "--device=cuda"]
    assert figures_of(call, *flags, "--plan")["memory_MB"] == pytest.approx(1000 * peak_GB, rel=0.1)


PEAK = """
import sys
import train
from quill import settings
from quill.training import devices
run = train.setup(settings.load(train.TrainConfig, sys.argv[1:], usage=""))
for _ in range(2):
    train.train_step(run)
print(devices.peak_memory_bytes(run.device) / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the process's memory as Linux does")
@pytest.mark.parametrize(
    "flags",
    [
        ["--mlp=swiglu", "--dropout=0.2", "--position=rotary"],
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_a_plan_is_close_to_what_training_takes(tiny, call, flags):
    flags = [*TINY, "--n_embd=128", "--n_layer=4", "--gradient_accumulation_steps=1", *flags]
    # Every larger tensor is given back when it is freed, so that the process's peak is theirs.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPO)
    planned, measured = [], []
    for batch in ("--batch_size=8", "--batch_size=512"):
        line = [sys.executable, "-c", PEAK, *flags, batch]
        run = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        measured.append(float(run.stdout))
        planned.append(figures_of(call, *flags, batch, "--plan")["memory_MB"])
    # The difference leaves out what Python and PyTorch themselves take.
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.1)
    assert planned[1] > 100


def test_what_cannot_be_planned_or_measured(folder, call):
    Path("notes.txt").write_text("mine")
    for flags, complaint in [
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
        (["--devices=4", "--vocab_size=500"], "devices, vocab_size: only with --plan"),
        (["--init_from=resume"], "init_from=resume"),
        (["--json=nowhere/figures.json"], "no such folder"),
        (["--json=notes.txt"], "notes.txt exists already"),
        (["--plan", "--block_size=4000000000000000000"], "block_size"),
        (["--plan", "--block_size=1000000", "--batch_size=1000"], "can be planned"),
    ]:
        code, _, err = call("bench", *flags)
        assert code == 2 and is_one_error_line(err) and complaint in err
