"""Several processes that train one model: what they exchange, and how they stop together.

torchrun starts them and tells each, in environment variables, who it is. In a process that is alone
every function here does nothing. The processes trust each other: they are one program.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import time
import uuid
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from quill.errors import InputError, RunError, expected_failure, print_error

if TYPE_CHECKING:
    from model import GPT

MEETING_SECONDS = 600  # for the processes to find each other


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the machine's first process, which checks the machine's files."""
    return size() == 1 or os.environ["LOCAL_RANK"] == "0"


_store = None  # where the processes find each other, and note failures


@contextlib.contextmanager
def together():
    """In the block, when one process fails all stop, with one message and its exit code."""
    global _store
    try:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if not all(os.environ.get(name, "").isdecimal() for name in names):
            raise InputError(f"{', '.join(names)} are not all numbers: start it with torchrun")
        try:
            agents_store, _, _ = next(dist.rendezvous("env://"))
        except ValueError as error:
            raise InputError(f"{error}; start it with torchrun") from None
        _store = _own_part_of(agents_store)
        yield
        if dist.is_initialized():
            dist.barrier()  # torchrun ends the others once one has ended in failure: save first
            gc.collect()  # what still holds the group, whose threads must not outlive Python
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        error = _lost_connection(error) or error
        failure = expected_failure(error)
        if failure is None:
            raise
        message, code = failure
        if _is_first_to_fail():
            print_error(f"process {rank()} of {size()}: {message}")
        raise SystemExit(code) from None


def _own_part_of(store) -> dist.Store:
    """A part of torchrun's store that no processes before these have written to.

    The store outlives the processes that torchrun restarts, and so do the addresses in it, which
    the next ones would take for each other's: github.com/pytorch/pytorch/issues/135712. So the
    others tell the main process a word of their own, and it answers each with a word for all.
    """
    own_word = uuid.uuid4().hex
    if not is_main():
        store.set(f"process {rank()}", own_word)
        word_for_all = store.get(f"answer to {own_word}").decode()  # waits
        store.set(f"{word_for_all} has {rank()}", "")
        return dist.PrefixStore(word_for_all, store)
    deadline = time.monotonic() + MEETING_SECONDS
    for other in range(1, size()):
        while not store.check([f"{own_word} has {other}"]):
            if time.monotonic() > deadline:
                raise RunError(f"process {other} of {size()} did not start in time")
            if store.check([f"process {other}"]):
                store.set(f"answer to {store.get(f'process {other}').decode()}", own_word)
            time.sleep(0.01)
    return dist.PrefixStore(own_word, store)


def connect(device: torch.device, backend: str) -> None:
    """From here on tensors can be exchanged: those on a GPU through `backend`, others by gloo."""
    if size() > 1:
        backends = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, store=_store, rank=rank(), world_size=size())


def _lost_connection(error: BaseException) -> RunError | None:
    """What an error of PyTorch's exchange means to the user; None for any other."""
    text = " ".join(str(error).split())[:300]
    if not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not re.search("gloo|nccl", text, re.IGNORECASE):
        return None
    if re.search("closed by peer|reset by peer|broken pipe|remote process", text, re.IGNORECASE):
        return RunError(
            "another process of this run ended unexpectedly; the same command with "
            "--init_from=auto goes on from the last checkpoint"
        )
    return RunError(f"the processes cannot exchange data: {text}")


def _is_first_to_fail() -> bool:
    try:
        return _store.add("failures", 1) == 1
    except (RuntimeError, AttributeError):  # the store is gone, or not yet found
        return True


def total(tensor):
    """The sum over the processes, in place of each one's part."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """Over the processes; waits for them, not for their devices."""
    if size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def tell(value: dict) -> dict:
    """The main process's value, of plain types; before `connect`."""
    if size() == 1:
        return value
    if is_main():
        _store.set("told", json.dumps(value))
    return json.loads(_store.get("told"))


def share(value):
    """The main process's value; on the others its tensors have a shape and no contents."""
    if size() == 1:
        return value
    hollow = [_without_contents(value) if is_main() else None]
    dist.broadcast_object_list(hollow, device=torch.device("cpu"))
    return value if is_main() else hollow[0]


def _without_contents(value):
    if isinstance(value, dict):
        return {name: _without_contents(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_contents(part) for part in value]
    return value.to("meta") if torch.is_tensor(value) else value


def spread(tensor, like):
    """The main process's CPU tensor, on every process: all of it, or its part where `like` has one.

    -> on like's device, in the tensor's own dtype.
    """
    if size() == 1:
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    if not is_main():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor = tensor.to(like.device)
    if _is_sharded(like) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    dist.broadcast(tensor, src=0)
    return tensor


def whole(tensor):
    """All of a tensor of which each process may have a part; every process must ask."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def own_part(tensor):
    """What of a tensor lies in this process."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _is_sharded(tensor) -> bool:
    if size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # takes a third of a second

    return isinstance(tensor, DTensor)


def replicate(forward: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DDP, Li et al. 2020: every process has all of the model, gradients are averaged."""
    if size() == 1:
        return forward
    devices = [device] if device.type == "cuda" else None
    forward = DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)
    forward.broadcast_buffers = False  # a table of positions, the same everywhere
    return forward


def shard(model: GPT, device: torch.device, compile_mode: str | None) -> None:
    """FSDP, Zhao et al. 2023: each process keeps its part of every tensor, in place.

    A block is put together while it computes; compile_mode: how to compile it, None for not.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    for block in model.transformer.h:
        if compile_mode is not None:
            block.compile(mode=compile_mode)
        fully_shard(block, mesh=mesh)
    # Not to be kept whole after a forward pass: weights are exchanged for their average between.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def average_gradients(forward: torch.nn.Module, now: bool) -> None:
    """Whether the next backward pass exchanges gradients: only a step's last one need do it."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = now
    elif size() > 1:
        forward.set_requires_gradient_sync(now)
