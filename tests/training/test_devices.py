"""What is chosen for a device, and what is said about it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import TINY

from quill.errors import InputError
from quill.training import checks, devices
from quill.training.checkpoint import Progress
from quill.training.log import StepTimer
from train import TrainConfig

GPU = torch.device("cuda", 0)


def no_compiler(function):
    def compiled(*arguments):
        raise RuntimeError("Failed to find C compiler.\nSet TORCHDYNAMO_VERBOSE=1")

    return compiled


def test_without_a_compiler_auto_goes_on_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    assert devices.pick_compile("auto", GPU) is False
    assert capsys.readouterr().err == (
        "without torch.compile, so slower: Failed to find C compiler.\n"
    )
    with pytest.raises(InputError, match=r"compile=true: .* C compiler\.; leave"):
        devices.pick_compile(True, torch.device("cpu"))


@pytest.mark.parametrize(("backend", "is_refused"), [("gloo", True), ("nccl", False)])
def test_fsdp_through_gloo_on_gpus_is_refused(monkeypatch, backend, is_refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainConfig(parallel="fsdp", backend=backend)
    expected = pytest.raises(InputError, match="backend=nccl") if is_refused else nullcontext()
    with expected:
        checks.check_processes(config, GPU, torch.float32)


def test_where_nothing_is_compiled_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    assert devices.pick_compile(False, GPU) is False
    assert devices.pick_compile("auto", torch.device("cpu")) is False


@pytest.mark.parametrize(("dropout", "allowed"), [(0.0, True), (0.25, True), (0.2, False)])
def test_cudnn_attention_is_left_out_where_it_would_round_dropout(monkeypatch, dropout, allowed):
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    settings = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", settings.append)
    precision = torch.get_float32_matmul_precision()
    devices.set_up_device(GPU, deterministic=False, dropout=dropout)
    torch.set_float32_matmul_precision(precision)
    assert settings == [allowed]


def test_the_pace_leaves_out_a_compilation():
    timer = StepTimer(100, 1.0, torch.device("cpu"), torch.float32, compiles=True)
    timer.start(Progress())
    assert timer.lap(1) == {"ms_per_step": None, "tokens_per_s": None, "mfu": None}
    assert timer.lap(2)["ms_per_step"] > 0


def test_compiling_is_said_first_and_the_first_step_has_no_pace(tiny, call, monkeypatch):
    monkeypatch.setattr(devices, "pick_compile", lambda setting, device: True)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    code, out, _ = call("train", *TINY, "--log_interval=1")
    lines = out.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith("compiling")]
    first = next(i for i, line in enumerate(lines) if line.startswith("step 1/"))
    assert code == 0 and said == [2] and "step 0" in lines[3]
    assert "ms/step" not in lines[first] and "ms/step" in lines[first + 1]
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [r["ms_per_step"] is None for r in records if "loss" in r] == [True] + [False] * 5
