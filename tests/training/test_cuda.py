"""What only a GPU can show. Each test is skipped, visibly, where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, Uncached
from test_parallel import processes
from torch.nn.attention import SDPBackend

import train
from model import GPT, GPTConfig, generate
from quill import settings
from quill.sampling.decoder import Decoder
from quill.training import devices
from train import TrainConfig

pytestmark = [
    pytest.mark.cuda,
    # The compiler's advice, and what its import warns of.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiled_recorded_and_plain_runs_agree(tiny, call, optimizer):
    ways = {
        "plain": ["--compile=false", "--cuda_graph=false"],
        "compiled": ["--compile=true", "--cuda_graph=false"],  # not auto, which may do without
        "recorded": ["--compile=false", "--cuda_graph=true"],
        "both": ["--compile=true", "--cuda_graph=true"],
    }
    losses = []
    for name, flags in ways.items():
        flags = [*flags, "--dtype=float32", "--average_decay=0.9", f"--optimizer={optimizer}"]
        assert call("train", *ON_GPU, f"--out_dir={name}", *flags)[0] == 0
        lines = map(json.loads, Path(f"{name}/metrics.jsonl").read_text().splitlines())
        losses.append([line["val_loss"] for line in lines if "val_loss" in line])
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_is_the_plain_step_dropout_and_rates_included(tiny, optimizer):
    """Capture must not have kept a number of its own step: a rate, a decay, a seed."""
    flags = [*ON_GPU, "--compile=false", "--dropout=0.2", "--average_decay=0.9"]
    flags += ["--deterministic=true", f"--optimizer={optimizer}"]
    results = []
    for recorded in ("false", "true"):
        argv = [*flags, f"--cuda_graph={recorded}"]
        run = train.setup(settings.load(TrainConfig, argv, usage=""))
        losses = [train.train_step(run)[0].item() for _ in range(6)]
        results.append((losses, [p.clone() for p in [*run.model.parameters(), *run.ema.average]]))
    assert results[0][0] == results[1][0] and len(set(results[0][0])) == 6
    pairs = zip(results[0][1], results[1][1], strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)


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
        ["--compile=false", "--cuda_graph=false"],
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
    [
        ["--dtype=bfloat16"],
        ["--dtype=float32", "--cuda_graph=false"],
        ["--optimizer=muon", "--average_decay=0.9"],
        ["--optimizer=muon", "--average_decay=0.9", "--cuda_graph=false"],
    ],
)
def test_a_step_does_not_wait_for_the_device(tiny, flags):
    run = train.setup(settings.load(TrainConfig, [*ON_GPU, "--compile=false", *flags], usage=""))
    train.train_step(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.train_step(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_processes_on_one_gpu_make_the_run_of_one(tiny, call):
    """Through gloo: nccl wants a GPU for each."""
    flags = [*ON_GPU, "--dtype=float32", "--compile=false", "--device=cuda:0"]
    assert call("train", *flags, "--out_dir=one")[0] == 0
    processes(2, *flags, "--out_dir=two", "--backend=gloo")
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
    flags = ["--compile=false", "--cuda_graph=false"]
    run = train.setup(settings.load(TrainConfig, [*ON_GPU, *flags], usage=""))
    train.train_step(run)
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    forward, run.forward = run.forward, lambda *a, **k: (None, forward(*a, **k)[1] * float("nan"))
    train.train_step(run)
    run.forward = forward
    train.train_step(run)
    assert run.guard.bad_steps.tolist() == [2]
    assert all(torch.equal(p, before[name]) for name, p in run.model.state_dict().items())


def test_a_recorded_step_that_is_not_finite_leaves_the_weights(tiny):
    run = train.setup(settings.load(TrainConfig, [*ON_GPU, "--compile=false"], usage=""))
    train.train_step(run)
    gain = run.model.transformer.ln_f.weight
    kept = gain.detach().clone()
    gain.data.fill_(float("nan"))
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    train.train_step(run)
    after = run.model.state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items() if "ln_f" not in name)
    gain.data.copy_(kept)
    assert run.guard.bad_steps.tolist() == [2]


def test_attention_with_dropout_is_not_cudnns(tiny):
    """Which may round it to sixteenths: github.com/pytorch/pytorch/issues/174245."""
    q = torch.zeros(4, 6, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for dropout, is_allowed in ((0.2, False), (0.25, True), (0.0, True)):
        devices.set_up_device(q.device, deterministic=False, dropout=dropout)
        choice = torch._fused_sdp_choice(q, q, q, dropout_p=dropout, is_causal=True)
        assert is_allowed or choice != SDPBackend.CUDNN_ATTENTION.value
        assert torch.backends.cuda.cudnn_sdp_enabled() == is_allowed


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


def test_recorded_decoding_makes_the_tokens_of_generate():
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 11, 2, 2, 32, position="rotary")).eval().to("cuda")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx, numbers = torch.zeros(3, 1, dtype=torch.int64, device="cuda"), torch.rand(80, 3)
    expected = generate(model, idx, 80, uniform=iter(numbers.cuda()).__next__)
    rows = iter(numbers)
    steps = Decoder(model, 11).generate(
        idx, 80, uniform=lambda n: torch.stack([next(rows) for _ in range(n)])
    )
    assert [*steps] == [new.tolist() for new in expected]


def test_compiled_decoding_of_several_texts_with_a_large_vocabulary():
    """Whose cumulative sums PyTorch 2.11 does not compile."""
    model = GPT(GPTConfig(64, 50304, 1, 2, 64)).eval().to("cuda")
    idx = torch.zeros(10, 1, dtype=torch.int64, device="cuda")
    texts = [
        [*Decoder(model, 50257, compiled).generate(idx, 8, uniform=lambda n: torch.zeros(n, 10))]
        for compiled in (True, False)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 8


def test_decoding_takes_no_attention_that_plans_for_each_length(monkeypatch):
    """cuDNN's does, for 0.4 s each."""
    attention, choices = torch.nn.functional.scaled_dot_product_attention, []

    def note(q, k, v, **options):
        choices.append(torch._fused_sdp_choice(q, k, v, **options))
        return attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    model = GPT(GPTConfig(256, 65, 1, 6, 384)).eval().to("cuda", torch.bfloat16)
    prompt = torch.zeros(1, 7, dtype=torch.int64, device="cuda")
    torch.backends.cuda.enable_cudnn_sdp(True)  # a run with dropout may have left it off
    for steps in (Decoder(model, 65).generate(prompt, 5), generate(Decoder(model, 65), prompt, 5)):
        assert len([*steps]) == 5
    assert choices and SDPBackend.CUDNN_ATTENTION.value not in choices
    assert torch.backends.cuda.cudnn_sdp_enabled(), "as before"


def test_a_model_too_large_for_the_device_says_what_to_do(tiny, call):
    flags = ["--n_embd=4096", "--n_head=32", "--batch_size=100000", "--compile=false"]
    torch.cuda.set_per_process_memory_fraction(0.1)  # other programs may need the rest
    try:
        code, _, err = call("train", *ON_GPU, *flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 1 and err.count("\n") == 1 and "out of memory: halve" in err
