"""Advantages, clipping, KL, preferences: against hand-made values, enumeration and autograd."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import VARIANTS, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from quill.data.tokenizers import CharTokenizer
from quill.posttraining.policy import (
    clipped_loss,
    dpo_loss,
    group_advantages,
    kl_estimate,
    squared_scores,
    token_log_probs,
)
from quill.posttraining.rollouts import complete, pack, roll_out
from quill.sampling.decoder import Decoder

TWO_TOKENS = [*itertools.product((0, 1), repeat=2)]
REWARDS = torch.tensor([0.0, 1.0, 0.5, -2.0])  # of the four completions of two tokens


def toy_logits(theta):
    """theta (3, 2): scores of the first token, and of the second after either -> (4, 2, 2)."""
    return torch.stack([torch.stack((theta[0], theta[1 + first])) for first, _ in TWO_TOKENS])


@given(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), st.floats(-2, 2))
def test_the_policy_gradient_is_that_of_the_expected_reward(numbers, baseline):
    """Of all four completions of a toy, each weighted by its probability, whatever the baseline."""
    theta = torch.tensor(numbers, dtype=torch.float64).view(3, 2).requires_grad_()
    targets = torch.tensor(TWO_TOKENS)
    log_probs, _ = token_log_probs(toy_logits(theta), targets)
    probs = log_probs.sum(dim=1).exp()
    [exact] = torch.autograd.grad(-(probs * REWARDS).sum(), theta, retain_graph=True)
    advantages = (REWARDS - baseline)[:, None]
    losses, _ = clipped_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.2)
    [estimated] = torch.autograd.grad((probs.detach()[:, None] * losses).sum(), theta)
    torch.testing.assert_close(estimated, exact, rtol=1e-4, atol=1e-5)


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 4.0]])
    plain = group_advantages(rewards, by_std=False)
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [-1.0, -1.0, -1.0, 3.0]]
    scaled = group_advantages(rewards)
    assert scaled[0].tolist() == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
    assert scaled[1].tolist() == [0.0] * 4, "all the same: no signal, and no division by 0"
    weights = torch.tensor([[1.0, 3.0, 3.0, 1.0]])
    assert group_advantages(rewards[:1], weights, by_std=False)[0, 0] == pytest.approx(0.75)


def test_squared_scores_are_those_of_the_gradient():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 5), torch.randint(-1, 5, (3, 4))
    scaled = (logits / 0.7).requires_grad_()
    log_probs, _ = token_log_probs(scaled, targets)
    [gradient] = torch.autograd.grad(log_probs.sum(), scaled)
    wanted = (gradient**2).sum(dim=(1, 2))
    torch.testing.assert_close(squared_scores(logits, targets, 0.7), wanted)


def test_the_clip_cuts_off_what_went_far_enough():
    old = torch.zeros(4, 1)
    log_probs = torch.tensor([[1.5], [1.5], [0.5], [0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    losses, is_clipped = clipped_loss(log_probs, old, advantages, low=0.2, high=0.28)
    assert losses.flatten().tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8])
    assert is_clipped.flatten().tolist() == [True, False, False, True]
    losses.sum().backward()
    assert (log_probs.grad == 0).flatten().tolist() == [True, False, False, True]


def test_the_kl_estimate_is_never_below_zero_and_right_in_the_mean():
    torch.manual_seed(0)
    policy, reference = (torch.randn(7).log_softmax(dim=0) for _ in range(2))
    estimates = kl_estimate(policy, reference)  # of each token
    exact = (policy.exp() * (policy - reference)).sum()
    assert (estimates >= 0).all() and kl_estimate(policy, policy).abs().max() == 0
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)


def test_the_gradient_of_dpo_is_that_of_its_formula():
    """Rafailov et al. 2023, section 4: each pair weighs as much as it is mistaken."""
    numbers = torch.tensor([[-3.0, -1.0], [-4.0, -5.0], [-3.5, -2.0], [-3.0, -4.0]])
    chosen, rejected, *reference = numbers
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    losses = dpo_loss(chosen, rejected, *reference, beta=0.5)
    losses.sum().backward()
    for i in range(2):
        margin = float(numbers[0, i] - numbers[2, i] - numbers[1, i] + numbers[3, i])
        weight = 0.5 / (1 + math.exp(0.5 * margin))
        assert chosen.grad[i].item() == pytest.approx(-weight)
        assert rejected.grad[i].item() == pytest.approx(weight)
        assert losses[i].item() == pytest.approx(math.log(1 + math.exp(-0.5 * margin)))


# ---- rollouts ----------------------------------------------------------------------------------

ALPHABET = CharTokenizer("abcdefghij", ends_texts=True)  # 11 tokens, as tiny_model has


@VARIANTS
def test_the_policy_that_writes_is_the_one_that_is_trained(switches):
    """Log-probabilities read token by token, with the cache, and of the whole row at once."""
    model = tiny_model(switches)
    seen = []

    class Watched(Decoder):
        def __call__(self, idx, **options):
            logits, none = super().__call__(idx, **options)
            seen.append(logits[:, -1].log_softmax(dim=-1))
            return logits, none

    prompts = [random_ids(3).numpy()]
    decoder = Watched(model, 11)
    never_ends = CharTokenizer("abcdefghijk")  # a row that ends could leave the batch
    rollouts = roll_out(decoder, never_ends, prompts, 5, 6, 1.0, [0])
    with torch.no_grad():
        log_probs, _ = token_log_probs(model(rollouts.idx)[0], rollouts.targets)
    assert rollouts.lengths.tolist() == [6] * 5
    for row in range(5):
        for t in range(6):
            token = rollouts.targets[row, 2 + t]
            assert seen[t][row, token].item() == pytest.approx(
                log_probs[row, 2 + t].item(), abs=1e-5
            )


def test_rollouts_depend_on_their_seed_and_place_alone():
    decoder = Decoder(tiny_model({"bias": True}), 11)
    prompts = [random_ids(n).numpy() for n in (2, 4, 2)]
    first = roll_out(decoder, ALPHABET, prompts, 3, 5, 1.0, [1, 7])
    alone = roll_out(decoder, ALPHABET, prompts[:1], 3, 5, 1.0, [1, 7])
    other = roll_out(decoder, ALPHABET, prompts, 3, 5, 1.0, [1, 8])
    assert first.texts[:3] == alone.texts and len(first.texts) == 9 and first.texts != other.texts


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99))
def test_prompts_side_by_side_are_completed_as_each_alone(n_prompt, max_new_tokens, seed):
    """Whatever their lengths, and however early the others end."""
    model = tiny_model({"position": "rotary", "token_shift": True}, block_size=8)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 11, n) for n in n_prompt]
    n_new = np.minimum(max_new_tokens, 9 - np.array(n_prompt))
    numbers = rng.random((len(prompts), n_new.max()), dtype=np.float32)
    decoder = Decoder(model, 11)
    together = complete(decoder, prompts, n_new, numbers, 1.0, 10)
    for i, tokens in enumerate(together):
        alone = complete(decoder, prompts[i : i + 1], n_new[i : i + 1], numbers[i : i + 1], 1.0, 10)
        assert tokens.tolist() == alone[0].tolist()
        assert len(tokens) == n_new[i] or tokens[-1] == 10


def test_a_completion_ends_with_its_end_or_with_the_window():
    """Targets are the completion's tokens, its end included, and nothing else."""
    decoder = Decoder(tiny_model({"bias": True}, block_size=8), 11)
    prompt = random_ids(4).numpy()
    rollouts = roll_out(decoder, ALPHABET, [prompt], 40, 100, 1.0, [0])
    assert set(rollouts.lengths[~rollouts.is_ended]) == {5} and rollouts.is_ended.any()
    for row, text in enumerate(rollouts.texts):
        n = rollouts.lengths[row]
        tokens = rollouts.ids[row, 4 : 4 + n].numpy()
        counts = rollouts.targets[row] != -1
        assert counts.nonzero()[:, 0].tolist() == [*range(3, 3 + n)]
        assert rollouts.targets[row][counts].tolist() == tokens.tolist()
        assert (tokens == 10).tolist() == [False] * (n - 1) + [bool(rollouts.is_ended[row])]
        assert len(text) == n - rollouts.is_ended[row]


def test_packed_rows_are_padded_at_their_ends():
    rows = pack([np.array([1, 2]), np.array([3])], [np.array([4]), np.array([5, 6, 7])], "cpu")
    assert rows.ids.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert rows.targets.tolist() == [[-1, 4, -1], [5, 6, 7]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 4))
def test_rows_by_length_are_all_rows_without_their_padding(lengths, n_rows):
    prompts = [np.array([3]) for _ in lengths]
    batch = pack(prompts, [np.arange(1, n + 1) for n in lengths], "cpu")
    seen = []
    for rows, part in batch.by_length(n_rows):
        T = max(lengths[row] for row in rows)
        assert part.ids.equal(batch.ids[rows, : T + 1]) and part.idx.shape == part.targets.shape
        assert part.targets.equal(batch.targets[rows, :T]) and len(rows) <= n_rows
        seen += rows.tolist()
    assert sorted(seen) == [*range(len(lengths))]
    assert [lengths[row] for row in seen] == sorted(lengths)
