"""Several models as one whose probabilities are the mean of theirs; to sample, evaluate, distill.

Hansen & Salamon 1990; distillation: Hinton et al. 2015.
"""

import dataclasses
import math

import torch
from torch import nn

from model import cross_entropy
from quill.errors import InputError
from quill.files import split_folders
from quill.interop import pretrained
from quill.interop.pretrained import Pretrained


class Ensemble(nn.Module):
    """Has the methods of `GPT` that sampling and evaluation use. Its logits are log-probabilities.

    vocab_size: the members' logits from here on are for padding tokens, and left out.
    """

    def __init__(self, members: list[nn.Module], vocab_size: int):
        super().__init__()
        self.members, self.vocab_size = nn.ModuleList(members), vocab_size
        self.config = min((m.config for m in members), key=lambda config: config.block_size)

    def forward(
        self, idx, targets=None, *, reduction="mean", loss_only=False, cache=None, last_only=False
    ):
        caches = [None] * len(self.members) if cache is None else cache.of_members
        total = None
        for member, own_cache in zip(self.members, caches, strict=True):
            logits, _ = member(idx, cache=own_cache, last_only=last_only)
            log_probs = logits[..., : self.vocab_size].float().log_softmax(dim=-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
        log_probs = total - math.log(len(self.members))  # (B, T or 1, vocab_size)
        return log_probs, cross_entropy(log_probs, targets, reduction)

    def new_cache(self, batch_size: int) -> "EnsembleCache":
        return EnsembleCache([member.new_cache(batch_size) for member in self.members])


class EnsembleCache:
    def __init__(self, of_members: list):
        self.of_members = of_members  # None where a member has no use for one

    def clear(self) -> None:
        for cache in self.of_members:
            if cache is not None:
                cache.clear()


@dataclasses.dataclass(frozen=True)
class PretrainedEnsemble(Pretrained):
    """The first member's weights, and the other members."""

    others: tuple[Pretrained, ...] = ()

    def build(self) -> Ensemble:
        models = [super().build(), *(other.build() for other in self.others)]
        return Ensemble(models, self.tokenizer.vocab_size)

    def parts(self, name: str) -> list[tuple[str, Pretrained]]:
        folders = map(str, split_folders(name))
        return [*zip(folders, (self, *self.others), strict=True)]


def from_folders(names: str) -> Pretrained:
    """The best weights of a run's folder, or of several whose names are separated by commas.

    Raises InputError for runs that cannot be averaged.
    """
    first, *others = (pretrained.from_folder(folder) for folder in split_folders(names))
    if any(other.tokenizer.to_json() != first.tokenizer.to_json() for other in others):
        raise InputError(f"{names}: runs of different tokenizers cannot be averaged")
    return PretrainedEnsemble(**vars(first), others=tuple(others)) if others else first
