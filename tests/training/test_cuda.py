"""What only a GPU can show. Each test is skipped, visibly, where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, Uncached
from test_parallel import processes

import train
from model import GPT, GPTConfig, generate
from quill import settings
from train import TrainConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the compiler's advice
]

ON_GPU = [flag for flag in TINY if not flag.startswith(("--device", "--dtype"))]
DROPOUT = ["--dropout=0.2", "--max_iters=12", "--log_interval=1"]


def test_cuda_is_taken_without_a_flag(tiny, call):
    code, out, err = call("train", *ON_GPU, "--compile=false")
    assert (code, err) == (0, "") and torch.cuda.get_device_name() in out
    assert call("sample", "--num_samples=2", "--max_new_tokens=40")[0] == 0


def test_samples_at_evaluations_and_pictures_of_a_gpus_run(tiny, call):
    flags = ["--sample_at_eval=40", "--dtype=bfloat16", "--max_iters=2"]
    assert call("train", *ON_GPU, *flags, "--out_dir=first")[0] == 0
    assert "sample" in Path("first/metrics.jsonl").read_text()
    assert call("train", *ON_GPU, *flags, "--init_from=first")[0] == 0
    assert call("plot", "--out_dir=out")[0] == 0


def test_compiled_and_plain_runs_agree(tiny, call):
    ways = {
        "plain": ["--compile=false"],
        "compiled": [],
        "recorded": ["--compile_mode=reduce-overhead"],  # TINY accumulates over two micro-steps
    }
    losses = []
    for name, flags in ways.items():
        assert call("train", *ON_GPU, "--dtype=float32", f"--out_dir={name}", *flags)[0] == 0
        lines = map(json.loads, Path(f"{name}/metrics.jsonl").read_text().splitlines())
        losses.append([line["val_loss"] for line in lines if "val_loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)


def test_compiled_sampling_writes_the_same_text(tiny, call):
    call("train", *ON_GPU, "--compile=false", "--max_iters=40")
    torch.set_float32_matmul_precision("highest")  # training allows TF32
    flags = ["--num_samples=2", "--max_new_tokens=60", "--dtype=float32"]
    plain = call("sample", *flags)
    assert call("sample", *flags, "--compile=true") == plain and plain[0] == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--compile=false"],
        ["--optimizer=muon", "--compile=false"],
        ["--deterministic=true"],
        ["--deterministic=true", "--optimizer=muon", "--dtype=bfloat16"],
    ],
)
def test_resume_is_bitwise_equal_to_never_stopping(tiny, call, flags):
    flags = [*ON_GPU, *DROPOUT, *flags]
    call("train", *flags, "--out_dir=whole")
    call("train", *flags, "--out_dir=parts", "--max_iters=6", "--lr_decay_iters=12")
    call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=12")
    whole, parts = (torch.load(f"{d}/ckpt.pt", weights_only=True) for d in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


@pytest.mark.parametrize(
    "flags",
    [["--dtype=bfloat16"], ["--dtype=float32"], ["--optimizer=muon", "--average_decay=0.9"]],
)
def test_a_step_does_not_wait_for_the_device(tiny, flags):
    run = train.setup(settings.load(TrainConfig, [*ON_GPU, "--compile=false", *flags], usage=""))
    train.train_step(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.train_step(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_on_one_gpu_make_the_run_of_one(tiny, call, parallel):
    """Through gloo: nccl wants a GPU for each."""
    flags = [*ON_GPU, "--dtype=float32", "--compile=false", "--device=cuda:0"]
    assert call("train", *flags, "--out_dir=one")[0] == 0
    processes(2, *flags, "--out_dir=two", "--backend=gloo", f"--parallel={parallel}")
    one, two = (torch.load(f"{d}/best.pt", weights_only=True) for d in ("one", "two"))
    assert one["best_val_loss"] == pytest.approx(two["best_val_loss"], rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_make_the_run_of_one(tiny, call, parallel):
    flags = [*ON_GPU, "--dtype=float32"]
    assert call("train", *flags, "--out_dir=one")[0] == 0
    processes(2, *flags, "--out_dir=two", f"--parallel={parallel}")
    one, two = (torch.load(f"{d}/best.pt", weights_only=True) for d in ("one", "two"))
    assert one["best_val_loss"] == pytest.approx(two["best_val_loss"], rel=1e-3)


def test_a_gradient_that_is_not_finite_leaves_the_weights(tiny):
    run = train.setup(settings.load(TrainConfig, [*ON_GPU, "--compile=false"], usage=""))
    train.train_step(run)
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    forward, run.forward = run.forward, lambda *a, **k: (None, forward(*a, **k)[1] * float("nan"))
    train.train_step(run)
    run.forward = forward
    train.train_step(run)
    assert run.guard.bad_steps.tolist() == [2]
    assert all(torch.equal(p, before[name]) for name, p in run.model.state_dict().items())


def test_float16_trains_with_loss_scaling(tiny, call):
    assert call("train", *ON_GPU, "--dtype=float16", "--compile=false", "--max_iters=40")[0] == 0
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 0 and saved["progress"]["best_val_loss"] < 3.4


def test_cached_equals_uncached_and_the_cpu():
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 11, 2, 2, 32, position="rotary")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx, noise = torch.zeros(3, 1, dtype=torch.int64), torch.rand(3, 40)
    texts = []
    for device, decoder in (("cpu", model), ("cuda", model), ("cuda", Uncached(model))):
        model.to(device)
        uniform = iter(noise.T.to(device)).__next__
        steps = generate(decoder, idx.to(device), 40, uniform=uniform)
        texts.append(torch.stack([*steps]).cpu())
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


def test_a_model_too_large_for_the_device_says_what_to_do(tiny, call):
    flags = ["--n_embd=4096", "--n_head=32", "--batch_size=100000", "--compile=false"]
    code, _, err = call("train", *ON_GPU, *flags)
    assert code == 1 and err.count("\n") == 1 and "out of memory: halve" in err
