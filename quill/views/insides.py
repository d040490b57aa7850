"""What can be seen of a model while it reads: attention, guesses of each layer, similar embeddings.

Shapes:  T time, in tokens   V vocab_size   nh n_head   hs head size   C n_embd
"""

import contextlib
import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import GPT, attend


@contextlib.contextmanager
def in_place(hooks: list):
    """They are removed after the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_hooks(model: GPT, record: Callable) -> list:
    """Each block's attention calls record(q, k), (1, nh, T, hs) each, while the model reads."""

    def call(attention, inputs):
        x, rotary, _ = inputs
        record(*attention.queries_keys_values(x, rotary)[:2])

    return [block.attn.register_forward_pre_hook(call) for block in model.transformer.h]


def attention_weights(q, k):
    """The causal softmax weights that `model.attend` gives each value: (B, nh, T, T)."""
    T = q.size(2)
    identity = torch.eye(T, dtype=q.dtype, device=q.device).expand(*q.shape[:2], T, T)
    return attend(q, k, identity, is_causal=True)  # weights @ identity


def attention_maps(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """ids (T) -> the attention of each token to each: (n_layer, nh, T, T), whose rows sum to 1."""
    maps = []

    def record(q, k):
        maps.append(attention_weights(q, k)[0])  # (nh, T, T)

    with in_place(attention_hooks(model, record)):
        model(ids[None])
    return torch.stack(maps)


def guesses(model: GPT, ids: torch.Tensor, vocab_size: int, n_guesses: int):
    """ids (T + 1) -> the loss of each but the first, in nats (T), and the likeliest tokens there.

    The latter are token ids and their probabilities, (T, n_guesses) each.
    """
    logits = model(ids[None, :-1])[0][0]  # (T, V)
    surprise = F.cross_entropy(logits, ids[1:], reduction="none")
    probs, tokens = logits.softmax(dim=-1)[:, :vocab_size].topk(min(n_guesses, vocab_size))
    return surprise, tokens, probs


def neighbours(model: GPT, tokens: list[int], vocab_size: int, n: int):
    """-> cosines and token ids, (N, n) each for N tokens, of the most similar embeddings."""
    vectors = F.normalize(model.transformer.wte.weight[:vocab_size])  # (V, C)
    cosines = vectors[tokens] @ vectors.T  # (N, V)
    cosines[range(len(tokens)), tokens] = -math.inf  # not a neighbour of itself
    return cosines.topk(min(n, vocab_size - 1))


class Position(NamedTuple):
    """What the model did at the last of T tokens."""

    attention: torch.Tensor  # (n_layer, nh, T), each row sums to 1
    lens: torch.Tensor  # (n_layer + 1, V) probabilities of the next token after 0, 1 ... blocks


def look_at_last(model: GPT, ids: torch.Tensor, vocab_size: int) -> Position:
    """ids: (T). The guesses of the first blocks are read off by the head of the last.

    This is the logit lens (nostalgebraist 2020). vocab_size: without padding tokens.
    """
    rows, states = [], []

    def record_attention(q, k):
        T = k.size(2)
        identity = torch.eye(T, dtype=k.dtype, device=k.device).expand(*k.shape[:2], T, T)
        rows.append(attend(q[:, :, -1:], k, identity)[0, :, 0])  # weights @ identity, (nh, T)

    def record_state(block, inputs):
        states.append(inputs[0][0, -1])  # (C)

    hooks = attention_hooks(model, record_attention)
    hooks += [block.register_forward_pre_hook(record_state) for block in model.transformer.h]
    with in_place(hooks):
        logits, _ = model(ids[None], last_only=True)
    between = model.head(torch.stack(states))  # (n_layer, V)
    lens = torch.cat((between, logits[0]))[:, :vocab_size].float().softmax(dim=-1)
    return Position(torch.stack(rows), lens)


class Stage(NamedTuple):
    """A tensor on the way from ids to logits."""

    name: str  # of the layer whose output it is
    shape: list[int]
    line: int  # of model.py, where that layer is called


@torch.inference_mode()
def stages(model: GPT, T: int) -> list[Stage]:
    """The outputs of the layers for a text of T tokens; of the blocks, the first."""
    block, found = model.transformer.h[0], []
    owners = {"wte": model, "ln_f": model, "lm_head": model}  # in whose class a layer is called
    layers = {
        "wte": model.transformer.wte,
        "ln_f": model.transformer.ln_f,
        "lm_head": model.lm_head,
    }
    for path, layer in block.named_modules():
        if path and not list(layer.children()) and "dropout" not in path:
            owners[f"h.0.{path}"] = block.get_submodule(path.rpartition(".")[0])
            layers[f"h.0.{path}"] = layer

    def record(name):
        line = line_of_call(owners[name], name.split(".")[-1])
        return lambda layer, inputs, output: found.append(Stage(name, list(output.shape), line))

    idx = torch.zeros(1, T, dtype=torch.int64, device=model.lm_head.weight.device)
    with in_place([layer.register_forward_hook(record(name)) for name, layer in layers.items()]):
        model(idx)
    nh, hs = model.config.n_head, model.config.head_size
    after = [stage.name for stage in found].index("h.0.attn.c_attn") + 1
    heads = {"q, k and v, each": ("queries_keys_values", hs), "attention weights": ("attend", T)}
    found[after:after] = [
        Stage(f"h.0.attn: {name}", [1, nh, T, n], line_of_call(block.attn, call))
        for name, (call, n) in heads.items()
    ]
    return found


def line_of_call(owner: torch.nn.Module, name: str) -> int:
    """The line of model.py where the class of `owner` calls its layer of this name."""
    lines, first = inspect.getsourcelines(type(owner))
    call = re.compile(rf"(?<!def )\b{name}\(")
    return next(first + i for i, line in enumerate(lines) if call.search(line))
