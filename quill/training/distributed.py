"""Several processes that train one model: what they exchange, and how they stop together.

torchrun starts them; environment variables give each its rank. A process that runs alone has world
size 1, and these functions then do nothing. The processes of a run trust each other.

What shards tensors is imported where it is used: that takes as long as importing torch.
"""

import contextlib
import datetime
import gc
import os
import re
import threading
import time
import uuid

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from model import Block
from quill.errors import InputError, RunError, expected_failure, print_error, print_note

START_TIMEOUT_SECONDS = 600
SILENT_SECONDS = 30  # before it is said who is waited for


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints: rank 0."""
    return rank() == 0


def is_local_main() -> bool:
    """Whether this is the first process on its machine, which verifies the machine's files."""
    return world_size() == 1 or os.environ["LOCAL_RANK"] == "0"


_store = None  # torchrun's key-value store: processes find each other and count failures there


@contextlib.contextmanager
def session():
    """In the block, when one process fails all stop, with one message and its exit code."""
    global _store
    _check_environment()
    if world_size() == 1:
        yield
        return
    try:
        _store = _connect_store()
        yield
        if dist.is_initialized():
            dist.barrier()  # torchrun ends the others once one has failed: let all finish first
            gc.collect()  # nothing may hold the group, whose threads must not outlive Python
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        failure = expected_failure(_lost_connection(error) or error)
        if failure is None:
            raise
        message, code = failure
        if _is_first_failure():
            print_error(f"process {rank()} of {world_size()}: {message}")
        raise SystemExit(code) from None


def _check_environment() -> None:
    if not re.fullmatch("[1-9][0-9]{0,5}", n := os.environ.get("WORLD_SIZE", "1")):
        raise InputError(
            f"WORLD_SIZE={n[:100]!r} is no number of processes: start it with torchrun"
        )
    ranks = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK")]
    are_ranks = all(re.fullmatch("[0-9]{1,6}", r) and int(r) < world_size() for r in ranks)
    if world_size() > 1 and not are_ranks:
        raise InputError(
            f"RANK and LOCAL_RANK are {ranks}, not numbers below WORLD_SIZE={world_size()}: start "
            "it with torchrun"
        )


def _connect_store() -> dist.Store:
    """Raises an error of torch.distributed where a process does not come in time."""
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    awaited = "the others" if is_main() else f"process 0 at {place}"
    text = f"process {rank()} of {world_size()} waits for {awaited}"
    note = threading.Timer(SILENT_SECONDS, print_note, [text])
    note.daemon = True
    note.start()
    timeout = datetime.timedelta(seconds=START_TIMEOUT_SECONDS)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except ValueError as error:
        raise InputError(f"{error}; start it with torchrun") from None
    else:
        private = _private_store(store)
        store.set_timeout(default_pg_timeout)  # for the waits within a run
        return private
    finally:
        note.cancel()


def _private_store(store: dist.Store) -> dist.Store:
    """A part of torchrun's store that earlier processes have not written to.

    init_process_group alone would not do: torchrun's store outlives the processes that it restarts,
    with their addresses (github.com/pytorch/pytorch/issues/135712), and its restart count differs
    between machines. So rank 0 answers the others with a fresh key, each by a word of its own.
    """
    own_word = uuid.uuid4().hex
    if not is_main():
        store.set(f"process {rank()}", own_word)
        key = store.get(f"answer to {own_word}").decode()  # waits
        store.set(f"{key} has {rank()}", "")
        return dist.PrefixStore(key, store)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    for other in range(1, world_size()):
        while not store.check([f"{own_word} has {other}"]):
            if time.monotonic() > deadline:
                raise RunError(f"process {other} of {world_size()} did not start in time")
            if store.check([f"process {other}"]):
                store.set(f"answer to {store.get(f'process {other}').decode()}", own_word)
            time.sleep(0.01)
    return dist.PrefixStore(own_word, store)


@contextlib.contextmanager
def main_first():
    """Run the block on rank 0, then on each machine's first process, then on the others.

    So that one downloads or repairs what the others then read. Once in a session.
    """
    machine = os.environ.get("GROUP_RANK", "0")
    if not is_main():
        _store.get("main is done")  # waits
    if not is_local_main():
        _store.get(f"machine {machine} is done")
    yield
    if world_size() > 1 and is_main():
        _store.set("main is done", "")
    if world_size() > 1 and is_local_main():
        _store.set(f"machine {machine} is done", "")


def init_process_group(device: torch.device, backend: str) -> None:
    """From here on tensors can be exchanged: those on a GPU through `backend`, others by gloo."""
    backends = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else "gloo"
    dist.init_process_group(backends, store=_store, rank=rank(), world_size=world_size())


def _lost_connection(error: BaseException) -> RunError | None:
    """What an error of torch.distributed means to the user; None for any other error."""
    text = " ".join(str(error).split())[:300]
    if not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not re.search("gloo|nccl", text, re.IGNORECASE):
        return None
    if re.search("closed by peer|reset by peer|broken pipe|remote process", text, re.IGNORECASE):
        return RunError(
            "another process of this run ended unexpectedly; the same command with "
            "--init_from=auto continues from the last checkpoint"
        )
    return RunError(f"the processes cannot exchange data: {text}")


def _is_first_failure() -> bool:
    try:
        return _store.add("failures", 1) == 1
    except (RuntimeError, AttributeError):  # the store is gone, or was not found yet
        return True


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor):
    """The sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The largest over the processes; waits for them, not for their devices."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def broadcast_object(value):
    """Rank 0's value, of plain types."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def is_sharded(tensor) -> bool:
    """Whether it is a DTensor, of which each process has a part."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor):
    """All of a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_local(tensor):
    """The shard of this process, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_like(tensor, like):
    """A copy of a full tensor, which every process has, on like's device and sharded as it is."""
    tensor = tensor.to(like.device, copy=True)  # the original may be a memory-mapped file
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def wrap(
    model: torch.nn.Module, device: torch.device, parallel: str, compile_mode: str | None
) -> torch.nn.Module:
    """-> what to call in training: the model on its device, compiled, on several processes.

    parallel: with ddp (Li et al. 2020) every process has all of the model; with fsdp (Zhao et al.
    2023) a shard of every tensor. compile_mode: of torch.compile, or "blocks", or None to leave it
    out. Blocks are compiled as one, since their code is the same.
    """
    shards = world_size() > 1 and parallel == "fsdp"
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if compile_mode is not None:
        for part in blocks if shards or compile_mode == "blocks" else [model]:
            part.compile(mode="default" if compile_mode == "blocks" else compile_mode)
    if shards:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world_size(),))
        for block in blocks:  # gathered one at a time
            fully_shard(block, mesh=mesh)
        # Nothing stays gathered after a forward pass: an evaluation swaps in averaged weights.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model
    forward = model.to(device)
    if world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)
        forward.broadcast_buffers = False  # the table of rotary positions is the same everywhere
    return forward


def sync_gradients(forward: torch.nn.Module, is_last: bool) -> None:
    """Exchange gradients in the next backward pass only if it is the last one of a step."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = is_last
    elif world_size() > 1:
        forward.set_requires_gradient_sync(is_last)


def shard_batch(offsets):
    """This process's part of a step's (micro_steps, batch_size) windows: every n-th micro-step, or
    where these do not divide evenly, every n-th row."""
    n = world_size()
    return offsets[rank() :: n] if len(offsets) % n == 0 else offsets[:, rank() :: n]
