"""Weights from elsewhere, to start from or to sample."""

from __future__ import annotations

import dataclasses

import torch

import tokenizer as tokenizers
from model import GPTConfig


@dataclasses.dataclass(frozen=True)
class Pretrained:
    config: GPTConfig
    weights: dict[str, torch.Tensor]  # the state_dict of a GPT(config), in float32
    tokenizer: tokenizers.Tokenizer | None  # where it came with one
