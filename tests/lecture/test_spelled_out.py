from __future__ import annotations

import ast
import copy
import io
import sys
from pathlib import Path

import pytest
import torch
from helpers import is_one_error_line
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lecture import gpt, spelled_out
from model import GPT, CausalSelfAttention, GPTConfig, Norm
from quill.training.optimizers import make_optimizers
from train import TrainConfig

EQUAL = {"rtol": 1e-5, "atol": 1e-5}
BIAS = pytest.mark.parametrize("bias", [True, False])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def text_file(folder, text) -> Path:
    Path("text.txt").write_text(text, encoding="utf-8")
    return Path("text.txt")


def run(main, *argv) -> int:
    """The exit code of a lecture file's main."""
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as stop:
        return stop.code


def quill_gpt(**switches) -> GPT:
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
        carry(block.proj_1, other.attn.c_proj.weight, other.attn.c_proj.bias)
        carry(block.feed_forward.linear, other.mlp.c_fc.weight, other.mlp.c_fc.bias)
        carry(block.proj_2, other.mlp.c_proj.weight, other.mlp.c_proj.bias)
    carry_norm(middle[-1], model.transformer.ln_f)
    spelled.token.weight.data.copy_(model.transformer.wte.weight)
    spelled.position.weight.data.copy_(model.transformer.wpe.weight)
    carry(spelled.score, model.lm_head.weight, None)
    return spelled


@pytest.mark.parametrize("module", [spelled_out, gpt])
def test_the_lecture_needs_torch_alone(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}


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


@settings(max_examples=30)
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
    logits, loss = quill_gpt()(idx, targets, reduction=reduction)
    by_hand = spelled_out.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction)
    torch.testing.assert_close(by_hand, loss, **EQUAL)


def test_adamw_by_hand_is_pytorchs_with_the_models_groups():
    model = quill_gpt()
    twin = copy.deepcopy(model)
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.95)
    [theirs] = make_optimizers(model, config, torch.float32)
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


def test_the_loop_by_hand_is_pytorchs(text_file, monkeypatch):
    monkeypatch.setattr(spelled_out, "N_STEPS", 5)
    ids, _, tokenizer = spelled_out.open_splits(text_file)
    vocab_size = len(tokenizer.chars)
    blocks = spelled_out.ladder()["layer norm"]
    model = spelled_out.LanguageModel(vocab_size, 8, spelled_out.N_EMBD, blocks).double()
    twin = copy.deepcopy(model)
    spelled_out.train(model, ids, seed=3)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    torch.manual_seed(3)
    for _ in range(5):
        idx, targets = spelled_out.get_batch(ids)
        optimizer.zero_grad()
        F.cross_entropy(twin(idx).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    for p, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(of_twin, p, **EQUAL)


@pytest.mark.parametrize("n_tokens", [9, 16, 17, 18, 2000])  # the last window full, or short
def test_evaluation_covers_every_token_but_the_first(text_file, n_tokens):
    _, ids, tokenizer = spelled_out.open_splits(text_file)
    ids = ids[:n_tokens]
    counts = spelled_out.count_bigrams(ids.tolist(), len(tokenizer.chars))
    bigram = spelled_out.bigram_log_probs(counts, smoothing=1)
    expected = spelled_out.bigram_loss(counts, bigram)
    assert spelled_out.evaluate(bigram.__getitem__, ids) == pytest.approx(expected, abs=1e-5)


# ---- text, batches, generation -------------------------------------------------------------------


def test_a_text_is_its_tokens_decoded_and_val_is_its_last_tenth(text_file, text):
    train_ids, val_ids, tokenizer = spelled_out.open_splits(text_file)
    assert len(train_ids) == int(len(text) * 0.9)
    assert tokenizer.decode([*train_ids.tolist(), *val_ids.tolist()]) == text


@pytest.mark.parametrize("module", [spelled_out, gpt])
@pytest.mark.parametrize("n_spare", [1, 50])
def test_the_targets_of_a_batch_are_its_inputs_one_token_on(module, n_spare):
    ids = torch.arange(module.BLOCK_SIZE + n_spare)  # so that each id is its own position
    idx, targets = module.get_batch(ids)
    assert idx.shape == targets.shape == (module.BATCH_SIZE, module.BLOCK_SIZE)
    assert torch.equal(idx[:, 1:], targets[:, :-1]) and torch.equal(idx + 1, targets)
    offsets = set(idx[:, 0].tolist())
    assert offsets == {0} if n_spare == 1 else len(offsets) > 1


def test_generate_appends_what_the_model_predicts():
    follower = torch.full((11, 11), -1e9)
    follower[torch.arange(11), (torch.arange(11) + 1) % 11] = 0.0  # id i is followed by i + 1
    idx = spelled_out.generate(follower.__getitem__, torch.tensor([[3], [9]]), 12)
    assert torch.equal(idx, (torch.tensor([[3], [9]]) + torch.arange(13)) % 11)


def test_generate_appends_valid_ids_past_the_block_size():
    model = spelled_out.LanguageModel(11, 8, 32, spelled_out.ladder()["layer norm"])
    start = random_ids(2, 5)
    idx = spelled_out.generate(model, start, 20)
    assert idx.shape == (2, 25) and torch.equal(idx[:, :5], start)
    assert idx.min() >= 0 and idx.max() < 11


# ---- averages, attention -------------------------------------------------------------------------


@settings(max_examples=20)
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
@settings(max_examples=10)
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
    model = quill_gpt(bias=bias, tied_head=tied_head)
    spelled = carry_all(model)
    for T in (1, 5, 8):
        idx = random_ids(3, T)
        torch.testing.assert_close(spelled(idx), model(idx)[0], **EQUAL)


# ---- the ladder ----------------------------------------------------------------------------------


@pytest.fixture
def short_ladder(monkeypatch):
    monkeypatch.setattr(spelled_out, "N_STEPS", 4)
    monkeypatch.setattr(spelled_out, "SEEDS", (1, 2))


def test_the_ladder_prints_every_rung(text_file, short_ladder, capsys):
    code = run(spelled_out.main, text_file)
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    rows = table.splitlines()[1:]
    assert code == 0 and [row[:16].strip() for row in rows[1:]] == list(spelled_out.ladder())
    for row in rows[1:]:
        mean, low, _, high = row.split()[-5:-1]
        assert float(low) <= float(mean) <= float(high) < 5, row
    assert rest.splitlines()[-1].endswith("python lecture/gpt.py")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_shows_its_progress(text_file, short_ladder, monkeypatch, is_terminal):
    middle = [spelled_out.Head(32, 32)]
    monkeypatch.setattr(spelled_out, "ladder", lambda: {"one head": middle})
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run(spelled_out.main, text_file) == 0
    shown = stderr.getvalue()
    assert shown.count("step 4 of 4    loss ") == 2  # seeds
    assert shown.count("\n") == (0 if is_terminal else 2)
    assert not is_terminal or shown.endswith("\r\x1b[K")


def test_the_ladder_is_for_small_vocabularies(folder, capsys):
    Path("text.txt").write_text("".join(map(chr, range(32, 32 + 50257))), encoding="utf-8")
    code = run(spelled_out.main, "text.txt")
    err = capsys.readouterr().err
    assert code == 2 and is_one_error_line(err) and "50,257" in err


@pytest.mark.parametrize("main", [spelled_out.main, gpt.main])
@pytest.mark.parametrize("content", [None, b"", b"too short", b"\xff" * 5000])
def test_a_text_of_no_use_is_one_error_line(folder, capsys, main, content):
    if content is not None:
        Path("text.txt").write_bytes(content)
    assert run(main, "text.txt") == 2
    err = capsys.readouterr().err
    assert is_one_error_line(err) and "text.txt" in err


# ---- the final model -----------------------------------------------------------------------------


@pytest.fixture
def small_gpt(monkeypatch):
    sizes = {"BATCH_SIZE": 8, "BLOCK_SIZE": 8, "N_EMBD": 16, "N_HEAD": 2, "N_LAYER": 2}
    run = {"LEARNING_RATE": 1e-2, "N_STEPS": 60, "EVAL_INTERVAL": 20, "EVAL_ITERS": 5}
    for name, value in (sizes | run | {"DEVICE": "cpu"}).items():
        monkeypatch.setattr(gpt, name, value)


def test_the_final_model_trains_and_writes(text_file, text, small_gpt, capsys):
    assert run(gpt.main, text_file) == 0
    _, *lines = capsys.readouterr().out.split("\n", maxsplit=5)
    assert [int(line.split()[1][:-1]) for line in lines[:4]] == [0, 20, 40, 60]
    first, last = (float(lines[i].split()[-1]) for i in (0, 3))
    assert last < first - 1
    assert len(lines[4]) == 1 + 500 + 1 and set(lines[4]) <= set(text)


@torch.no_grad()
def test_the_final_models_head_is_pytorchs_and_the_one_spelled_out(small_gpt):
    head, spelled = gpt.Head(8), spelled_out.Head(16, 8)
    spelled.load_state_dict({k: p for k, p in head.state_dict().items() if k != "past"})
    x = torch.randn(3, 6, 16)
    q, k, v = head.query(x), head.key(x), head.value(x)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(head(x), expected, **EQUAL)
    torch.testing.assert_close(spelled(x), expected, **EQUAL)


@torch.no_grad()
def test_the_final_model_is_the_one_spelled_out(small_gpt):
    model = gpt.GPT(11)
    blocks = [spelled_out.Block(16, 2, spelled_out.LayerNorm) for _ in range(2)]
    middle = [*blocks, spelled_out.LayerNorm(16)]
    spelled = spelled_out.LanguageModel(11, 8, 16, middle)
    weights = [p for name, p in model.named_parameters()]
    assert len(weights) == len([*spelled.parameters()])
    pairs = [(spelled.token, model.token_embedding), (spelled.position, model.position_embedding)]
    for ours, theirs in zip(blocks, model.blocks, strict=True):
        for norm, other in ((ours.norm_1, theirs.ln_1), (ours.norm_2, theirs.ln_2)):
            carry_norm(norm, other)
        pairs += [(ours.proj_1, theirs.attention.proj)]
        pairs += [(ours.feed_forward.linear, theirs.feed_forward[0])]
        pairs += [(ours.proj_2, theirs.feed_forward[2])]
        for one, other in zip(ours.attention.heads, theirs.attention.heads, strict=True):
            pairs += [(getattr(one, n), getattr(other, n)) for n in ("query", "key", "value")]
    carry_norm(middle[-1], model.ln_f)
    for ours, theirs in [*pairs, (spelled.score, model.lm_head)]:
        ours.load_state_dict(theirs.state_dict())
    idx = random_ids(3, 8)
    torch.testing.assert_close(spelled(idx), model(idx)[0], **EQUAL)
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    by_hand = spelled_out.cross_entropy(spelled(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    torch.testing.assert_close(by_hand, loss, **EQUAL)
    assert model.generate(idx, 9).shape == (3, 17)
