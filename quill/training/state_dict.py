"""State dicts with full tensors, whatever the number of processes.

All processes call these functions, and save what a run of one process would: copies on the CPU, so
that they stay as they are while the training goes on. Sampling needs none of it.
"""

import dataclasses
import hashlib
from pathlib import Path

import torch

from quill.errors import InputError
from quill.training import distributed, lora, models
from quill.training.checkpoint import LOAD_ERRORS, Progress
from quill.training.devices import is_out_of_memory
from quill.training.ema import EMA
from quill.training.nonfinite import LossScaler, NonFiniteGuard


def model_state_dict(model: torch.nn.Module) -> dict:
    """The weights. A tied head shares its storage."""
    weights = model.state_dict()
    is_tied = getattr(model.config, "tied_head", False)
    if is_tied:
        del weights["lm_head.weight"]  # or it would be copied on its own
    weights = full_copies(weights)
    if is_tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def digest(weights: dict) -> str:
    """The SHA-256 of the values, whatever file they come from."""
    sha256 = hashlib.sha256()
    for _, tensor in sorted(weights.items()):
        sha256.update(tensor.contiguous().flatten().view(torch.uint8).numpy(force=True))
    return sha256.hexdigest()


def weights_and_config(run, model_config: dict | None = None) -> dict:
    """What best.pt holds, all that sampling needs, in copies that no step changes.

    run: train.py's, or the one of another command that trains.
    model_config: how the model is described, if not as one of models.py.
    """
    return {
        "model": model_state_dict(run.model),
        "model_config": model_config or models.config_to_dict(run.model.config),
        "config": dataclasses.asdict(run.config),
        "tokenizer": run.data.meta.tokenizer,
        "step": run.progress.step,
        "best_val_loss": run.progress.best_val_loss,
        "text_source": run.data.meta.source,
        "text_sha256": run.data.meta.sha256,
    }


def training_state(optimizers: list, ema: EMA, scaler: LossScaler) -> dict:
    """What a resume needs beside the weights; each step derives its random state anew."""
    return {
        "optimizers": [full_copies(optimizer.state_dict()) for optimizer in optimizers],
        "average": full_copies(ema.average),
        "scaler": scaler.state_dict(),
    }


def load_training_state(
    saved: dict,
    path: Path,
    model: torch.nn.Module,
    optimizers: list,
    ema: EMA,
    scaler: LossScaler,
    guard: NonFiniteGuard,
) -> Progress:
    """Put the state of the checkpoint `path` into these; raises InputError if it does not fit."""
    try:
        models.check_finite(saved["model"])
        load_model_state_dict(model, saved["model"])
        ema.restart()  # from these weights, for a checkpoint that has no average
        if ema.average and saved["average"]:
            load_tensors(ema.average, saved["average"])
        progress = Progress.from_checkpoint(saved)
        if len(saved["optimizers"]) != len(optimizers):
            raise ValueError("its optimizer state does not fit the model")
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            load_optimizer_state(optimizer, state, has_stepped=progress.step > 0)
        if not all(type(x) in (int, float) and x >= 0 for x in saved["scaler"].values()):
            raise ValueError("its loss scale is not usable")
        if scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        guard.restore(progress.skipped_steps)
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} is not usable for a resume: {error}") from None
    return progress


def load_model_state_dict(model: torch.nn.Module, weights: dict) -> None:
    """Raises one of `LOAD_ERRORS` when they are not the weights of that model."""
    weights, own = lora.fitted(model, weights), model.state_dict()
    if own.keys() != weights.keys():
        raise ValueError("its weights are not the model's")
    load_tensors([*own.values()], [weights[name] for name in own])


# PyTorch's get_optimizer_state_dict is of no use for the moments: it gives an optimizer that has
# not stepped a state by stepping it, so that saving at step 0 would change the training.


def full_copies(value):
    """The same tree with a copy of every tensor, full and on the CPU; only rank 0 keeps them."""
    if isinstance(value, dict):
        return {name: full_copies(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(full_copies(part) for part in value)
    if not torch.is_tensor(value):
        return value
    value = distributed.full_tensor(value)
    return value.to("cpu", copy=True) if distributed.is_main() else None


@torch.no_grad()
def load_tensors(targets: list, saved: list) -> None:
    """Copy full tensors into those of a model; raises ValueError when a shape differs."""
    for target, tensor in zip(targets, saved, strict=True):
        if target.shape != tensor.shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not fit the model")
        shard = distributed.to_local(distributed.shard_like(tensor, target))
        distributed.to_local(target).copy_(shard)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict, has_stepped: bool) -> None:
    """Load the moments; learning rates and weight decay stay those of the present options.

    Raises ValueError when a moment is missing or has another shape than its parameter, which the
    fused kernels do not check.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [saved["state"].get(i, {}) for i in range(len(params))]
    for p, state in zip(params, states, strict=True):
        fits = all(torch.is_tensor(t) and t.shape in ((), p.shape) for t in state.values())
        if not fits or state.keys() != states[0].keys() or (has_stepped and not state):
            raise ValueError("its optimizer state does not fit the model")
    moments = {
        i: {name: distributed.shard_like(tensor, p) for name, tensor in state.items()}
        for i, (p, state) in enumerate(zip(params, states, strict=True))
        if state
    }
    present = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": present})
