"""The optimizers and their learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from quill.training import distributed

if TYPE_CHECKING:
    from model import GPT
    from train import TrainConfig


def orthogonalize(x):
    """The nearest semi-orthogonal matrices to (N, R, C), roughly: singular values of 0.7 to 1.2.

    Five Newton-Schulz steps; the three factors and the method are Jordan et al.'s, 2024.
    """
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        poly = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made orthogonal. Jordan et al. 2024.

    As torch.optim.Muon, but matrices of one shape are worked on as one batch, a group's `parts`
    says of how many each is stacked (query, key and value are three), and a step with `found_inf`
    set changes no weight, without waiting for the device.
    """

    found_inf = None

    def __init__(self, groups: list[dict], lr: float, momentum: float, weight_decay: float, dtype):
        self.dtype = dtype  # of the Newton-Schulz products
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self._step_together(params, group)

    def _step_together(self, params: list, group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        averages = [self.state[p]["momentum_buffer"] for p in params]
        if self.found_inf is not None:  # a gradient equal to the average does not move it
            pairs = zip(averages, grads, strict=True)
            grads = [torch.where(self.found_inf > 0, *pair) for pair in pairs]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, averages, group["momentum"])  # Nesterov's
        x = torch.stack(ahead).to(self.dtype)  # (N, parts * R, C)
        parts = x.reshape(len(params) * group["parts"], -1, x.size(2))  # (N * parts, R, C)
        update = orthogonalize(parts)
        rate = group["lr"] * max(1, parts.size(1) / parts.size(2)) ** 0.5
        decay = group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            update = torch.where(self.found_inf > 0, 0, update)
            decay = decay * (self.found_inf == 0)
        torch._foreach_mul_(params, 1 - decay)
        torch._foreach_add_(params, update.reshape(x.shape).unbind(), alpha=-rate)


def make_optimizers(
    model: GPT, config: TrainConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    dtype: of matrix products, Muon's included; its range is too wide for float16.

    Loshchilov & Hutter 2019; Jordan et al. 2024. Matrices are decayed, gains and biases are not.
    """
    groups = model.parameter_groups()
    optimizers: list[torch.optim.Optimizer] = []
    matrices = groups["embedding"]
    if config.optimizer == "muon":
        stacks = [
            {"params": groups["hidden"], "parts": 1},
            {"params": groups["fused_qkv"], "parts": 3},
        ]
        dtype = torch.float32 if dtype == torch.float16 else dtype
        options = (config.muon_learning_rate, config.muon_momentum, config.weight_decay, dtype)
        optimizers.append(Muon(stacks, *options))
    else:
        matrices = matrices + groups["hidden"] + groups["fused_qkv"]
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
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [saved["state"].get(i, {}) for i in range(len(params))]
    for p, state in zip(params, states, strict=True):
        fits = all(torch.is_tensor(t) and t.shape in ((), p.shape) for t in state.values())
        if not fits or state.keys() != states[0].keys() or (has_stepped and not state):
            raise ValueError("its optimizer state does not fit the model")
    spread = {
        i: {name: distributed.spread(tensor, like=p) for name, tensor in state.items()}
        for i, (p, state) in enumerate(zip(params, states, strict=True))
        if state
    }
    present = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": spread, "param_groups": present})


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
