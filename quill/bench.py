"""Measure a config on this machine, or plan its training without running it.

Usage:
    python -m quill.bench [config/NAME.py] [--key=value ...]     any option of train.py
    python -m quill.bench config/NAME.py --plan --devices=8
"""

import quill.startup

# isort: split

import contextlib
import copy
import dataclasses
import functools
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import train
from model import GPT, MAX_LOGITS, Block
from quill import settings
from quill.data import dataset_files
from quill.errors import InputError, print_note, reader_may_leave, run_command
from quill.files import atomic_write, dataset_folder, refuse_to_replace
from quill.sampling.decoder import Decoder
from quill.settings import option
from quill.training import devices
from quill.training.models import build, config_from_options
from quill.training.optimizers import make_optimizers

N_GROUPS = 10  # the timed steps are split into so many; lowest and highest are those of their means
SAMPLE_COUNTS = (1, 10, 64)
CPU = torch.device("cpu")
GPT2_VOCABULARY = 50257
FOR_PLAN = ("devices", "peak_tflops", "assumed_mfu", "vocab_size")
# Functions of torch.nn.functional that keep on a CPU, for the backward pass, what the kernels of a
# GPU keep.
AS_ON_A_GPU = {
    # Autocast has it in float32 there.
    "layer_norm": lambda x, *args, **options: torch.layer_norm(x.float(), *args, **options),
    # One kernel, which keeps its input alone.
    "rms_norm": functools.partial(checkpoint, torch.rms_norm, use_reentrant=False),
    # A mask of one byte a number.
    "dropout": lambda x, p, *_: torch.native_dropout(x, p, True)[0] if p else x,
}
MANY_LAYERS = 50
MAX_TOKENS = 2**24  # in a micro-step; its loss is planned part by part, which takes time as well
# In a loss that is not compiled, at the highest moment: in bfloat16, float32, its log-probability
# and its gradient.
BYTES_OF_A_LOGIT = 14


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
    vocab_size: int = option(
        0,
        f"plan: 0 is the dataset's, or {GPT2_VOCABULARY} where that is not prepared",
        min=0,
        max=10**7,
    )


def main(argv: list[str]) -> int:
    config = settings.load(BenchConfig, argv, usage=__doc__)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("this measures one process: run it without torchrun")
    given = [name for name in FOR_PLAN if getattr(config, name) != getattr(BenchConfig, name)]
    if given and not config.plan:
        raise InputError(f"{', '.join(given)}: only with --plan")
    if config.init_from == "resume":
        raise InputError("init_from=resume: a config is measured here, not the run that it left")
    if config.json:  # before the minutes that measuring takes
        if not Path(config.json).parent.is_dir():
            raise InputError(f"json={config.json}: there is no such folder")
        refuse_to_replace(Path(config.json))
    with devices.out_of_memory_advice(f"lower batch_size={config.batch_size}"):
        figures = plan(config) if config.plan else measure(config)
    width = max(map(len, figures))
    with reader_may_leave():
        for name, value in figures.items():
            print(f"{name:<{width}}  {_in_words(value)}")
    if config.json:
        with atomic_write(Path(config.json)) as (file,):
            file.write(json.dumps(figures, indent=1).encode() + b"\n")
    return 0


def _in_words(value) -> str:
    if value is None:
        return "not known for this device"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def measure(config: BenchConfig) -> dict:
    """Train and sample for a moment; -> figures by name, with the unit in the name."""
    run = train.setup(config)
    return {
        "device": devices.describe(run.device),
        "torch": torch.__version__,
        "dtype": str(run.dtype).removeprefix("torch."),
        "compiled": run.compiles,
        "parameters": run.model.n_parameters(),
        "flops_per_token": int(run.model.flops_per_token()),
        "tokens_per_step": config.tokens_per_step,
        "start_up_s": time.perf_counter() - quill.startup.STARTED,
        **time_training(run),
        "peak_memory_MB": devices.peak_memory_bytes(run.device) / 1e6,
        **_time_sampling(run),
    }


def time_training(run: train.Run) -> dict:
    config, device = run.config, run.device

    def train_steps(n: int) -> None:
        for _ in range(n):
            train.train_step(run)

    first_step_ms = _ms(device, train_steps, 1)
    train_steps(config.warmup_steps - 1)
    n = config.timed_steps // N_GROUPS
    times_ms = [_ms(device, train_steps, n) / n for _ in range(N_GROUPS)]
    run.guard.report(run.progress.skipped_steps, run.log)
    median = statistics.median(times_ms)
    tokens_per_s = 1000 * config.tokens_per_step / median
    flops_per_s = tokens_per_s * run.model.flops_per_token()
    peak = devices.peak_flops(device, run.dtype)
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
    """Prefill of a full window, and decoding from one token on.

    Compiled as well, where the training is.
    """
    model = copy.deepcopy(run.model).eval().to(run.dtype)
    vocab_size, block_size, figures = model.config.vocab_size, run.config.block_size, {}
    decoder = Decoder(model, vocab_size)
    compiled_decoder = Decoder(model, vocab_size, compiled=True)

    @torch.inference_mode()
    def prefill(idx):
        decoder(idx, cache=model.new_cache(len(idx)), last_only=True)

    def decode(idx, decoder=decoder):
        for _ in decoder.generate(idx[:, :1], block_size, top_k=200):
            pass

    def decode_compiled(idx):
        decode(idx, compiled_decoder)

    for n in SAMPLE_COUNTS:
        idx = torch.zeros(n, block_size, dtype=torch.int64, device=run.device)
        for work in (prefill, decode, decode_compiled) if run.compiles else (prefill, decode):
            work(idx)  # warms up
            median = statistics.median(_ms(run.device, work, idx) for _ in range(3))
            figures[f"{work.__name__}_{n}_tokens_per_s"] = 1000 * n * block_size / median
    return figures


def _ms(device: torch.device, work, argument) -> float:
    """Milliseconds until the device has finished `work(argument)`."""
    devices.synchronize(device)
    started = time.perf_counter()
    work(argument)
    devices.synchronize(device)
    return 1000 * (time.perf_counter() - started)


def plan(config: BenchConfig) -> dict:
    """What the training would take, from shapes alone."""
    rows = config.gradient_accumulation_steps * config.batch_size
    if rows % config.devices:
        raise InputError(f"a step's {rows} windows do not divide over {config.devices} devices")
    n_tokens = min(rows // config.devices, config.batch_size) * config.block_size
    if n_tokens > MAX_TOKENS:
        raise InputError(
            f"batch_size={config.batch_size}, block_size={config.block_size}: {n_tokens:,} tokens "
            f"in a micro-step of one device; at most {MAX_TOKENS:,} can be planned"
        )
    if config.n_layer > MANY_LAYERS:
        print_note(f"planning {config.n_layer:,} layers, a few seconds for each")
    vocab_size = config.vocab_size or _vocabulary_of(config.dataset)
    with FakeTensorMode():  # tensors with shapes, without memory
        model = build(config_from_options(config, vocab_size))
        memory = _plan_memory(config, model, rows // config.devices)
    tokens = config.max_iters * config.tokens_per_step
    rate = config.devices * config.peak_tflops * 1e12 * config.assumed_mfu
    return {
        "assumed_device": "cpu" if config.device == "cpu" else "gpu",
        "assumed_devices": config.devices,
        "assumed_peak_tflops": config.peak_tflops,
        "assumed_mfu": config.assumed_mfu,
        "assumed_vocab_size": vocab_size,
        "parameters": model.n_parameters(),
        "flops_per_token": int(model.flops_per_token()),
        "tokens_per_step": config.tokens_per_step,
        "steps": config.max_iters,
        "tokens": tokens,
        **memory,
        "training_s": tokens * model.flops_per_token() / rate,
    }


def _vocabulary_of(name: str) -> int:
    folder = dataset_folder(name)
    is_prepared = (folder / "meta.json").exists()
    return dataset_files.read(folder)[0].vocab_size if is_prepared else GPT2_VOCABULARY


def _plan_memory(config: BenchConfig, model, rows: int) -> dict:
    """-> MB by kind, on one device that takes `rows` windows of a step.

    The highest moment takes less than the sum: gradients come as activations go. For a GPU unless
    device=cpu: products in bfloat16, and compiled where the training would be. Without the dataset,
    evaluations, what the allocator holds in reserve, and in a compiled step what its kernels take
    beyond the tensors that wait for the backward pass.
    """
    is_gpu = config.device != "cpu"
    compiles = config.compile is True or (
        config.compile == "auto" and config.device not in ("cpu", "mps")
    )
    name = "bfloat16" if is_gpu and config.dtype == "auto" else config.dtype
    dtype = devices.pick_dtype(name, CPU)
    if is_gpu and isinstance(model, GPT):  # whose attention keeps no dropout masks
        for block in model.transformer.h:
            block.attn.dropout = 0.0
    optimizers = make_optimizers(model, config, dtype)
    idx = torch.zeros(min(rows, config.batch_size), config.block_size, dtype=torch.int64)
    n = 1 if rows <= config.batch_size else 2  # micro-steps: the second starts with gradients
    peak = _peak_of_a_step(model, optimizers, [idx] * n, dtype, is_gpu)
    activations, memory = peak["ACT"] + peak["TEMP"] + peak["OTH"], peak["Total"]
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    if compiles:
        with _attention_of(is_gpu):
            activations = _activations_when_compiled(model, idx, dtype, config.compile_mode)
        with_gradients = max(activations, weights) if n == 1 else activations + weights
        memory = weights + peak["OPT"] + with_gradients
    average = weights if config.average_decay else 0
    return {
        "compiled": compiles,
        "weights_MB": weights + average,
        "gradients_MB": weights,
        "optimizer_MB": peak["OPT"],
        "activations_MB": activations,
        "memory_MB": memory + average,
    }


def _peak_of_a_step(
    model, optimizers, micro_batches: list, dtype: torch.dtype, is_gpu: bool
) -> dict:
    """-> MB at the highest moment without torch.compile, by the kinds of PyTorch's tracker."""
    tracker = MemTracker()
    tracker.track_external(model, *optimizers)
    kernels = mock.patch.multiple(F, **AS_ON_A_GPU) if is_gpu else contextlib.nullcontext()
    with tracker, kernels, _attention_of(is_gpu):
        for _ in range(2):  # the optimizer's state appears in the first
            for idx in micro_batches:
                _loss(model, idx, dtype).backward()
                tracker.reset_mod_stats()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    peak = tracker.get_tracker_snapshot("peak")[CPU]
    return {str(kind).rpartition(".")[2]: n_bytes / 1e6 for kind, n_bytes in peak.items()}


def _attention_of(is_gpu: bool):
    """In the block attention keeps the dtype of its input, as on a GPU, if this is for one."""
    as_on_a_gpu = mock.patch("model.attention_dtype", lambda x: x.dtype)
    return as_on_a_gpu if is_gpu else contextlib.nullcontext()


def _activations_when_compiled(model, idx, dtype: torch.dtype, compile_mode: str) -> float:
    """-> MB that a compiled forward pass keeps for the backward pass.

    torch.compile up to the point where what to keep and what to compute anew is decided. PyTorch's
    tracker would not do: beneath it nothing is compiled.
    """
    backend = aot_autograd(
        fw_compiler=nop,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    torch.compiler.reset()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for part in blocks if compile_mode == "blocks" else [model]:
        part.compile(backend=backend, fullgraph=True)
    kept = {}  # by address: several tensors may be views of one storage

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the compiler's, of looking for gradients
        _loss(model, idx, dtype)
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    n_bytes = sum(storage.nbytes() for storage in kept.values())
    if compile_mode == "blocks":  # then the loss is not compiled
        n_logits = min(idx.numel() * model.config.vocab_size, MAX_LOGITS)
        n_bytes += BYTES_OF_A_LOGIT * n_logits
    return n_bytes / 1e6


def _loss(model, idx, dtype: torch.dtype):
    """As train.py computes it, of targets that have the same shape."""
    with devices.autocast(CPU, dtype):
        return model(idx, idx, reduction="sum", loss_only=True)[1]


if __name__ == "__main__":
    run_command(main)
