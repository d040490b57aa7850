"""The loss of a model on a whole split, as train.py computes it, in one process."""

import torch

from quill.data.dataset import IGNORE_INDEX, Split
from quill.training import devices
from quill.training.metrics import count_answers


@torch.no_grad()
def evaluate_split(
    model: torch.nn.Module, split: Split, batch_size: int, dtype: torch.dtype, check=lambda: None
) -> tuple[float, float]:
    """-> nats per token, and the fraction of answers that greedy decoding would get right.

    check: called before each batch; may raise.
    """
    offsets = split.eval_offsets(0, whole=True)
    losses, n_targets = [], 0
    answers = torch.zeros(2, dtype=torch.int64, device=split.device)
    for start in range(0, len(offsets), batch_size):
        check()
        idx, targets = split.get_batch(offsets[start : start + batch_size])
        loss_only = split.examples is None
        with devices.autocast(split.device, dtype):
            logits, loss = model(idx, targets, reduction="sum", loss_only=loss_only)
        losses.append(loss)
        n_targets += (targets != IGNORE_INDEX).sum()
        if not loss_only:
            answers += count_answers(logits[..., : split.vocab_size], targets)
    n_answers, n_right = answers.tolist()
    total = float(torch.stack(losses).cpu().double().sum())  # MPS has no float64
    return total / int(n_targets), n_right / max(1, n_answers)
