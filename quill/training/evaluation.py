"""The loss of a model on a split: of train.py's processes together, and of other commands."""

import numpy as np
import torch

from quill.data.dataset import IGNORE_INDEX, Split
from quill.training import devices, distributed
from quill.training.metrics import count_answers


@torch.no_grad()
def evaluate_split(
    forward: torch.nn.Module,
    split: Split,
    offsets: np.ndarray,
    batch_size: int,
    dtype: torch.dtype,
    check=lambda: None,
) -> tuple[float, float]:
    """-> nats per token, and the fraction of answers that greedy decoding would get right.

    offsets: of the windows, as `Split.eval_offsets` gives them; each process takes its part.
    check: called before each batch; may raise.
    """
    rank, n = distributed.rank(), distributed.world_size()
    # Each process takes every n-th batch; windows past the end, whose targets are all ignored,
    # fill up the last ones.
    padding = np.full(-len(offsets) % (n * batch_size), len(split))
    batches = np.append(offsets, padding).reshape(-1, batch_size)
    sums = torch.zeros(len(batches), device=split.device)
    # Of targets, of answers, of right answers.
    counts = torch.zeros(3, len(batches), dtype=torch.int64, device=split.device)
    loss_only, was_training = split.examples is None, forward.training
    forward.eval()
    for i in range(rank, len(batches), n):
        check()
        idx, targets = split.get_batch(batches[i])
        with devices.autocast(split.device, dtype):
            logits, sums[i] = forward(idx, targets, reduction="sum", loss_only=loss_only)
        counts[0, i] = (targets != IGNORE_INDEX).sum()
        if not loss_only:
            counts[1:, i] = count_answers(logits[..., : split.vocab_size], targets)
    forward.train(was_training)
    # Summed in one order, however many processes there are.
    sums, counts = distributed.all_reduce(sums).cpu(), distributed.all_reduce(counts).cpu()
    n_targets, n_answers, n_right = counts.sum(dim=1).tolist()
    return float(sums.double().sum()) / n_targets, n_right / max(1, n_answers)
