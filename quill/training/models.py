"""The models that a run can train: the GPT, and the bigram baseline it is compared with."""

import dataclasses
import math

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig, cross_entropy
from quill.errors import InputError

KINDS = ("gpt", "bigram")


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    block_size: int  # how the text is cut; the model itself sees one token
    vocab_size: int


class Bigram(nn.Module):
    """Scores the next token by the row of a table that the last token chooses.

    It has the methods of `GPT`, so that it is trained, saved and sampled by the same code.
    """

    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)  # the first loss is ln(V)

    def forward(
        self, idx, targets=None, *, reduction="mean", loss_only=False, cache=None, last_only=False
    ):
        logits = self.table(idx[:, -1:] if last_only else idx)  # (B, T, V)
        return logits, cross_entropy(logits, targets, reduction)

    def new_cache(self, batch_size: int) -> None:
        """A bigram has no use for a cache."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"fused_qkv": [], "hidden": [], "embedding": [self.table.weight], "vector": []}

    def n_parameters(self) -> int:
        return self.table.weight.numel()

    def flops_per_token(self) -> float:
        """A look-up multiplies nothing."""
        return 0.0


def build(config: GPTConfig | BigramConfig) -> GPT | Bigram:
    return (Bigram if isinstance(config, BigramConfig) else GPT)(config)


class SkipInit(TorchFunctionMode):
    """In the block nn.init leaves weights as they are, for a model that is given others.

    That saves time, and on the meta device the import of PyTorch's compiler.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def config_from_options(options, vocab_size: int) -> GPTConfig | BigramConfig:
    """The model that train.py's options describe; raises InputError when they do not fit."""
    padded = math.ceil(vocab_size / options.vocab_multiple) * options.vocab_multiple
    if options.model == "bigram":
        return BigramConfig(options.block_size, padded)
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size"}
    try:
        return GPTConfig(vocab_size=padded, **{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise InputError(str(error)) from None


def config_to_dict(config: GPTConfig | BigramConfig) -> dict:
    """As checkpoints hold it: the fields, and under "model" which of the two it is."""
    kind = "bigram" if isinstance(config, BigramConfig) else "gpt"
    return dataclasses.asdict(config) | {"model": kind}


def config_from_dict(values: dict) -> GPTConfig | BigramConfig:
    """Undoes `config_to_dict`. Raises TypeError or ValueError where it is not such a dict."""
    kind = values.get("model", "gpt")  # older checkpoints do not say it
    if kind not in KINDS:
        raise ValueError(f"model={kind!r} is none of {KINDS}")
    # Which checks the values; in older checkpoints a bigram has all of these fields.
    config = GPTConfig(**{name: value for name, value in values.items() if name != "model"})
    return config if kind == "gpt" else BigramConfig(config.block_size, config.vocab_size)


def count_parameters(config: GPTConfig | BigramConfig) -> int:
    """All trained numbers of such a model, without allocating it: all layers are of one size."""
    if isinstance(config, BigramConfig):
        return sum(p.numel() for p in _without_data(config).parameters())
    one, two = (
        sum(p.numel() for p in _without_data(dataclasses.replace(config, n_layer=n)).parameters())
        for n in (1, 2)
    )
    return one + (config.n_layer - 1) * (two - one)


def _without_data(config: GPTConfig | BigramConfig) -> nn.Module:
    """Such a model, of which nothing is allocated, for the shapes of its weights.

    The table of rotary positions, which is no weight, is left out: PyTorch would import its
    compiler to make one without data.
    """
    is_rotary = getattr(config, "position", None) == "rotary"
    with torch.device("meta"), SkipInit():
        if not is_rotary:
            return build(config)
        model = build(dataclasses.replace(config, position="learned"))
    del model.transformer["wpe"]
    return model


def state_shapes(config: GPTConfig | BigramConfig, n_tensors: int) -> dict[str, torch.Size]:
    """The shapes of such a model's state_dict, of which nothing is allocated.

    n_tensors: how many are expected. Raises ValueError for a config of more layers, which would
    take long.
    """
    n_layer = getattr(config, "n_layer", 0)
    if n_layer > n_tensors:
        raise ValueError(f"n_layer={n_layer} with {n_tensors} tensors")
    return {name: p.shape for name, p in _without_data(config).state_dict().items()}


def check_weights(config: GPTConfig | BigramConfig, weights: dict) -> None:
    """Raises an error, ValueError or another, when they are not the weights of such a model."""
    if state_shapes(config, len(weights)) != {name: p.shape for name, p in weights.items()}:
        raise ValueError("not the tensors of that model")
    check_finite(weights)


def check_finite(weights: dict) -> None:
    """Raises ValueError where a number of these tensors is not finite."""
    if not all(p.isfinite().all() for p in weights.values()):
        raise ValueError("a weight is not finite")
