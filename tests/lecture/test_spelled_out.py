from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import edit_meta, is_one_error_line
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lecture import spelled_out
from model import GPT, CausalSelfAttention, GPTConfig, Norm
from quill.training import optimizers as optim
from train import TrainConfig

EQUAL = {"rtol": 1e-5, "atol": 1e-5}
BIAS = pytest.mark.parametrize("bias", [True, False])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gpt(**switches) -> GPT:
    """GPT-2's block but for ReLU, which the lecture has."""
    shape = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape | {"mlp": "relu"} | switches))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def carry(linear: nn.Linear, weight, bias) -> None:
    """Give a spelled-out layer the weights of another; a bias that this lacks is zero there."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias if bias is not None else torch.zeros_like(linear.bias))


def carry_heads(heads, attention: CausalSelfAttention) -> None:
    """c_attn's rows are all queries, all keys, all values; in each, one head after the other."""
    c_attn = attention.c_attn
    weights = c_attn.weight.view(3, len(heads), -1, c_attn.in_features)
    biases = None if c_attn.bias is None else c_attn.bias.view(3, len(heads), -1)
    for i, head in enumerate(heads):
        for j, linear in enumerate((head.query, head.key, head.value)):
            carry(linear, weights[j, i], None if biases is None else biases[j, i])


@torch.no_grad()
def carry_norm(norm, other: Norm) -> None:
    norm.gain.copy_(other.weight)
    if other.bias is not None:
        norm.bias.copy_(other.bias)


def carry_all(model: GPT) -> spelled_out.LanguageModel:
    """The same model, spelled out."""
    c = model.config
    blocks = [
        spelled_out.Block(c.n_embd, c.n_head, spelled_out.LayerNorm, bias=c.bias)
        for _ in range(c.n_layer)
    ]
    middle = [*blocks, spelled_out.LayerNorm(c.n_embd)]
    spelled = spelled_out.LanguageModel(c.vocab_size, c.block_size, c.n_embd, middle)
    for block, other in zip(blocks, model.transformer.h, strict=True):
        carry_norm(block.norm_1, other.ln_1)
        carry_norm(block.norm_2, other.ln_2)
        carry_heads(block.attention.heads, other.attn)
        carry(block.back_1, other.attn.c_proj.weight, other.attn.c_proj.bias)
        carry(block.feed_forward.linear, other.mlp.c_fc.weight, other.mlp.c_fc.bias)
        carry(block.back_2, other.mlp.c_proj.weight, other.mlp.c_proj.bias)
    carry_norm(middle[-1], model.transformer.ln_f)
    spelled.token.weight.data.copy_(model.transformer.wte.weight)
    spelled.position.weight.data.copy_(model.transformer.wpe.weight)
    carry(spelled.score, model.lm_head.weight, None)
    return spelled


# ---- bigram, loss, optimizer, loop ---------------------------------------------------------------


def test_a_texts_bigram_loss_is_its_tokens_mean_cross_entropy():
    ids = random_ids(500).tolist()
    counts = spelled_out.count_bigrams(ids, 11)
    log_probs = spelled_out.bigram_log_probs(counts, smoothing=1)
    expected = F.cross_entropy(log_probs[ids[:-1]], torch.tensor(ids[1:]))
    assert spelled_out.bigram_loss(counts, log_probs) == pytest.approx(expected.item(), abs=1e-6)


def test_no_bigram_model_fits_its_text_better_than_the_counts():
    ids = random_ids(2000)
    counts = spelled_out.count_bigrams(ids.tolist(), 11)
    table = spelled_out.bigram_log_probs(counts, smoothing=0).requires_grad_()
    loss = F.cross_entropy(table[ids[:-1]], ids[1:])  # convex in the table, lowest where it is flat
    assert torch.autograd.grad(loss, table)[0].abs().max() < 1e-7
    assert loss.item() == pytest.approx(spelled_out.bigram_loss(counts, table), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=9).filter(lambda ts: max(ts) >= 0),
    st.sampled_from([1.0, 1000.0]),
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_by_hand(reduction, targets, scale):
    targets = torch.tensor(targets)
    logits = scale * torch.randn(len(targets), 5, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
    torch.testing.assert_close(
        spelled_out.cross_entropy(logits, targets, reduction), expected, **EQUAL
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_models_loss_is_cross_entropy_by_hand(reduction):
    idx, targets = random_ids(2, 3, 8)
    targets[0, 2:5] = -1
    logits, loss = gpt()(idx, targets, reduction=reduction)
    by_hand = spelled_out.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction)
    torch.testing.assert_close(by_hand, loss, **EQUAL)


def test_adamw_by_hand_is_pytorchs_with_the_models_groups():
    model = gpt()
    twin = copy.deepcopy(model)
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.95)
    [theirs] = optim.make_optimizers(model, config, torch.float32)
    vectors = twin.parameter_groups()["vector"]
    matrices = [p for p in twin.parameters() if p.dim() == 2]
    ours = [
        spelled_out.AdamW(matrices, 1e-2, (0.8, 0.95), weight_decay=0.1),
        spelled_out.AdamW(vectors, 1e-2, (0.8, 0.95), weight_decay=0.0),
    ]
    pairs = list(zip(twin.parameters(), model.parameters(), strict=True))
    for _ in range(5):
        for of_twin, p in pairs:
            of_twin.grad = p.grad = torch.randn_like(p)
        for optimizer in (theirs, *ours):
            optimizer.step()
    for of_twin, p in pairs:
        torch.testing.assert_close(of_twin, p, **EQUAL)


def test_the_loop_by_hand_is_pytorchs(tiny, monkeypatch):
    monkeypatch.setattr(spelled_out, "N_STEPS", 5)
    split, _, vocab_size = spelled_out.open_splits(Path("data/tiny"))
    blocks = spelled_out.ladder()["layer norm"]
    model = spelled_out.LanguageModel(vocab_size, 8, spelled_out.N_EMBD, blocks).double()
    twin = copy.deepcopy(model)
    spelled_out.train(model, split, seed=3)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for step in range(5):
        idx, targets = split.windows(split.train_offsets(32, 3, step))
        optimizer.zero_grad()
        F.cross_entropy(twin(idx).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    for p, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(of_twin, p, **EQUAL)


def test_evaluation_covers_every_token_but_the_first(tiny):
    _, split, vocab_size = spelled_out.open_splits(Path("data/tiny"))
    counts = spelled_out.count_bigrams(split.ids.tolist(), vocab_size)
    bigram = spelled_out.bigram_log_probs(counts, smoothing=1)
    expected = spelled_out.bigram_loss(counts, bigram)
    assert spelled_out.evaluate(bigram.__getitem__, split) == pytest.approx(expected, abs=1e-5)


# ---- averages, attention -------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))
def test_the_three_averages_of_the_past_are_one(B, T, C):
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))
    with_loops = spelled_out.average_with_loops(x)
    torch.testing.assert_close(spelled_out.average_with_matrix(x), with_loops, **EQUAL)
    torch.testing.assert_close(spelled_out.average_with_softmax(x), with_loops, **EQUAL)


def test_a_head_sees_a_set_and_its_own_row_alone():
    head, x = spelled_out.Head(16, 8), torch.randn(3, 6, 16)
    shuffled = x[:, [3, 0, 4, 2, 1, 5]]
    torch.testing.assert_close(head(shuffled)[:, -1], head(x)[:, -1], **EQUAL)
    torch.testing.assert_close(head(x[1:2]), head(x)[1:2], **EQUAL)


@BIAS
@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([4, 12]), st.integers(1, 3), st.integers(1, 9))
def test_a_list_of_heads_is_all_heads_as_one_batch_dimension(bias, n_head, n_embd, B, T):
    attention = CausalSelfAttention(GPTConfig(n_head=n_head, n_embd=n_embd, bias=bias), layer=0)
    spelled = spelled_out.MultiHeadAttention(n_embd, n_head, bias)
    carry_heads(spelled.heads, attention)
    x = torch.randn(B, T, n_embd)
    expected = attention(x, rotary=None, cache=None)
    torch.testing.assert_close(attention.c_proj(spelled(x)), expected, **EQUAL)
    if n_head == 1:
        torch.testing.assert_close(attention.c_proj(spelled.heads[0](x)), expected, **EQUAL)


# ---- norms, dropout, the whole -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "spelled_kind"), [("layernorm", "LayerNorm"), ("rmsnorm", "RMSNorm")]
)
@BIAS
def test_norms_by_hand(kind, spelled_kind, bias):
    norm = Norm(GPTConfig(n_head=1, n_embd=16, norm=kind, bias=bias))
    for p in norm.parameters():
        nn.init.normal_(p)
    spelled = getattr(spelled_out, spelled_kind)(16)
    carry_norm(spelled, norm)
    for scale in (1e-2, 1.0, 100.0):  # at the first, epsilon matters
        x = scale * (torch.randn(3, 5, 16) + 1)
        torch.testing.assert_close(spelled(x), norm(x), **EQUAL)


def test_dropout_is_pytorchs_given_the_same_mask():
    x = torch.randn(50, 40)
    theirs = F.dropout(x, 0.2)
    torch.testing.assert_close(spelled_out.drop(x, theirs != 0, 0.2), theirs, **EQUAL)


def test_dropout_silences_a_share_and_keeps_the_expectation():
    dropout, x = spelled_out.Dropout(0.2), torch.ones(200, 500)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert y[y != 0].unique().tolist() == pytest.approx([1.25])
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(spelled_out.Dropout(0.0)(x), x)


@BIAS
@pytest.mark.parametrize("tied_head", [True, False])
def test_the_whole_model_spelled_out(bias, tied_head):
    model = gpt(bias=bias, tied_head=tied_head)
    spelled = carry_all(model)
    for T in (1, 5, 8):
        idx = random_ids(3, T)
        torch.testing.assert_close(spelled(idx), model(idx)[0], **EQUAL)


# ---- the ladder ----------------------------------------------------------------------------------


def test_the_ladder_prints_every_rung(tiny, call, monkeypatch):
    monkeypatch.setattr(spelled_out, "N_STEPS", 4)
    monkeypatch.setattr(spelled_out, "SEEDS", (1, 2))
    code, out, _ = call("spelled_out", "data/tiny")
    rows = out.splitlines()[1:]
    assert code == 0 and [row[:16].strip() for row in rows[1:]] == list(spelled_out.ladder())
    for row in rows[1:]:
        mean, low, _, high = row.split()[-5:-1]
        assert float(low) <= float(mean) <= float(high) < 5, row


def test_the_ladder_is_for_small_vocabularies(tiny, call):
    edit_meta("data/tiny", vocab_size=50257)
    code, _, err = call("spelled_out", "data/tiny")
    assert code == 2 and is_one_error_line(err) and "50,257" in err
