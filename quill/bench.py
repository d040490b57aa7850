"""Measure a config on this machine, or plan its training without running it.

Usage:
    python -m quill.bench [config/NAME.py] [--key=value ...]     any option of train.py
    python -m quill.bench config/NAME.py --plan --devices=8
"""

from __future__ import annotations

import quill.interrupts  # noqa: F401  first, for Ctrl-C during the imports below

# isort: split

import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train
from model import GPT, generate
from quill import settings
from quill.data import dataset_files
from quill.errors import InputError, run_command
from quill.files import atomic_write, dataset_folder
from quill.sampling.decoder import Decoder
from quill.settings import option
from quill.training import devices
from quill.training.distributed import refuse_several_processes
from quill.training.models import build, config_from_options
from quill.training.optimizers import make_optimizers

N_GROUPS = 10  # the timed steps are split into so many; lowest and highest are those of their means
SAMPLE_COUNTS = (1, 10, 64)


@dataclasses.dataclass(frozen=True)
class BenchConfig(train.TrainConfig):
    """train.py's options, and these."""

    warmup_steps: int = option(10, "training steps before the timed ones", min=1)
    timed_steps: int = option(100, "training steps to time", min=N_GROUPS)
    json: str = option("", "a file to write the figures to as well")
    plan: bool = option(False, "estimate memory and time, train nothing")
    devices: int = option(1, "plan: how many devices share a step", min=1)
    peak_tflops: float = option(989.0, "plan: matrix rate of each, 989 for an H100", min=1e-6)
    assumed_mfu: float = option(0.4, "plan: fraction of that rate that is reached", min=1e-6, max=1)
    vocab_size: int = option(0, "plan: 0 is the prepared dataset's", min=0, max=10**7)


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    config = settings.load(BenchConfig, argv, usage=__doc__)
    refuse_several_processes()
    if config.json and not Path(config.json).parent.is_dir():
        raise InputError(f"json={config.json}: there is no such folder")
    with devices.out_of_memory_advice(f"lower batch_size={config.batch_size}"):
        figures = plan(config) if config.plan else measure(config, started)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {_in_words(value)}")
    if config.json:
        with atomic_write(Path(config.json)) as (file,):
            file.write(json.dumps(figures, indent=1).encode() + b"\n")
    return 0


def _in_words(value) -> str:
    if value is None:
        return "not known for this device"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# ---- measuring ---------------------------------------------------------------------------------


def measure(config: BenchConfig, started: float) -> dict:
    """Train and sample for a moment; -> figures by name, with the unit in the name.

    started: the time.perf_counter() from which start-up counts.
    """
    run = train.setup(config)
    start_up_s = time.perf_counter() - started
    figures = {
        "device": devices.describe(run.device),
        "torch": torch.__version__,
        "dtype": str(run.dtype).removeprefix("torch."),
        "compiled": run.compiles,
        "parameters": run.model.n_parameters(),
        "flops_per_token": int(run.model.flops_per_token()),
        "tokens_per_step": config.tokens_per_step,
        "start_up_s": start_up_s,
    }
    figures |= _time_training(run)
    figures["peak_memory_MB"] = devices.peak_memory_bytes(run.device) / 1e6
    return figures | _time_sampling(run)


def _time_training(run: train.Run) -> dict:
    first_step_ms = _ms(run.device, lambda: train.train_step(run))
    for _ in range(run.config.warmup_steps - 1):
        train.train_step(run)
    group = range(run.config.timed_steps // N_GROUPS)
    times_ms = [
        _ms(run.device, lambda: [train.train_step(run) for _ in group]) / len(group)
        for _ in range(N_GROUPS)
    ]
    run.guard.report(run.progress.skipped_steps, run.log)
    median = statistics.median(times_ms)
    tokens_per_s = 1000 * run.config.tokens_per_step / median
    flops_per_s = tokens_per_s * run.model.flops_per_token()
    peak = devices.peak_flops(run.device, run.dtype)
    return {
        "first_step_ms": first_step_ms,  # compiling included
        "ms_per_step": median,
        "ms_per_step_lowest": min(times_ms),
        "ms_per_step_highest": max(times_ms),
        "tokens_per_s": tokens_per_s,
        "tflops_per_s": flops_per_s / 1e12,
        "mfu": flops_per_s / peak if peak else None,
    }


def _time_sampling(run: train.Run) -> dict:
    """Prefill of one full window, then decoding from one token on, as sample.py does it.

    Decoding is compiled where the training is.
    """
    device, block_size = run.device, run.config.block_size
    model = copy.deepcopy(run.model).eval().to(run.dtype)
    decoder = Decoder(model, model.config.vocab_size, run.compiles)
    figures = {}
    for n in SAMPLE_COUNTS:
        idx = torch.zeros(n, block_size, dtype=torch.int64, device=device)

        @torch.inference_mode()
        def prefill(idx=idx):
            model(idx, cache=model.new_cache(len(idx)), last_only=True)

        def decode(idx=idx):
            for tokens in generate(decoder, idx[:, :1], block_size, top_k=200):
                tokens.tolist()  # they are to be printed

        for work in (prefill, decode):
            work()  # warms up
            median = statistics.median(_ms(device, work) for _ in range(3))
            figures[f"{work.__name__}_{n}_tokens_per_s"] = 1000 * n * block_size / median
    return figures


def _ms(device: torch.device, work) -> float:
    """Milliseconds until the device has finished `work()`."""
    devices.synchronize(device)
    started = time.perf_counter()
    work()
    devices.synchronize(device)
    return 1000 * (time.perf_counter() - started)


# ---- planning ----------------------------------------------------------------------------------


def plan(config: BenchConfig) -> dict:
    """What the training would take, from shapes alone."""
    rows = config.gradient_accumulation_steps * config.batch_size
    if rows % config.devices:
        raise InputError(
            f"the {rows} windows of a step do not divide over {config.devices} devices"
        )
    with FakeTensorMode():  # tensors with shapes, without memory
        model, memory = _plan_memory(config, rows // config.devices)
    tokens = config.max_iters * config.tokens_per_step
    rate = config.devices * config.peak_tflops * 1e12 * config.assumed_mfu
    return {
        "parameters": model.n_parameters(),
        "flops_per_token": int(model.flops_per_token()),
        "tokens_per_step": config.tokens_per_step,
        "steps": config.max_iters,
        "tokens": tokens,
        **memory,
        "training_s": tokens * model.flops_per_token() / rate,
    }


def _plan_memory(config: BenchConfig, rows: int) -> tuple:
    """-> the model, MB by kind on one device that takes `rows` windows of a step.

    The memory of the highest moment is less than the sum: gradients come as activations go. For a
    GPU unless device=cpu: matrix products in bfloat16, and attention without float32 or dropout
    masks. Without torch.compile, which keeps fewer activations, and without the dataset.
    """
    folder = dataset_folder(config.dataset)
    vocab_size = config.vocab_size or dataset_files.read(folder)[0].vocab_size
    model = build(config_from_options(config, vocab_size))
    is_gpu = config.device != "cpu"
    name = "bfloat16" if is_gpu and config.dtype == "auto" else config.dtype
    dtype = devices.pick_dtype(name, torch.device("cpu"))
    if is_gpu and isinstance(model, GPT):  # whose attention keeps its dtype, and no dropout mask
        for block in model.transformer.h:
            block.attn.dtype_on_cpu, block.attn.dropout = torch.bfloat16, 0.0
    optimizers = make_optimizers(model, config, dtype)
    batch_size = min(rows, config.batch_size)
    idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64)
    peak = _peak_of_a_step(model, optimizers, idx, rows > batch_size, dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    average = weights if config.average_decay else 0
    n_bytes = {
        "weights": weights + average,
        "gradients": weights,
        "optimizer": peak["OPT"],
        "activations": peak["ACT"] + peak["TEMP"] + peak["OTH"],
        "memory": peak["Total"] + average,
    }
    return model, {f"{kind}_MB": value / 1e6 for kind, value in n_bytes.items()}


def _peak_of_a_step(model, optimizers, idx, accumulates: bool, dtype) -> dict:
    """-> bytes at the highest moment, by the kinds of PyTorch's tracker."""
    device = torch.device("cpu")
    tracker = MemTracker()
    tracker.track_external(model, *optimizers)
    with tracker:
        for _ in range(2):  # the optimizer's state appears in the first
            for _ in range(1 + accumulates):
                with devices.autocast(device, dtype):
                    _, loss = model(idx, idx)
                loss.backward()
                tracker.reset_mod_stats()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    peak = tracker.get_tracker_snapshot("peak")[device]
    return {str(kind).rpartition(".")[2]: n_bytes for kind, n_bytes in peak.items()}


if __name__ == "__main__":
    run_command(main)
