"""A GPT whose head is a single number: how good the completion is that it has read."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from model import GPT, GPTConfig
from quill.data.dataset import IGNORE_INDEX
from quill.data.tokenizers import Tokenizer, from_json
from quill.errors import InputError, blames_input
from quill.posttraining.rollouts import Batch
from quill.training import checkpoint, models

KIND = "reward"  # in the place where other checkpoints have "gpt" or "bigram"


class RewardModel(nn.Module):
    """It reads prompt and completion; the score is that of the last token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = dataclasses.replace(config, tied_head=False)
        self.gpt = GPT(self.config)
        self.gpt.lm_head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.gpt.lm_head.weight)  # at first all are equally good

    def forward(self, batch: Batch):
        """-> (N,). Of a completion that ends where the window does, the last token is not read."""
        ids = batch.ids[:, : self.config.block_size]
        scores, _ = self.gpt(ids)  # (N, T, 1)
        counts = batch.targets != IGNORE_INDEX
        places = torch.arange(1, counts.size(1) + 1, device=counts.device)
        last = (counts * places).amax(dim=1).clamp(max=ids.size(1) - 1)  # of each row in ids
        return scores[..., 0].gather(1, last[:, None])[:, 0].float()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return self.gpt.parameter_groups()

    def n_parameters(self) -> int:
        return self.gpt.n_parameters()

    def load_body(self, weights: dict) -> None:
        """Start from a language model's weights, all but its head."""
        own = self.gpt.state_dict()
        given = {name: p for name, p in weights.items() if name != "lm_head.weight"}
        self.gpt.load_state_dict(own | given)


def load(path: Path) -> tuple[RewardModel, Tokenizer]:
    """From a run of quill.reward; raises InputError where it is none."""
    contents = checkpoint.load_checkpoint(checkpoint.find_checkpoint(path))
    config = dict(contents["model_config"])
    if config.pop("model", None) != KIND:
        raise InputError(f"{path} is no run of quill.reward")
    with blames_input(f"{path}: its weights do not fit", *checkpoint.LOAD_ERRORS):
        models.state_shapes(GPTConfig(**config), len(contents["model"]))  # not too large to make
        model = RewardModel(GPTConfig(**config))
        model.load_state_dict(contents["model"])
    return model.eval(), from_json(contents["tokenizer"], str(path))
