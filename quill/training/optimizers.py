"""AdamW, Muon, and the learning rate schedule."""

import dataclasses
import math
from typing import Literal

import torch

from quill.errors import InputError
from quill.settings import option

_LARGEST = 1e30  # an update by a rate that float32 cannot represent would be an error of PyTorch's


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options of train.py."""

    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: for the blocks' matrices alone")
    learning_rate: float = option(6e-4, "peak learning rate of AdamW", min=0, max=_LARGEST)
    muon_learning_rate: float = option(0.02, "peak learning rate of Muon", min=0, max=_LARGEST)
    muon_momentum: float = option(0.95, "Muon's momentum", min=0, max=0.9999)
    max_iters: int = option(600000, "optimizer updates to make", min=0)
    weight_decay: float = option(
        0.1, "decay of matrices, times the learning rate", min=0, max=_LARGEST
    )
    beta1: float = option(0.9, "AdamW's decay of the mean gradient", min=0, max=0.9999)
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", min=0, max=0.9999)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 does not clip", min=0)
    skip_nonfinite: int = option(0, "updates to skip if not finite, at most", min=0, max=10**4)
    average_decay: float = option(0.0, "evaluate averaged weights; 0: none", min=0, max=0.99999)
    decay_lr: bool = option(True, "false keeps the learning rate constant")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", "decay after warm-up; wsd: constant, then linear; constant: neither"
    )
    warmup_iters: int = option(2000, "steps of linear warm-up", min=0)
    lr_decay_iters: int = option(0, "step where min_lr is reached; 0: max_iters", min=0)
    min_lr: float = option(6e-5, "lowest learning rate, after the decay", min=0, max=_LARGEST)
    wsd_decay_share: float = option(0.2, "fraction of the steps in wsd's decay", min=0, max=1)


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
    """Momentum, made orthogonal matrix by matrix. Jordan et al. 2024.

    Like torch.optim.Muon, but matrices of one shape are processed as one batch, `parts` of a group
    says how many matrices each parameter stacks (query, key and value are three), and a step with
    `found_inf` set changes no weight, without waiting for the device.
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
                self._step_batch(params, group)

    def _step_batch(self, params: list, group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        if self.found_inf is not None:  # a gradient equal to the momentum does not change it
            pairs = zip(momenta, grads, strict=True)
            grads = [torch.where(self.found_inf > 0, *pair) for pair in pairs]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        x = torch.stack(ahead).to(self.dtype)  # (N, parts * R, C)
        parts = x.reshape(len(params) * group["parts"], -1, x.size(2))  # (N * parts, R, C)
        update = orthogonalize(parts)
        rate = group["lr"] * max(1, parts.size(1) / parts.size(2)) ** 0.5
        decay = group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            update = torch.where(self.found_inf > 0, 0, update)
            decay = decay * (self.found_inf == 0)
        torch._foreach_mul_(params, 1 - decay)
        update = update.float() * -rate  # the rate may be a tensor
        torch._foreach_add_(params, update.reshape(x.shape).unbind())


def make_optimizers(
    model: torch.nn.Module, config: OptimizerOptions, dtype: torch.dtype, capturable: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    dtype: of matrix products, Muon's included; its range is too wide for float16.
    capturable: for a step that becomes a CUDA graph, learning rates are tensors on the device.

    Loshchilov & Hutter 2019; Jordan et al. 2024. Matrices are decayed, gains and biases are not.
    """
    groups = {
        kind: [p for p in group if p.requires_grad]  # not what LoRA leaves as it is
        for kind, group in model.parameter_groups().items()
    }
    optimizers: list[torch.optim.Optimizer] = []
    matrices = groups["embedding"]
    if config.optimizer == "muon":
        if config.learning_rate == 0:
            raise InputError(
                "learning_rate=0: Muon's rate rises and falls in proportion to it: give a small one"
            )
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
    options = {"betas": betas, "fused": True, "capturable": capturable}
    optimizers.append(torch.optim.AdamW(decays, lr=config.learning_rate, **options))
    device = next(model.parameters()).device
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
            if capturable:
                group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizers


def set_lr(optimizers: list, config: OptimizerOptions, step: int) -> None:
    """Scale every group's peak rate as the schedule scales AdamW's."""
    scale = get_lr(config, step) / (config.learning_rate or 1.0)  # 0: for AdamW alone
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = scale * group["initial_lr"]
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def schedule_warnings(config: OptimizerOptions) -> list[str]:
    """In words, what is odd about the learning rate's schedule, in a run of so many steps."""
    n, warmup = config.max_iters, config.warmup_iters
    end = config.lr_decay_iters or n
    if config.lr_schedule == "constant" or not config.decay_lr or n == 0:
        return []
    if config.min_lr > config.learning_rate:
        return [
            f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}: it will rise"
        ]
    if warmup >= min(n, end):
        return [f"warmup_iters={warmup} leaves no step of {min(n, end)} at the full learning rate"]
    if end > n:
        return [f"lr_decay_iters={end} lies beyond max_iters={n}: min_lr is not reached"]
    return [f"from step {end} on the learning rate is min_lr={config.min_lr}"] if end < n else []


def get_lr(config: OptimizerOptions, step: int) -> float:
    """AdamW's learning rate for the update after `step` updates: warm-up, then the decay."""
    if config.lr_schedule == "constant" or not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)  # 0 .. 1
    if config.lr_schedule == "cosine":
        coefficient = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.lr_schedule == "linear":
        coefficient = 1 - progress
    elif config.lr_schedule == "wsd":  # warmup-stable-decay, Hu et al. 2024
        decay = config.wsd_decay_share
        coefficient = min(1.0, (1 - progress) / decay) if decay else 1.0
    else:
        raise ValueError(f"lr_schedule={config.lr_schedule}: no such schedule")
    return config.min_lr + coefficient * (config.learning_rate - config.min_lr)
