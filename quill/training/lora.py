"""Low-rank adapters, put on a model from outside: finetuning in a small memory. Hu et al. 2021.

Each matrix W of the blocks becomes W + B A, of which only A and B are trained. B is zero at first,
so the model starts as it was. A checkpoint has all three, under the names that PyTorch's
parametrizations give them, and whoever loads it for another purpose gets their sum from `merged`.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

ORIGINAL, ADAPTER = ".parametrizations.weight.original", ".parametrizations.weight.0."


class Adapter(nn.Module):
    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        n_out, n_in = weight.shape
        self.a = nn.Parameter(torch.randn(rank, n_in) / n_in**0.5)
        self.b = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, weight):
        return weight + self.b @ self.a


def add_adapters(model: nn.Module, rank: int) -> None:
    """To the blocks' matrices; all that the model had is no longer trained."""
    model.requires_grad_(False)
    for module in model.transformer.h.modules():
        if isinstance(module, nn.Linear):
            adapter = Adapter(module.weight, rank)
            parametrize.register_parametrization(module, "weight", adapter)


def fitted(model: nn.Module, weights: dict) -> dict:
    """Plain weights, for a model with adapters, which stay as they are; others unchanged."""
    adapters = {name: p for name, p in model.state_dict().items() if ADAPTER in name}
    if not adapters or any(ADAPTER in name for name in weights):
        return weights
    adapted = {name.partition(ADAPTER)[0] + ".weight" for name in adapters}
    names = {name: name.removesuffix(".weight") + ORIGINAL for name in adapted}
    return {names.get(name, name): p for name, p in weights.items()} | adapters


def merged(weights: dict) -> dict:
    """The plain weights of a model whose checkpoint may have adapters."""
    plain = {name: p for name, p in weights.items() if ".parametrizations." not in name}
    for name, original in weights.items():
        if name.endswith(ORIGINAL):
            module = name.removesuffix(ORIGINAL)
            a, b = (weights[module + ADAPTER + part] for part in "ab")
            plain[module + ".weight"] = original + b @ a
    return plain
