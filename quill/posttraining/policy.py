"""The losses of post-training, as functions of tensors: policy gradients and preferences."""

import torch
from torch.nn import functional as F

from quill.data.dataset import IGNORE_INDEX


def token_log_probs(logits, targets, temperature: float = 1.0):
    """logits (N, T, V), targets (N, T) -> each target's log-probability and the entropy there.

    Both (N, T), in nats, 0 where the target is ignored.
    """
    log_probs = F.log_softmax(logits.float() / temperature, dim=-1)
    counts = targets != IGNORE_INDEX
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return chosen.masked_fill(~counts, 0), entropy.masked_fill(~counts, 0)


def squared_scores(logits, targets, temperature: float = 1.0):
    """How strongly a completion pulls at the policy: (N,), for logits (N, T, V), targets (N, T).

    The squared length of the gradient of its log-probability by the scaled logits.
    """
    probs = F.softmax(logits.float() / temperature, dim=-1)
    chosen = probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    of_tokens = 1 - 2 * chosen + (probs * probs).sum(dim=-1)
    return of_tokens.masked_fill(targets == IGNORE_INDEX, 0).sum(dim=1)


def group_advantages(rewards, weights=None, by_std: bool = True):
    """rewards (P, G) of G completions of each prompt -> how much better than the prompt's mean.

    In standard deviations of the group (GRPO, Shao et al. 2024), or as they are. A group whose
    rewards are all the same says nothing, and has advantages of 0.

    weights: (P, G), those of the mean. With `squared_scores` the gradient has the least variance
    (Weaver & Tao 2001): where there is one right answer, a wrong one pulls harder and says less.
    """
    weights = torch.ones_like(rewards) if weights is None else weights + 1e-9
    mean = (weights * rewards).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
    has_signal = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)
    scale = rewards.std(dim=1, keepdim=True) if by_std else 1.0
    return torch.where(has_signal, (rewards - mean) / scale, 0.0)


def clipped_loss(log_probs, old, advantages, low: float, high: float):
    """PPO's loss of each token (Schulman et al. 2017), and whether the clip cuts off its gradient.

    log_probs, old: (N, T), of the present policy and of the one that wrote the tokens.
    advantages: (N, 1). low, high: the ratio stays within 1 - low and 1 + high (apart in DAPO, Yu et
    al. 2025).
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    return -gain, is_clipped & (advantages != 0)


def kl_estimate(log_probs, reference):
    """Of each token, (N, T): how far the policy is from the reference, in nats.

    Schulman's estimator k3 = r - 1 - ln r with r = reference / policy: without bias, never below 0.
    """
    log_ratio = reference - log_probs
    return log_ratio.exp() - 1 - log_ratio


def pair_loss(chosen, rejected):
    """The loss of scores (N,) of which `chosen` should be higher, (N,). Bradley & Terry 1952."""
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta: float):
    """Direct preference optimization, Rafailov et al. 2023; -> (N,).

    All are log-probabilities (N,) of whole completions; reference_*: of the policy's start.
    """
    return pair_loss(beta * (chosen - reference_chosen), beta * (rejected - reference_rejected))
