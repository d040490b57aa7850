from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import CLASSIC, MODERN, VARIANTS, Uncached, WithFixedCache, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from model import (
    GPT,
    GPTConfig,
    KVCache,
    generate,
    logits_to_probs,
    sample,
)
from quill.sampling.decoder import Decoder
from quill.sampling.window import FixedKVCache


@VARIANTS
def test_a_future_token_changes_no_earlier_logit(switches):
    model, idx = tiny_model(switches), random_ids(2, 8)
    logits, _ = model(idx)
    for t in range(1, 8):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after, _ = model(changed)
        assert torch.equal(after[:, :t], logits[:, :t])
        assert not torch.allclose(after[:, t:], logits[:, t:])


@VARIANTS
def test_earlier_tokens_matter_and_so_does_their_order(switches):
    model = tiny_model(switches)
    logits = [model(torch.tensor([ids]), last_only=True)[0] for ids in ([1, 2, 3], [2, 1, 3])]
    assert not torch.allclose(logits[0], logits[1])


SWITCH_NAMES = "position norm qk_norm mlp tied_head residual_init".split()
SWITCHES = [
    *itertools.product(
        ("learned", "rotary"), ("layernorm", "rmsnorm"), (False, True),
        ("gelu", "gelu_tanh", "relu", "relu2", "swiglu"), (False, True), ("scaled", "zero"),
    )
]  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "n_embd"), [(65, 128), (65, 384), (5000, 64)])
def test_the_first_loss_is_that_of_a_uniform_guess(vocab_size, n_embd):
    idx = torch.randint(0, vocab_size, (8, 33), generator=torch.Generator().manual_seed(0))
    stds = itertools.cycle([0.02, 0.08])
    for values in SWITCHES[::7]:
        torch.manual_seed(0)
        config = GPTConfig(32, vocab_size, 4, 4, n_embd, 0.0, True, init_std=next(stds))
        model = GPT(dataclasses.replace(config, **dict(zip(SWITCH_NAMES, values, strict=True))))
        with torch.no_grad():
            loss = model(idx[:, :-1], idx[:, 1:])[1].item()
        assert loss == pytest.approx(math.log(vocab_size), rel=0.01), model.config


@VARIANTS
def test_overfits_one_batch(switches):
    model = tiny_model(switches, is_random=False, n_embd=32).train()
    idx, targets = random_ids(2, 8), random_ids(2, 8).flip(1)
    idx[:, 0] = torch.tensor([0, 1])  # tells the rows apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_ignored_targets_carry_no_loss():
    model, idx, targets = tiny_model(CLASSIC), random_ids(2, 8), random_ids(2, 8)
    targets[0, :] = -1
    assert torch.allclose(model(idx, targets)[1], model(idx[1:], targets[1:])[1])
    total = model(idx, targets, reduction="sum")[1]
    assert torch.allclose(total, model(idx, targets)[1] * 8)
    nothing = model(idx, torch.full_like(targets, -1), reduction="sum")[1]
    assert nothing.item() == 0


@given(st.integers(1, 20), st.sampled_from(["mean", "sum"]), st.data())
def test_a_loss_in_chunks_is_that_of_all_logits_at_once(n_rows, reduction, data):
    model = tiny_model(CLASSIC)
    idx = random_ids(2, 8)
    targets = torch.tensor(data.draw(st.lists(st.integers(-1, 10), min_size=16, max_size=16)))
    targets[0] = 3  # one that counts, for a mean
    results = []
    for max_logits in (2**27, n_rows * 11):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("model.MAX_LOGITS", max_logits)
            model.zero_grad()
            logits, loss = model(idx, targets.view(2, 8), reduction=reduction, loss_only=True)
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((loss.item(), gradient))
        assert logits is None
        assert loss.item() == pytest.approx(
            model(idx, targets.view(2, 8), reduction=reduction)[1].item(), rel=1e-6
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


def test_a_loss_in_chunks_keeps_no_logits_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr("model.MAX_LOGITS", 4 * 1000)
    model, idx = tiny_model(CLASSIC, vocab_size=1000), random_ids(2, 8)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, loss = model(idx, idx, loss_only=True)
    n_weights = model.lm_head.weight.numel()
    assert max(n for n in saved if n != n_weights) < 4 * 1000
    loss.backward()


def test_under_autocast_the_residual_stream_has_its_dtype():
    """Half the bytes; parameters, norms' statistics and the loss stay float32."""
    model, dtypes = tiny_model(MODERN), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = model(random_ids(2, 8), random_ids(2, 8))
    assert dtypes == [torch.bfloat16] * 2 and loss.dtype == torch.float32
    model(random_ids(2, 8))
    assert dtypes[2:] == [torch.float32] * 2


def test_classic_names_are_gpt2s():
    names = set(tiny_model(CLASSIC, n_layer=1).state_dict())
    block = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split()
    expected = {f"transformer.h.0.{part}.{kind}" for part in block for kind in ("weight", "bias")}
    expected |= {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert names == expected | {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_sizes_are_gpt2s():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    # 6 N + 12 L C T, with N the 123.5 M weights that multiply a token
    assert model.flops_per_token() == pytest.approx(6 * 123.5e6 + 12 * 12 * 768 * 1024, rel=1e-3)


@VARIANTS
def test_parameter_groups_hold_every_tensor_once(switches):
    model = tiny_model(switches)
    groups = model.parameter_groups()
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert all(p.dim() == 2 for p in groups["hidden"] + groups["embedding"])
    assert all(p.dim() == 1 for p in groups["vector"]) and groups["hidden"]
    assert model.transformer.wte.weight in set(groups["embedding"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"n_embd": 15}, "n_embd=15"), ({"position": "rotary", "n_embd": 6}, "heads of 3")],
)
def test_shapes_that_cannot_work(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_model({}, **changes)


# ---- cache and generation ----------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("cache_type", [KVCache, FixedKVCache])
def test_reading_in_parts_through_the_cache_equals_reading_at_once(switches, cache_type):
    model, idx = tiny_model(switches), random_ids(3, 8)
    cache = cache_type(model, 3)
    with torch.no_grad():
        whole, _ = model(idx)
        for _ in range(2):
            parts = [model(part, cache=cache)[0] for part in idx.split([3, 1, 2, 1, 1], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
            cache.clear()


def numbers(n_rows: int, n_tokens: int, seed=0) -> torch.Tensor:
    return torch.rand(n_rows, n_tokens, generator=torch.Generator().manual_seed(seed))


def generated(model, idx, n_tokens, seed=0, **options) -> list[list[int]]:
    columns = iter(numbers(idx.size(0), n_tokens, seed).T)
    steps = generate(model, idx, n_tokens, uniform=columns.__next__, **options)
    return torch.stack([*steps], dim=1).tolist()


@VARIANTS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt_tokens", [1, 7, 8, 13])
def test_cached_equals_uncached_across_the_block_size(switches, temperature, prompt_tokens):
    model, idx = tiny_model(switches), random_ids(3, prompt_tokens)
    with_cache = generated(model, idx, 30, temperature=temperature)
    assert with_cache == generated(Uncached(model), idx, 30, temperature=temperature)
    assert with_cache == generated(WithFixedCache(model), idx, 30, temperature=temperature)
    assert temperature == 0 or len({tuple(row) for row in with_cache}) == 3


def test_a_full_context_goes_on_with_its_most_recent_half():
    model, idx = tiny_model(CLASSIC), random_ids(1, 8)
    first = generated(model, idx, 1, temperature=0)[0]
    recent = torch.cat((idx, torch.tensor([first])), dim=1)[:, -4:]
    assert (
        generated(model, idx, 5, temperature=0)[0]
        == first + generated(model, recent, 4, temperature=0)[0]
    )


def test_block_size_of_one():
    assert len(generated(tiny_model(CLASSIC, block_size=1), random_ids(1, 1), 5)[0]) == 5


def test_a_rows_tokens_do_not_depend_on_the_other_rows():
    model, idx = tiny_model(MODERN), random_ids(1, 3)
    rows = numbers(4, 20)

    def continued(idx, rows):
        steps = generate(model, idx, 20, uniform=iter(rows.T).__next__)
        return torch.stack([*steps], dim=1)

    together = continued(idx.expand(4, -1), rows)
    alone = [continued(idx, rows[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_padding_is_never_generated():
    model = tiny_model(CLASSIC)
    tokens = generated(Decoder(model, vocab_size=3), random_ids(4, 2), 50, temperature=5.0)
    assert {token for row in tokens for token in row} == {0, 1, 2}


LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((1.0, 0, 1.0), [0.5, 0.25, 0.15, 0.1]),
        ((0.0, 0, 1.0), [1, 0, 0, 0]),
        ((1e-40, 0, 1.0), [1, 0, 0, 0]),
        ((1e-300, 0, 1.0), [1, 0, 0, 0]),
        ((0.5, 0, 1.0), [0.7246, 0.1812, 0.0652, 0.0290]),
        ((1.0, 2, 1.0), [2 / 3, 1 / 3, 0, 0]),
        ((1.0, 99, 1.0), [0.5, 0.25, 0.15, 0.1]),
        ((1.0, 0, 0.7), [2 / 3, 1 / 3, 0, 0]),
        ((1.0, 0, 0.76), [0.5556, 0.2778, 0.1667, 0]),
        ((1.0, 0, 0.0), [1, 0, 0, 0]),
        ((1.0, 3, 0.6), [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_logits_to_probs(options, expected):
    order = [2, 0, 3, 1]  # the result must not depend on the tokens' order
    probs = logits_to_probs(LOGITS[:, order], *options)[0]
    assert probs.tolist() == pytest.approx([expected[i] for i in order], abs=1e-4)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda ps: sum(ps) > 1e-3),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_sample_never_draws_the_impossible(weights, uniform):
    probs = torch.tensor([weights])
    probs = probs / probs.sum()
    token = sample(probs, torch.tensor([uniform])).item()
    assert probs[0, token] > 0


def test_sample_draws_in_proportion():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(1000) + 0.5) / 1000
    counts = sample(probs.expand(1000, -1), uniform).flatten().bincount(minlength=4)
    assert counts.tolist() == [500, 0, 300, 200]
