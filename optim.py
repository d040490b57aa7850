"""The optimizers and their learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from model import GPT
    from train import TrainConfig


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Loshchilov & Hutter 2019; Jordan et al. 2024. Matrices are decayed, gains and biases are not.
    """
    groups = model.parameter_groups()
    optimizers: list[torch.optim.Optimizer] = []
    matrices = groups["hidden"] + groups["embedding"]
    if config.optimizer == "muon":
        rates = {"lr": config.muon_learning_rate, "momentum": config.muon_momentum}
        decay = {"weight_decay": config.weight_decay}
        optimizers.append(torch.optim.Muon(groups["hidden"], **rates, **decay))
        matrices = groups["embedding"]
    decays = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": groups["vector"], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers.append(torch.optim.AdamW(decays, lr=config.learning_rate, betas=betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list, config: TrainConfig, step: int) -> None:
    """Give every group its own highest rate times the schedule's share of it."""
    share = learning_rate_at(config, step) / (config.learning_rate or 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


def restore(optimizer: torch.optim.Optimizer, saved: dict, has_stepped: bool) -> None:
    """Load the moments of a checkpoint; rates and decays stay those of the present options.

    Raises ValueError when a moment is missing or has another shape than its parameter: the fused
    kernels do not check.
    """
    present = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": present})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = optimizer.state[params[0]].keys() if params else ()
    for p in params:
        state = optimizer.state[p]
        fits = all(torch.is_tensor(t) and t.shape in ((), p.shape) for t in state.values())
        if not fits or state.keys() != names or (has_stepped and not state):
            raise ValueError("its optimizer state does not fit the model")


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """AdamW's rate for the update after `step` updates: warm-up, then the schedule's shape."""
    if config.lr_schedule == "constant" or not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)  # 0 .. 1
    if config.lr_schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.lr_schedule == "linear":
        height = 1 - progress
    else:  # warmup-stable-decay, Hu et al. 2024
        fall = config.wsd_decay_share
        height = min(1.0, (1 - progress) / fall) if fall else 1.0
    return config.min_lr + height * (config.learning_rate - config.min_lr)
