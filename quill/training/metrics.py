"""Metrics of an evaluation beside the loss."""

import torch
from torch.nn import functional as F

from quill.data.dataset import IGNORE_INDEX


def count_answers(logits, targets):
    """logits (B, T, V), targets (B, T) -> how many answers there are, and how many are right.

    An answer is a run of targets that carry loss, right when each scores highest given the right
    ones before it: what greedy decoding would write. A tensor of two.
    """
    counts = targets != IGNORE_INDEX
    begins = counts & ~F.pad(counts, (1, 0))[:, :-1]
    number = begins.cumsum(dim=1)  # of the answer that a target belongs to, from 1 on
    is_wrong = counts & (logits.argmax(dim=-1) != targets)
    n_wrong = torch.zeros_like(F.pad(number, (1, 0))).scatter_add_(1, number, is_wrong.long())
    n_answers = begins.sum()
    return torch.stack((n_answers, n_answers - (n_wrong[:, 1:] > 0).sum()))
