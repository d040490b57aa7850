"""The checks of the exercises: a right answer passes, a wrong one is told what is wrong with it."""

from __future__ import annotations

import ast
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO
from torch.nn import functional as F

from lecture import exercises
from lecture import test_exercises as checks
from lecture.spelled_out import BATCH_SIZE, BLOCK_SIZE
from lecture.test_exercises import SOLUTIONS, STEPS

pytest_plugins = ["pytester"]

EACH = pytest.mark.parametrize("name", STEPS)


def outcome(name: str, function) -> str:
    """What the check says of an answer, or "right"."""
    try:
        checks.check(name, SimpleNamespace(**{name: function}))
    except (pytest.fail.Exception, pytest.skip.Exception) as stop:
        return str(stop)
    return "right"


def module(source: str) -> SimpleNamespace:
    names: dict = {}
    exec(source, names)
    return SimpleNamespace(**names)


# ---- the file with the exercises -----------------------------------------------------------------

SOURCE = (REPO / "lecture/exercises.py").read_text("utf-8")


def functions() -> list[ast.FunctionDef]:
    return [node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)]


def emptied() -> str:
    """exercises.py without what anyone has filled in."""
    tree = ast.parse(SOURCE)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse("raise NotImplementedError").body
    return ast.unparse(tree)


def test_every_exercise_has_a_step_a_check_and_answers():
    named = [node.name for node in functions() if node.name in STEPS]
    assert named == [*STEPS] == [*checks.CHECKS] == [*vars(SOLUTIONS)] == [*RIGHT] == [*WRONG]
    assert all(ast.get_docstring(node) for node in functions() if node.name in STEPS)
    assert (exercises.BATCH_SIZE, exercises.BLOCK_SIZE) == (BATCH_SIZE, BLOCK_SIZE)


def test_the_exercises_come_without_answers():
    bodies = {node.name: ast.unparse(node.body[1:]) for node in functions()}
    if {*bodies.values()} != {"raise NotImplementedError"}:
        pytest.skip("lecture/exercises.py has answers in it")
    assert all(outcome(name, vars(exercises)[name]).startswith("not begun") for name in STEPS)


@EACH
def test_an_exercise_that_is_not_begun_is_skipped(name):
    with pytest.raises(pytest.skip.Exception) as stop:
        checks.check(name, module(emptied()))
    assert str(stop.value) == f"not begun yet: {name} ({STEPS[name]})"


# ---- right answers -------------------------------------------------------------------------------


def other_batch(ids):
    offsets = [random.randrange(len(ids) - BLOCK_SIZE) for _ in range(BATCH_SIZE)]
    rows = ids.unfold(0, BLOCK_SIZE + 1, 1)[offsets]
    return rows[:, :-1], rows[:, 1:]


def other_generate(model, idx, n_tokens):
    for _ in range(n_tokens):
        logits = model(idx[:, -BLOCK_SIZE:])[:, -1]
        noise = -torch.empty_like(logits).exponential_().log()
        idx = torch.cat((idx, (logits + noise).argmax(dim=1, keepdim=True)), dim=1)
    return idx


def other_train_step(model, optimizer, idx, targets):
    optimizer.zero_grad(set_to_none=False)
    loss = F.cross_entropy(model(idx).transpose(1, 2), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def other_block(x, attention, feed_forward, norm_1, norm_2):
    x += attention(norm_1(x))  # in place
    x += feed_forward(norm_2(x))
    return x


def times(x):
    return torch.arange(1, x.size(1) + 1)[:, None]


def identity(q):
    return torch.eye(q.size(1)).expand(len(q), -1, -1)


sdpa = F.scaled_dot_product_attention
RIGHT = {
    "vocabulary": lambda text: sorted(set(text)),
    "encode": lambda text, chars: [chars.index(char) for char in text],
    "decode": lambda ids, chars: "".join(map(chars.__getitem__, ids)),
    "split": lambda ids: ids.tensor_split([len(ids) * 9 // 10]),
    "get_batch": other_batch,
    "bigram_logits": lambda idx, table: F.one_hot(idx, len(table)).float() @ table,
    "cross_entropy": F.cross_entropy,
    "generate": other_generate,
    "train_step": other_train_step,
    "average_with_loops": lambda x: x.cumsum(dim=1) / times(x),
    "average_with_matrix": lambda x: (
        (torch.ones(len(times(x)), len(times(x))) / times(x)).tril() @ x
    ),
    "average_with_softmax": lambda x: sdpa(0 * x, x, x, is_causal=True),
    "attention_weights": lambda q, k: sdpa(q, k, identity(q), is_causal=True),
    "head": lambda x, query, key, value: sdpa(query(x), key(x), value(x), is_causal=True),
    "multi_head": lambda x, heads: torch.cat([head(x) for head in heads], dim=-1),
    "feed_forward": lambda x, expand, project: project(expand(x).clamp(min=0)),
    "layer_norm": lambda x, gain, bias: F.layer_norm(x, x.shape[-1:], gain, bias),
    "block": other_block,
    "dropout": F.dropout,
}


@EACH
def test_the_solution_passes(name):
    assert outcome(name, vars(SOLUTIONS)[name]) == "right"


@EACH
@pytest.mark.parametrize("seed", range(3))
def test_another_right_answer_passes(name, seed, monkeypatch):
    """Most of them are PyTorch's own, so this also proves the solutions."""
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeded(n + seed))
    assert outcome(name, RIGHT[name]) == "right"


# ---- wrong answers -------------------------------------------------------------------------------


def batch(ids, n=BLOCK_SIZE, ahead=1, rows=BATCH_SIZE, seed=None):
    """A batch of random pieces that begin before len(ids) - n."""
    if seed is not None:
        torch.manual_seed(seed)
    offsets = torch.randint(len(ids) - n, (rows,)).expand(BATCH_SIZE).tolist()
    x, y = (torch.stack([ids[i + s : i + s + BLOCK_SIZE] for i in offsets]) for s in (0, ahead))
    return x, y


def generate(model, idx, n, window=slice(-BLOCK_SIZE, None), place=-1, draw=None):
    draw = draw or (lambda logits: torch.multinomial(logits.softmax(dim=1), 1))
    for _ in range(n):
        idx = torch.cat((idx, draw(model(idx[:, window])[:, place])), dim=1)
    return idx


def train_step(model, optimizer, idx, targets, order="clear loss backward step", sign=1):
    def loss():
        return sign * F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    first = loss()
    done = {"loss": loss, "clear": optimizer.zero_grad, "step": optimizer.step}
    for part in order.split():
        first.backward() if part == "backward" else done[part]()
    return loss() if order.endswith("loss") else first


def weights(q, k, scale=None, dim=2, diagonal=1, fill=-math.inf, T=None):
    scores = q @ k.transpose(1, 2) / (scale or math.sqrt(q.size(2)))
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(diagonal)
    return scores.masked_fill(hidden, fill).softmax(dim)


def mix(**mistake):
    return lambda x, query, key, value: weights(query(x), key(x), **mistake) @ value(x)


def average(diagonal=1, dim=1, weigh=torch.softmax):
    """With the weights of softmax, or another function of the scores."""

    def answer(x):
        hidden = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(diagonal)
        return weigh(torch.zeros(hidden.shape).masked_fill(hidden, -math.inf), dim) @ x

    return answer


AVERAGES = {
    "Row 0 looks at the future: time 0 takes something from times [1, 2, 3, 4]": (
        lambda x: x.mean(dim=1, keepdim=True).expand_as(x)
    ),
    "columns of the weights sum to 1": average(dim=0),
    "weights of row 1 sum to 2.00": lambda x: x.cumsum(dim=1),
    "Time 1 takes nothing from itself": (
        lambda x: torch.stack([x[:, : max(t, 1)].mean(dim=1) for t in range(x.size(1))], dim=1)
    ),
    "NaN in the weights": average(diagonal=0),
    "shape is (1, 5), and should be (B, T, C)": lambda x: x.mean(dim=1),
    "numbers are wrong: at [0, 1, 0] it is 0.2": average(
        weigh=lambda scores, dim: (scores + torch.arange(scores.size(1))).softmax(dim)
    ),
    "returns None": lambda x: None,
}


def norm(x, gain, bias, dim=2, correction=0, eps=1e-5, outside=0.0):
    deviation = (x.var(dim, correction=correction, keepdim=True) + eps).sqrt() + outside
    return (x - x.mean(dim, keepdim=True)) / deviation * gain + bias


def drop(x, p, training, scale=1.25, kept=None):
    kept = torch.rand_like(x) >= p if kept is None else kept
    return x * kept * scale if training else x


WRONG = {
    "vocabulary": {
        "not in sorted order": lambda text: [*dict.fromkeys(text)],
        "A set has no order": set,
        "' ' is in it 8 times": sorted,
        "'T' occurs in the text and is missing": lambda text: sorted({*text.lower()}),
        "' ' occurs in the text and is missing": lambda text: sorted({*text} - {" "}),
        "type str, and should return a list": lambda text: "".join(sorted({*text})),
    },
    "encode": {
        "its place in chars is": lambda text, chars: [ord(char) for char in text],
        "The id of 'T' is 6; its place in chars is 5": (
            lambda text, chars: [chars.index(char) + 1 for char in text]
        ),
        "each character has one": lambda text, chars: [chars.index(char) for char in {*text}],
        "type Tensor": lambda text, chars: torch.tensor([chars.index(char) for char in text]),
    },
    "decode": {
        "join the characters": lambda ids, chars: [chars[i] for i in ids],
        "nothing is between them": lambda ids, chars: " ".join(chars[i] for i in ids),
        "is decoded to": lambda ids, chars: "".join(chars[i - 1] for i in ids),
        "IndexError": lambda ids, chars: "".join(chars[i + 99] for i in ids),
    },
    "split": {
        "is val returned first": lambda ids: (ids[180:], ids[:180]),
        "1 of 200 ids are neither": lambda ids: (ids[:180], ids[181:]),
        "in train and in val": lambda ids: (ids, ids[180:]),
        "Shuffled": lambda ids: ids[torch.randperm(200)].split([180, 20]),
        "has 160 of 200 ids": lambda ids: (ids[:160], ids[160:]),
        "two things, train and val": lambda ids: ids[:180],
    },
    "get_batch": {
        "y is x": lambda ids: batch(ids, ahead=0),
        "not the token that follows": lambda ids: batch(ids, ahead=2),
        "begin at the same place": lambda ids: batch(ids, rows=1),
        "next batch is the same": lambda ids: batch(ids, seed=1),
        "too near the end": lambda ids: batch(ids, n=0),
        "last piece of ids is never drawn": lambda ids: batch(ids, n=BLOCK_SIZE + 1),
        "has places in the text": lambda ids: batch(torch.arange(len(ids))),
        "side by side": lambda ids: batch(ids[torch.randperm(len(ids))]),
        "(BATCH_SIZE, BLOCK_SIZE) = (32, 8)": lambda ids: [rows.T for rows in batch(ids)],
    },
    "bigram_logits": {
        "columns": lambda idx, table: table.T[idx],
        "probabilities": lambda idx, table: table[idx].softmax(dim=-1),
        "shape is (7, 2, 5), and should be (B, T, V)": lambda idx, table: table[:, idx],
    },
    "cross_entropy": {
        "sign": lambda logits, targets: -F.cross_entropy(logits, targets),
        "sum of the losses": lambda logits, ts: F.cross_entropy(logits, ts, reduction="sum"),
        "should be one number": lambda logits, ts: F.cross_entropy(logits, ts, reduction="none"),
        "softmax is missing": lambda logits, ts: -logits[range(len(ts)), ts].mean(),
        "logarithm is missing": lambda logits, ts: -logits.softmax(1)[range(len(ts)), ts].mean(),
        "over the rows": lambda logits, ts: F.nll_loss(logits.log_softmax(dim=0), ts),
        "all V tokens": lambda logits, ts: -logits.log_softmax(dim=1).mean(),
        "base 2": lambda logits, ts: F.cross_entropy(logits, ts) / math.log(2),
        "With large logits the loss is inf": (
            lambda logits, ts: -logits.softmax(1)[range(len(ts)), ts].log().mean()
        ),
        "With large logits the loss is nan": (
            lambda logits, ts: (
                -(logits.exp() / logits.exp().sum(1, keepdim=True))[range(len(ts)), ts].log().mean()
            )
        ),
        "The number is wrong": lambda logits, ts: F.cross_entropy(logits, ts) + 0.1,
    },
    "generate": {
        "always takes the most probable": lambda model, idx, n: generate(
            model, idx, n, draw=lambda logits: logits.argmax(dim=1, keepdim=True)
        ),
        "not the first": lambda model, idx, n: generate(model, idx, n, place=0),
        "new tokens alone": lambda model, idx, n: generate(model, idx, n)[:, -n:],
        "should see the last ones": lambda model, idx, n: generate(
            model, idx, n, window=slice(BLOCK_SIZE)
        ),
        "up to 14 tokens": lambda model, idx, n: generate(model, idx, n, window=slice(None)),
        "up to 1 tokens": lambda model, idx, n: generate(model, idx, n, window=slice(-1, None)),
        "probability 0": lambda model, idx, n: generate(
            model, idx, n, draw=lambda logits: torch.multinomial(logits.softmax(dim=0), 1)
        ),
        "All rows get the same": lambda model, idx, n: generate(
            model,
            idx,
            n,
            draw=lambda logits: (
                torch.multinomial(logits.softmax(dim=1), 1)
                if len(logits) < 9
                else torch.multinomial(logits[:1].softmax(dim=1), 1).expand(len(logits), 1)
            ),
        ),
        "A token of probability 0.7 was drawn": lambda model, idx, n: generate(
            model, idx, n, draw=lambda logits: torch.multinomial((logits > -9).float(), 1)
        ),
        "(B, T+n_tokens) = (2, 15)": lambda model, idx, n: generate(model, idx, 1),
    },
    "train_step": {
        "adds to the gradients": lambda *args: train_step(*args, order="backward step"),
        "weights are as before": lambda *args: train_step(*args, order="clear step backward"),
        "loss gets higher": lambda *args: train_step(*args, sign=-1),
        "not by one step": lambda *args: train_step(*args, order="clear backward step step"),
        "and not the mean loss before the step": (
            lambda *args: train_step(*args, order="clear backward step loss")
        ),
        "returns None": lambda *args: [train_step(*args), None][1],
    },
    "average_with_loops": AVERAGES,
    "average_with_matrix": AVERAGES,
    "average_with_softmax": AVERAGES,
    "attention_weights": {
        "not divided by the square root": lambda q, k: weights(q, k, scale=1),
        "divided by hs": lambda q, k: weights(q, k, scale=16),
        "multiplied": lambda q, k: weights(q, k, scale=1 / 4),
        "root of T": lambda q, k: weights(q, k, scale=math.sqrt(5)),
        "wrong dimension": lambda q, k: weights(q, k, dim=1),
        "Row 0 looks at the future": lambda q, k: weights(q, k, diagonal=9),
        "swapped": lambda q, k: weights(k, q),
        "mask the scores": lambda q, k: weights(q, k, diagonal=9).tril(),
        "A score of 0 is no mask": lambda q, k: weights(q, k, fill=0),
        "NaN": lambda q, k: weights(q, k, diagonal=0),
        "takes nothing from itself": (
            lambda q, k: weights(q, k, diagonal=0).nan_to_num() + torch.eye(5)[0] * torch.eye(5)[0]
        ),
        "weights of row 0 sum to 0.50": lambda q, k: weights(q, k) / 2,
        "numbers are wrong": lambda q, k: weights(q, k, scale=3),
        "lambda q, k: q @ k,\nRuntimeError: Expected size": lambda q, k: q @ k,
    },
    "head": {
        "not divided by the square root": mix(scale=1),
        "wrong dimension": mix(dim=1),
        "Row 0 looks at the future: changing token 3": mix(diagonal=9),
        "swapped": lambda x, query, key, value: mix()(x, key, query, value),
        "mix the keys": lambda x, query, key, value: mix()(x, query, key, key),
        "mix the queries": lambda x, query, key, value: mix()(x, query, key, query),
        "values alone": lambda x, query, key, value: value(x),
        "NaN": mix(diagonal=0),
        "(B, T, hs) = (2, 5, 16)": lambda x, query, key, value: weights(query(x), key(x)),
        "numbers are wrong": mix(scale=3),
    },
    "multi_head": {
        "added up": lambda x, heads: sum(head(x) for head in heads),
        "along time (dim=1)": lambda x, heads: torch.cat([head(x) for head in heads], dim=1),
        "along the batch (dim=0)": lambda x, heads: torch.cat([head(x) for head in heads]),
        "not torch.stack": lambda x, heads: torch.stack([head(x) for head in heads], dim=2),
        "wrong order": lambda x, heads: torch.cat([head(x) for head in heads[::-1]], dim=2),
        "interleaved": (
            lambda x, heads: torch.stack([head(x) for head in heads], dim=3).flatten(2)
        ),
        "first head three times": lambda x, heads: heads[0](x).repeat(1, 1, 3),
        "should be (B, T, nh*hs)": lambda x, heads: heads[0](x),
    },
    "feed_forward": {
        "ReLU is missing": lambda x, expand, project: project(expand(x)),
        "ReLU is after the second layer": lambda x, expand, project: project(expand(x)).relu(),
        "also after the second": lambda x, expand, project: project(expand(x).relu()).relu(),
        "before the first layer": lambda x, expand, project: project(expand(x.relu())),
        "x is added": lambda x, expand, project: x + project(expand(x).relu()),
        "numbers are wrong": lambda x, expand, project: project(F.gelu(expand(x))),
        "project them back": lambda x, expand, project: expand(x).relu(),
        "returns None": lambda x, expand, project: None,
    },
    "layer_norm": {
        "over the batch:": lambda *args: norm(*args, dim=0),
        "over the time:": lambda *args: norm(*args, dim=1),
        "over batch and time:": lambda *args: norm(*args, dim=(0, 1)),
        "over all tokens:": lambda *args: norm(*args, dim=(0, 1, 2)),
        "divided by C - 1": lambda *args: norm(*args, correction=1),
        "by its square root": lambda x, gain, bias: (
            (x - x.mean(2, keepdim=True)) / x.var(2, correction=0, keepdim=True) * gain + bias
        ),
        "mean is not subtracted": lambda x, gain, bias: (
            x / x.var(2, correction=0, keepdim=True).sqrt() * gain + bias
        ),
        "gain and the bias are missing": lambda x, gain, bias: norm(x, 1, 0),
        "The gain is missing": lambda x, gain, bias: norm(x, 1, bias),
        "The bias is missing": lambda x, gain, bias: norm(x, gain, 0),
        "before the gain multiplies": lambda x, gain, bias: (norm(x, 1, 0) + bias) * gain,
        "equal numbers leads to NaN": lambda *args: norm(*args, eps=0),
        "variance is small": lambda *args: norm(*args, eps=0, outside=1e-5),
    },
    "block": {
        "is 0: add what": lambda x, a, f, norm_1, norm_2: f(norm_2(a(norm_1(x)))),
        "not the sum": lambda x, a, f, norm_1, norm_2: norm_2(
            norm_1(x + a(x)) + f(norm_1(x + a(x)))
        ),
        "attention reads x itself": (
            lambda x, a, f, norm_1, norm_2: other_block(x, a, f, lambda x: x, norm_2)
        ),
        "attention reads norm_2": (
            lambda x, a, f, norm_1, norm_2: other_block(x, a, f, norm_2, norm_1)
        ),
        "feed_forward reads x itself": (
            lambda x, a, f, norm_1, norm_2: other_block(x, a, f, norm_1, lambda x: x)
        ),
        "feed_forward reads norm_1": (
            lambda x, a, f, norm_1, norm_2: other_block(x, a, f, norm_1, norm_1)
        ),
        "from before attention": (lambda x, a, f, norm_1, norm_2: x + a(norm_1(x)) + f(norm_2(x))),
        "comes first": lambda x, a, f, norm_1, norm_2: other_block(x, f, a, norm_2, norm_1),
        "numbers are wrong": lambda x, a, f, norm_1, norm_2: x + 2 * a(norm_1(x)) + f(norm_2(x)),
    },
    "dropout": {
        "Out of training": lambda x, p, training: drop(x, p, True),
        "nothing is set to 0": lambda x, p, training: x,
        "the mean was 3 and is 2.4": lambda x, p, training: drop(x, p, training, scale=1),
        "that of being kept": lambda x, p, training: drop(x, 1 - p, training),
        "lose the same numbers": (
            lambda x, p, training: drop(x, p, training, kept=torch.rand_like(x[0]) >= p)
        ),
        "With p = 0.2, 50% of": lambda x, p, training: drop(x, 0.5, training, scale=2),
        "the same numbers to 0: draw anew": lambda x, p, training: drop(
            x,
            p,
            training,
            kept=torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= p,
        ),
    },
}


@pytest.mark.parametrize(
    "name, phrase", [(name, phrase) for name in WRONG for phrase in WRONG[name]]
)
def test_a_wrong_answer_is_told_what_is_wrong(name, phrase):
    said = outcome(name, WRONG[name][phrase])
    assert phrase in said
    assert len(said.split()) <= 40


@EACH
def test_an_answer_that_returns_nothing_is_told_so(name):
    said = "weights are as before" if name == "train_step" else "returns None"
    assert said in outcome(name, lambda *args: None)


def test_an_answer_that_calls_one_that_is_not_begun_is_not_begun():
    source = f"{emptied()}\ndef head(x, query, key, value):\n    return attention_weights(x, x)"
    with pytest.raises(pytest.skip.Exception, match="calls attention_weights"):
        checks.check("head", module(source))


def test_what_pytorch_has_not_implemented_is_an_error():
    said = outcome("bigram_logits", lambda idx, table: idx.softmax(dim=1))
    assert "idx.softmax(dim=1)" in said and "NotImplementedError: " in said


def test_an_exercise_that_was_renamed_is_missed():
    with pytest.raises(pytest.fail.Exception, match="no function head any more"):
        checks.check("head", SimpleNamespace())


# ---- python -m pytest lecture --------------------------------------------------------------------


@pytest.fixture
def learner(pytester, monkeypatch):
    """Of a folder with these answers in lecture/exercises.py, what pytest says."""

    def run(answers: str) -> pytest.RunResult:
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("lecture", "test_exercises"):
                monkeypatch.delitem(sys.modules, name)  # or pytest would take those
        shutil.copytree(REPO / "lecture", "lecture")
        shutil.copy(REPO / "pyproject.toml", "pyproject.toml")
        Path("lecture/exercises.py").write_text(f"{emptied()}\n{answers}", encoding="utf-8")
        return pytester.runpytest_inprocess("lecture")

    return run


def test_pytest_lists_the_exercises_in_their_order(learner):
    decode = "def decode(ids, chars):\n    return [chars[i] for i in ids]"
    result = learner(f"{decode}\n\ndef vocabulary(text):\n    return sorted(set(text))")
    result.assert_outcomes(passed=1, failed=1, skipped=17)
    *_, rows = result.stdout.str().partition("= exercises =")
    rows = [line.split(maxsplit=2) for line in rows.splitlines()[1:-1]]
    outcomes = {"vocabulary": "right", "decode": "wrong"}
    assert rows == [[STEPS[n][:7], n, outcomes.get(n, "not begun")] for n in STEPS]
    shown = [
        "*test_exercise?decode?*",
        "It returns a list: join the characters to one string.",
        "=*",
    ]
    result.stdout.fnmatch_lines(shown, consecutive=True)  # and no traceback


def test_pytest_says_where_the_syntax_is_wrong(learner):
    result = learner("def head(x, query, key, value):\n    return (x")
    result.assert_outcomes(errors=1)
    shown = ["exercises.py, line *: return (x", "SyntaxError: '(' was never closed", "=*"]
    result.stdout.fnmatch_lines(shown, consecutive=True)
