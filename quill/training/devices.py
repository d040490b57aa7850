"""Device, dtype, random seeds, memory, and peak arithmetic rate of the machine."""

import contextlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

from quill.errors import InputError, RunError, Stopped, print_note
from quill.training import distributed

# Dense bf16/fp16 matrix rate in FLOP/s by words of the device's name, from the vendor's data
# sheets; the first match counts. For any other device no MFU is reported.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else MPS, else the CPU.

    Each of several processes on a machine takes a CUDA device of its own.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device={name}: use auto, cpu, cuda, cuda:N or mps") from None
    here = {
        "cpu": device.index is None,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(device.type, False):
        raise InputError(f"device={name}: there is none here; leave it out, or use --device=cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; weights and optimizer state stay float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def _cpu_multiplies_bfloat16() -> bool:
    """Whether it has instructions for bfloat16 products; an older PyTorch cannot tell."""
    if sys.platform == "darwin":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_compile(setting: bool | str, device: torch.device) -> bool:
    """Whether to use torch.compile, after a trial; `auto` does on CUDA.

    It needs a C compiler, Python's headers, Triton, and a GPU that Triton supports. Where one is
    missing, `auto` goes on without it, and says so, and `true` raises InputError.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of the compiler's many parts
        reason = str(error).strip().partition("\n")[0]
        if setting is True:
            raise InputError(f"compile=true: {reason}; leave it out") from None
        print_note(f"without torch.compile, so slower: {reason}")
        return False
    return True


@contextlib.contextmanager
def compiler_errors(signals: list[int]):
    """In the block, a failure of torch.compile is one line.

    signals: received so far. Ctrl-C also ends the C compiler that a step waits for: Stopped, then.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        if signals and distributed.world_size() == 1:
            raise Stopped(max(signals)) from None
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"torch.compile failed: {reason}; --compile=false does without") from None


def set_up_device(device: torch.device, deterministic: bool, dropout: float) -> None:
    """Process-wide settings: the current CUDA device, TF32 for float32 products there.

    deterministic: only kernels that give the same bits each time; those used on a CPU all do.
    dropout: of training. cuDNN's attention may round it to sixteenths (issue 174245 of PyTorch), so
    it is left out where that would change it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.enable_cudnn_sdp(dropout * 16 % 1 == 0)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
        torch.backends.cudnn.benchmark = False
    if deterministic != torch.are_deterministic_algorithms_enabled():  # it imports the compiler
        torch.use_deterministic_algorithms(deterministic)


def refuse_larger_than_memory(n_parameters: int, sizes: str, device: torch.device) -> None:
    """Raise InputError for a model that cannot be trained here, before any of it is allocated.

    sizes: what made it so large, for the message.
    """
    if not hasattr(os, "sysconf"):  # not available on Windows
        return
    bytes_each = 16 if device.type == "cpu" else 4  # weight, gradient, two moments; made on the CPU
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if n_parameters * bytes_each > memory_bytes:
        raise InputError(
            f"{sizes} make {n_parameters:,} parameters, which take "
            f"{n_parameters * bytes_each / 1e9:,.0f} GB; this machine has "
            f"{memory_bytes / 1e9:,.0f} GB of memory"
        )


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed dropout from these alone, so that a resumed run needs no saved random state."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1)
    torch.manual_seed(int(mixed[0]))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products, None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of the card
        return None
    matches = (rate for words, rate in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name))
    return next(matches, None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; a CPU has no queue."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors took on a CUDA device; elsewhere, that the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent had when it started this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type


def is_out_of_memory(error: Exception) -> bool:
    """Not every allocator raises an exception type of its own."""
    says_so = re.search("allocate memory|out of memory|ALLOC_FAILED", str(error))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(says_so)


@contextlib.contextmanager
def out_of_memory_advice(advice: str):
    """Turn running out of memory in the block into a RunError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory: {advice}") from None
