"""Which answers in exercises.py are right, and what is wrong with the others.

    python -m pytest lecture

A check calls an answer and compares what it returns with what spelled_out.py returns, which
tests/lecture proves equal to model.py and PyTorch. It looks for the likely mistakes first, so that
it can say what is wrong.
"""

import inspect
import math
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lecture import gpt, spelled_out
from lecture.spelled_out import BATCH_SIZE, BLOCK_SIZE, CharTokenizer, future

try:
    from lecture import exercises
except SyntaxError as error:  # pytest would show it below a page of its own code
    place = f"exercises.py, line {error.lineno}: {(error.text or '').strip()}"
    raise pytest.Collector.CollectError(f"{place}\n{type(error).__name__}: {error.msg}") from None

STEPS = {
    "vocabulary": "0:09:28 tokenization",
    "encode": "0:09:28 tokenization",
    "decode": "0:09:28 tokenization",
    "split": "0:09:28 train/val split",
    "get_batch": "0:14:27 batches of chunks",
    "bigram_logits": "0:22:11 bigram",
    "cross_entropy": "0:22:11 loss",
    "generate": "0:22:11 generation",
    "train_step": "0:34:53 training",
    "average_with_loops": "0:42:13 version 1",
    "average_with_matrix": "0:51:54 version 2",
    "average_with_softmax": "0:54:42 version 3",
    "attention_weights": "1:02:00 self-attention",
    "head": "1:02:00 self-attention",
    "multi_head": "1:21:59 several heads",
    "feed_forward": "1:24:25 feed-forward",
    "layer_norm": "1:32:51 layer norm",
    "block": "1:32:51 residual block",
    "dropout": "1:37:49 dropout",
}


def run(cls, x, **layers):
    """What a module of the lecture makes of x with these layers in place of its own."""
    return cls.forward(SimpleNamespace(**layers), x)


def weights_of_head(q, k):
    """Where the value of time t is row t of the identity, a head returns its weights."""
    T = q.size(1)
    parts = {"query": lambda x: q, "key": lambda x: k, "value": lambda x: torch.eye(T)}
    return run(spelled_out.Head, q, **parts)


SOLUTIONS = SimpleNamespace(
    vocabulary=lambda text: CharTokenizer(text).chars,
    encode=lambda text, chars: CharTokenizer("".join(chars)).encode(text),
    decode=lambda ids, chars: CharTokenizer("".join(chars)).decode(ids),
    split=spelled_out.split,
    get_batch=spelled_out.get_batch,
    bigram_logits=lambda idx, table: F.embedding(idx, table),
    cross_entropy=spelled_out.cross_entropy,
    generate=spelled_out.generate,
    train_step=spelled_out.train_step,
    average_with_loops=spelled_out.average_with_loops,
    average_with_matrix=spelled_out.average_with_matrix,
    average_with_softmax=spelled_out.average_with_softmax,
    attention_weights=weights_of_head,
    head=lambda x, query, key, value: run(spelled_out.Head, x, query=query, key=key, value=value),
    multi_head=lambda x, heads: run(spelled_out.MultiHeadAttention, x, heads=heads),
    feed_forward=lambda x, expand, project: project(run(spelled_out.FeedForward, x, linear=expand)),
    layer_norm=lambda x, gain, bias: run(spelled_out.LayerNorm, x, gain=gain, bias=bias),
    block=lambda x, attention, feed_forward, norm_1, norm_2: run(
        gpt.Block, x, attention=attention, feed_forward=feed_forward, ln_1=norm_1, ln_2=norm_2
    ),
    dropout=lambda x, p, training: run(spelled_out.Dropout, x, p=p, training=training),
)


# ---- running an answer ---------------------------------------------------------------------------


class AnswerError(Exception):
    """What is wrong with an answer, in a sentence or two."""


@pytest.mark.filterwarnings("default")  # an answer with a warning may be right
@pytest.mark.parametrize("name", STEPS)
def test_exercise(name, record_property):
    record_property("exercise", [[*STEPS].index(name), name, STEPS[name]])  # for conftest.py
    check(name, exercises)


def check(name: str, module) -> None:
    """Pass a right answer of the module, fail a wrong one with a reason, skip one not begun."""
    torch.manual_seed(0)
    function = getattr(module, name, None)
    if function is None:
        pytest.fail(f"exercises.py has no function {name} any more.", pytrace=False)
    try:
        CHECKS[name](with_copies(function))
        return
    except Exception as raised:
        error = raised  # reported below, where pytest does not show what led to what
    if isinstance(error, AnswerError):
        pytest.fail(str(error), pytrace=False)
    if isinstance(error, NotImplementedError) and not str(error):  # PyTorch's have a message
        unfinished = traceback.extract_tb(error.__traceback__)[-1].name
        needs = "" if unfinished == name else f", it calls {unfinished}"
        pytest.skip(f"not begun yet: {name} ({STEPS[name]}){needs}")
    pytest.fail(where_it_stopped(function, error), pytrace=False)


def with_copies(function):
    """The function on copies of its tensors, so that what it does in place harms no comparison."""

    def call(*args):
        return function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))

    return call


def where_it_stopped(function, error: Exception) -> str:
    """The error, and the line of the answer that led to it, if one did."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f for f in frames if code and f.filename == code.co_filename]
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    place = [f"{Path(f.filename).name}, line {f.lineno}: {f.line}" for f in lines[-1:]]
    return "\n".join([*place, reason])


def require(condition, message: str) -> None:
    if not condition:
        raise AnswerError(message)


def require_type(got, cls, what: str) -> None:
    require(got is not None, "It returns None: is there a `return`?")
    type_ = type(got).__name__
    require(
        isinstance(got, cls), f"It returns something of type {type_}, and should return {what}."
    )


def require_shape(got, names: str, *sizes: int) -> None:
    """`require_shape(got, "B T", 2, 5)`"""
    require_type(got, torch.Tensor, "a tensor")
    wanted = f"({', '.join(names.split())}) = {sizes}"
    require(got.shape == sizes, f"The shape is {tuple(got.shape)}, and should be {wanted}.")


def require_number(got) -> torch.Tensor:
    require(got is not None, "It returns None: is there a `return`?")
    got = torch.as_tensor(got)
    require(got.dim() == 0, f"It should be one number, and has the shape {tuple(got.shape)}.")
    return got


def require_pair(got, what: str):
    require_type(got, (tuple, list), f"two things, {what}")
    require(len(got) == 2, f"It returns {len(got)} things, and should return two, {what}.")
    return got


def is_close(a, b) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


def refuse(got, mistakes: dict) -> None:
    """Name the mistake if these are the numbers that it leads to."""
    for message, numbers in mistakes.items():
        require(not is_close(got, numbers), message)


def require_numbers(got, wanted) -> None:
    if is_close(got, wanted):
        return
    wrong = ~torch.isclose(got.float(), wanted.float(), rtol=1e-4, atol=1e-5)
    place = tuple(wrong.nonzero()[0].tolist())
    start = "The number is wrong: "
    if place:
        start = f"{wrong.sum()} of {wrong.numel()} numbers are wrong: at {list(place)} "
    raise AnswerError(f"{start}it is {got[place]:.4f}, and should be {wanted[place]:.4f}.")


# ---- tokens and batches --------------------------------------------------------------------------

TEXT = "To be, or not to be:\nthat is the question."


def check_vocabulary(vocabulary):
    got = vocabulary(TEXT)
    require(not isinstance(got, set), "A set has no order: sort it, which makes a list of it.")
    require_type(got, list, "a list of characters")
    for char, n in Counter(got).items():
        require(n == 1, f"{char!r} is in it {n} times: each character should be in it once.")
        require(char in TEXT, f"{char!r} is in it, but it does not occur in the text.")
    for char in sorted({*TEXT}):
        require(char in got, f"{char!r} occurs in the text and is missing.")
    require(got == SOLUTIONS.vocabulary(TEXT), "The characters are not in sorted order.")


def check_encode(encode):
    chars = SOLUTIONS.vocabulary(TEXT)
    got = encode(TEXT, chars)
    require_type(got, list, "a list of ids")
    n = f"The text has {len(TEXT)} characters, and there are {len(got)} ids"
    require(len(got) == len(TEXT), f"{n}: each character has one, even if it has occurred before.")
    for char, id_, wanted in zip(TEXT, got, SOLUTIONS.encode(TEXT, chars), strict=True):
        require(id_ == wanted, f"The id of {char!r} is {id_}; its place in chars is {wanted}.")


def check_decode(decode):
    chars = SOLUTIONS.vocabulary(TEXT)
    got = decode(SOLUTIONS.encode(TEXT, chars), chars)
    require(not isinstance(got, list), "It returns a list: join the characters to one string.")
    require_type(got, str, "a string")
    n = f"There are {len(TEXT)} ids, and the text has {len(got)} characters"
    require(len(got) == len(TEXT), f"{n}: each id is one character, and nothing is between them.")
    require(got == TEXT, f"What was encoded from {TEXT!r} is decoded to {got!r}.")


def check_split(split):
    n = 200
    train, val = require_pair(split(torch.arange(n)), "train and val")
    require(len(train) >= len(val), "Train is the shorter one: is val returned first?")
    everything = torch.cat([torch.as_tensor(train), torch.as_tensor(val)])
    missing = sorted({*range(n)} - {*everything.tolist()})
    require(not missing, f"{len(missing)} of {n} ids are neither in train nor in val.")
    require(len(everything) == n, "Some ids are in train and in val: val must be new to the model.")
    require(
        torch.equal(everything, torch.arange(n)),
        "Train is not the beginning of the ids and val the end. Shuffled, val would be made of "
        "tokens whose neighbours are in train.",
    )
    require(len(train) == 180, f"Train has {len(train)} of {n} ids, and should have 90 %, 180.")


def check_get_batch(get_batch):
    ids = torch.arange(5000, 15000)  # so that an id says where it stands
    x, y = require_pair(get_batch(ids), "x and y")
    for rows in (x, y):
        require_shape(rows, "BATCH_SIZE BLOCK_SIZE", BATCH_SIZE, BLOCK_SIZE)
    require(x.min() >= 5000, "x has places in the text, and should have the ids that stand there.")
    pieces = x[:, :1] + torch.arange(BLOCK_SIZE)
    require(torch.equal(x, pieces), "The tokens of a row of x do not stand side by side in ids.")
    require(not torch.equal(y, x), "y is x: it should be one token further on.")
    require(torch.equal(y, x + 1), "y[b, t] is not the token that follows x[b, t] in ids.")
    starts = {*x[:, 0].tolist()}
    require(len(starts) > 1, f"All {BATCH_SIZE} rows begin at the same place: draw one for each.")
    again = {*get_batch(ids)[0][:, 0].tolist()}
    require(again != starts, "The next batch is the same one: draw new places in each call.")
    check_range_of_batches(get_batch)


def check_range_of_batches(get_batch):
    """Two places are possible; a place too many or too few would rarely show in a long text."""
    ids = torch.arange(BLOCK_SIZE + 2)
    last = "the last place to begin is len(ids) - BLOCK_SIZE - 1, since y ends one token after x"
    try:
        starts = {start for _ in range(3) for start in get_batch(ids)[0][:, 0].tolist()}
    except (RuntimeError, ValueError, IndexError) as error:
        raise AnswerError(f"A row begins too near the end of ids: {last}.") from error
    require(1 in starts, f"The last piece of ids is never drawn: {last}.")
    require(0 in starts, "The first piece of ids is never drawn: it begins at 0.")


# ---- the bigram, its loss, generation, training --------------------------------------------------


def check_bigram_logits(bigram_logits):
    idx, table = torch.randint(7, (2, 5)), torch.randn(7, 7)
    got = bigram_logits(idx, table)
    require_shape(got, "B T V", 2, 5, 7)
    mistakes = {
        "It takes the columns of the table: what follows token i is in row i.": table.T[idx],
        "These are probabilities: leave the softmax to the loss.": table[idx].softmax(dim=2),
    }
    refuse(got, mistakes)
    require_numbers(got, SOLUTIONS.bigram_logits(idx, table))


def check_cross_entropy(cross_entropy):
    logits, targets = torch.randn(6, 5), torch.tensor([0, 3, 4, 1, 1, 2])
    got = require_number(cross_entropy(logits, targets))
    wanted = SOLUTIONS.cross_entropy(logits, targets)
    log_probs = logits.log_softmax(dim=1)
    of_targets = F.one_hot(targets, 5).bool()
    mistakes = {
        "The sign is wrong: log p is negative, and the loss is -log p.": -wanted,
        "This is the sum of the losses, not their mean.": 6 * wanted,
        "Only the log p of the targets counts, not that of all V tokens.": -log_probs.mean(),
        "Logits are not yet log p: the softmax is missing.": -logits[of_targets].mean(),
        "p is there, its logarithm is missing.": -log_probs.exp()[of_targets].mean(),
        "Softmax goes over the V logits of a row (dim=1), and here it goes over the rows.": (
            -logits.log_softmax(dim=0)[of_targets].mean()
        ),
        "The logarithm is to base 2; it should be the natural one.": wanted / math.log(2),
    }
    refuse(got, mistakes)
    require_numbers(got, wanted)
    got = require_number(cross_entropy(1000 * logits, targets))
    advice = "subtract the largest logit of each row first, which leaves p as it is"
    require(got.isfinite(), f"With large logits the loss is {got.item()}: {advice}.")
    require_numbers(got, SOLUTIONS.cross_entropy(1000 * logits, targets))


class Follower:
    """A model that is sure of what follows a token: the next one, and after the last the first."""

    def __init__(self, vocab_size: int):
        self.table = torch.full((vocab_size, vocab_size), -1e9).fill_diagonal_(0).roll(1, dims=1)
        self.longest = 0

    def __call__(self, idx):
        self.longest = max(self.longest, idx.size(1))
        return self.table[idx]


def check_generate(generate):
    model, idx, n = Follower(40), torch.tensor([[3, 9, 20], [8, 30, 10]]), BLOCK_SIZE + 4
    got = generate(model, idx, n)
    require_type(got, torch.Tensor, "a tensor")
    require(got.shape != (2, n), "These are the new tokens alone: the given ones come first.")
    require_shape(got, "B T+n_tokens", 2, 3 + n)
    require(torch.equal(got[:, :3], idx), "The first T tokens are not the given ones any more.")
    after_first = torch.equal(got[:, 3], idx[:, 0] + 1)
    require(not after_first, "What comes next is in the logits of the last token, not the first.")
    wanted = torch.cat((idx, idx[:, -1:] + torch.arange(1, n + 1)), dim=1)
    fits = slice(BLOCK_SIZE + 1)  # the last of these is drawn from a full window
    if torch.equal(got[:, fits], wanted[:, fits]):
        message = "Beyond BLOCK_SIZE tokens, the model should see the last ones."
        require(torch.equal(got, wanted), message)
    require(
        torch.equal(got, wanted),
        "Tokens were drawn to which the model gives probability 0: are they drawn from the "
        "softmax of the last token's logits, over V?",
    )
    seen = f"The model was given up to {model.longest} tokens"
    require(model.longest <= BLOCK_SIZE, f"{seen}: it takes at most BLOCK_SIZE, the last ones.")
    require(model.longest == BLOCK_SIZE, f"{seen}: give it all there are, up to BLOCK_SIZE.")
    check_draws(generate)


def check_draws(generate):
    logits = torch.tensor([0.7, 0.3]).log()
    got = generate(lambda idx: logits.expand(*idx.shape, 2), torch.zeros(200, 1).long(), 12)
    share = (got[:, 1:] == 0).float().mean().item()
    require(share < 1, "It always takes the most probable token: draw with torch.multinomial.")
    same = (got == got[:1]).all()
    require(not same, "All rows get the same new tokens: draw for each row.")
    found = f"A token of probability 0.7 was drawn in {share:.0%} of the cases"
    require(abs(share - 0.7) < 0.07, f"{found}: draw from the softmax of the logits.")


def check_train_step(train_step):
    model, twin = nn.Embedding(5, 5), nn.Embedding(5, 5)
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, twin)]
    idx, targets = torch.randint(5, (2, 4)), torch.randint(5, (2, 4))
    before = model.weight.detach().clone()
    got = train_step(model, optimizers[0], idx, targets)
    wanted = SOLUTIONS.train_step(twin, optimizers[1], idx, targets)
    require(
        not torch.equal(model.weight, before),
        "The weights are as before. The order is: clear the gradients, loss.backward(), "
        "optimizer.step().",
    )
    uphill = torch.equal(model.weight > before, twin.weight < before)
    require(not uphill, "The weights moved so that the loss gets higher: is its sign right?")
    require(is_close(model.weight, twin.weight), "The weights changed, but not by one step.")
    loss = require_number(got)
    wanted_loss = f"the mean loss before the step, {wanted.item():.4f}"
    require(is_close(loss, wanted), f"It returns {loss.item():.4f}, and not {wanted_loss}.")
    train_step(model, optimizers[0], idx, targets)
    SOLUTIONS.train_step(twin, optimizers[1], idx, targets)
    require(
        is_close(model.weight, twin.weight),
        "The second step goes wrong: backward() adds to the gradients of the step before, unless "
        "they are cleared.",
    )


# ---- averages, attention -------------------------------------------------------------------------


def require_causal_weights(weights) -> None:
    """weights (B, T, T): rows sum to 1, and nothing is taken from the future."""
    T = weights.size(1)
    rows, columns = (is_close(weights.sum(dim), torch.ones(len(weights), T)) for dim in (2, 1))
    require(
        rows or not columns,
        "The columns of the weights sum to 1, and the rows should: is the softmax, or the sum, "
        "over the wrong dimension?",
    )
    require(
        not weights.isnan().any(),
        "There is NaN in the weights: a softmax in which all scores are minus infinity, or 0 / 0. "
        "Each time sees at least itself.",
    )
    for t in range(T):
        seen = [s for s in range(t + 1, T) if weights[:, t, s].abs().max() > 1e-6]
        require(
            not seen, f"Row {t} looks at the future: time {t} takes something from times {seen}."
        )
    for t in range(T):
        require(weights[:, t, t].abs().min() > 1e-6, f"Time {t} takes nothing from itself.")
        total = weights[0, t].sum().item()
        require(abs(total - 1) < 1e-4, f"The weights of row {t} sum to {total:.2f}, and not to 1.")


def check_average(average):
    """Of the rows of the identity, the averages are the weights that they are made with."""
    T = 5
    got = average(torch.eye(T)[None])
    require_shape(got, "B T C", 1, T, T)
    require_causal_weights(got)
    require_numbers(got, SOLUTIONS.average_with_loops(torch.eye(T)[None]))
    x = torch.randn(2, 7, 3)
    got = average(x)
    require_shape(got, "B T C", 2, 7, 3)
    require_numbers(got, SOLUTIONS.average_with_loops(x))


def wrong_weights(q, k) -> dict:
    """What the weights of attention are with one mistake each."""
    T, hs = q.shape[1:]
    scores = q @ k.transpose(1, 2)
    scaled = scores / math.sqrt(hs)

    def weights(scores, dim=2):
        return scores.masked_fill(future(T), -math.inf).softmax(dim)

    return {
        "The scores were not divided by the square root of the head size.": weights(scores),
        "The scores were divided by hs, not by its square root.": weights(scores / hs),
        "The scores were multiplied by the root of hs: divide.": weights(scores * math.sqrt(hs)),
        "The scores were divided by the root of T, not of hs.": weights(scores / math.sqrt(T)),
        "Softmax went over the wrong dimension: each row should sum to 1.": weights(scaled, dim=1),
        "Queries and keys are swapped: row t is for the query of time t.": weights(scaled.mT),
        "Masked after the softmax, the rows do not sum to 1: mask the scores.": (
            scaled.softmax(dim=2).tril()
        ),
        "A score of 0 is no mask, because exp(0) is 1: set the future to minus infinity.": (
            scaled.tril().softmax(dim=2)
        ),
    }


def check_attention_weights(attention_weights):
    q, k = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    got = attention_weights(q, k)
    require_shape(got, "B T T", 2, 5, 5)
    refuse(got, wrong_weights(q, k))
    require_causal_weights(got)
    require_numbers(got, SOLUTIONS.attention_weights(q, k))


@torch.no_grad()
def check_head(head):
    layers = [nn.Linear(12, 16) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.4)  # so that the weights are far from equal
    x = torch.randn(2, 5, 12)
    got = head(x, *layers)
    require_shape(got, "B T hs", 2, 5, 16)
    q, k, v = (layer(x) for layer in layers)
    refuse(got, {message: wrong @ v for message, wrong in wrong_weights(q, k).items()})
    weights = SOLUTIONS.attention_weights(q, k)
    mistakes = {
        "The weights are right, but they mix the keys: mix the values.": weights @ k,
        "The weights are right, but they mix the queries: mix the values.": weights @ q,
        "These are the values alone: multiply the weights with them.": v,
    }
    refuse(got, mistakes)
    require(not got.isnan().any(), "The output has NaN: each time should see at least itself.")
    other = x.clone()
    other[:, 3] += 1
    changed = (head(other, *layers) - got).abs().amax(dim=(0, 2)) > 1e-5
    for t in range(3):
        message = f"Row {t} looks at the future: changing token 3 changed the output at {t}."
        require(not changed[t], message)
    require_numbers(got, SOLUTIONS.head(x, *layers))


@torch.no_grad()
def check_multi_head(multi_head):
    heads = [nn.Linear(6, 4) for _ in range(3)]  # anything that makes (B, T, hs) of (B, T, C)
    x = torch.randn(2, 5, 6)
    got, each = multi_head(x, heads), [one(x) for one in heads]
    require_type(got, torch.Tensor, "a tensor")
    dims = {(2, 15, 4): "time (dim=1)", (6, 5, 4): "the batch (dim=0)"}
    wrong = dims.get(tuple(got.shape))
    require(wrong is None, f"The heads are joined along {wrong}, and should be along the last.")
    is_sum = is_close(got, sum(each)) or is_close(got, sum(each) / 3)
    require(not is_sum, "The heads are added up: put them side by side, with torch.cat.")
    require(got.dim() != 4, "The heads have a dimension of their own: torch.cat, not torch.stack.")
    require_shape(got, "B T nh*hs", 2, 5, 12)
    mistakes = {
        "The heads are in the wrong order: the first one comes first.": torch.cat(each[::-1], 2),
        "The numbers of the heads are interleaved, and should be side by side.": (
            torch.stack(each, dim=3).flatten(2)
        ),
        "It is the first head three times: call each of them.": each[0].repeat(1, 1, 3),
    }
    refuse(got, mistakes)
    require_numbers(got, SOLUTIONS.multi_head(x, heads))


# ---- feed-forward, norm, block, dropout ----------------------------------------------------------


@torch.no_grad()
def check_feed_forward(feed_forward):
    expand, project = nn.Linear(6, 24), nn.Linear(24, 6)
    x = torch.randn(2, 5, 6)
    got = feed_forward(x, expand, project)
    require_type(got, torch.Tensor, "a tensor")
    require(got.shape != (2, 5, 24), "It has 4 * C numbers for each token: project them back to C.")
    require_shape(got, "B T C", 2, 5, 6)
    wanted = SOLUTIONS.feed_forward(x, expand, project)
    mistakes = {
        "ReLU is missing: without it, two linear layers are no more than one.": project(expand(x)),
        "ReLU is after the second layer, and should be between the two.": project(expand(x)).relu(),
        "ReLU is between the layers, but also after the second one.": wanted.relu(),
        "ReLU is before the first layer, and should be between the two.": (
            project(expand(x.relu()))
        ),
        "x is added: leave that to the block.": x + wanted,
    }
    refuse(got, mistakes)
    require_numbers(got, wanted)


def wrong_norms(x, gain, bias) -> dict:
    """What layer norm would be with one mistake each."""

    def norm(dims=2, correction=0, power=0.5, centre=True, gain=gain, bias=bias):
        mean = x.mean(dims, keepdim=True) if centre else 0
        variance = x.var(dims, correction=correction, keepdim=True) + 1e-5
        return (x - mean) / variance**power * gain + bias

    over = {"the batch": 0, "the time": 1, "batch and time": (0, 1), "all tokens": (0, 1, 2)}
    of_each = "each token has its own, over its C numbers"
    return {
        **{f"Mean and variance are over {what}: {of_each}.": norm(over[what]) for what in over},
        "The variance is divided by C - 1, and should be by C: correction=0.": norm(correction=1),
        "It divides by the variance, and should by its square root.": norm(power=1),
        "The mean is not subtracted.": norm(centre=False),
        "The gain and the bias are missing.": norm(gain=1, bias=0),
        "The gain is missing.": norm(gain=1),
        "The bias is missing.": norm(bias=0),
        "The bias is added before the gain multiplies, and should be after.": norm(
            bias=bias * gain
        ),
    }


def check_layer_norm(layer_norm):
    x, gain, bias = 2 * torch.randn(3, 5, 8) + 1, torch.randn(8), torch.randn(8)
    got = layer_norm(x, gain, bias)
    require_shape(got, "B T C", 3, 5, 8)
    refuse(got, wrong_norms(x, gain, bias))
    require_numbers(got, SOLUTIONS.layer_norm(x, gain, bias))
    got = layer_norm(torch.ones(1, 1, 8), gain, bias)
    message = "A token of 8 equal numbers leads to NaN: add 1e-5 to the variance."
    require(got.isfinite().all(), message)
    x = 1e-3 * x
    require(
        is_close(layer_norm(x, gain, bias), SOLUTIONS.layer_norm(x, gain, bias)),
        "It is wrong where the variance is small: add 1e-5 to it, before the root is taken.",
    )


@torch.no_grad()
def check_block(block):
    """First both branches return 0, which leaves the residual path; then one does; then none."""
    x, attention, feed_forward = torch.randn(2, 5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
    zero, norms = torch.zeros_like, (lambda x: 2 * x + 1, lambda x: 3 * x - 1)
    norm_1, norm_2 = norms
    got = block(x, zero, zero, *norms)
    require_shape(got, "B T C", 2, 5, 6)
    start = "If attention and feed_forward return 0, the output should be x, and is"
    require(got.any(), f"{start} 0: add what each returns to what it began with.")
    require(is_close(got, x), f"{start} not: normalise what a branch reads, and not the sum.")

    got = block(x, attention, zero, *norms)
    mistakes = {
        "attention reads x itself, and should read norm_1(x).": x + attention(x),
        "attention reads norm_2(x), and should read norm_1(x).": x + attention(norm_2(x)),
    }
    refuse(got, mistakes)
    require_numbers(got, x + attention(norm_1(x)))

    got = block(x, zero, feed_forward, *norms)
    mistakes = {
        "feed_forward reads x itself, and should read norm_2(x).": x + feed_forward(x),
        "feed_forward reads norm_1(x), and should read norm_2(x).": x + feed_forward(norm_1(x)),
    }
    refuse(got, mistakes)
    require_numbers(got, x + feed_forward(norm_2(x)))

    got = block(x, attention, feed_forward, *norms)
    from_x = x + attention(norm_1(x)) + feed_forward(norm_2(x))
    refuse(got, {"feed_forward reads the x from before attention, and not the sum.": from_x})
    swapped = SOLUTIONS.block(x, feed_forward, attention, norm_2, norm_1)
    refuse(got, {"feed_forward comes first, and should come after attention.": swapped})
    require_numbers(got, SOLUTIONS.block(x, attention, feed_forward, *norms))


def check_dropout(dropout):
    x, p = torch.full((200, 100), 3.0), 0.2
    out_of_training = dropout(x, p, False)
    require_type(out_of_training, torch.Tensor, "a tensor")
    require(torch.equal(out_of_training, x), "Out of training, x should stay as it is.")
    got = dropout(x, p, True)
    require_type(got, torch.Tensor, "a tensor")
    require(got.shape == x.shape, f"x is {tuple(x.shape)}, and the output {tuple(got.shape)}.")
    dropped = got == 0
    share = dropped.float().mean().item()
    require(share > 0, "In training nothing is set to 0.")
    for part in (dropped[:1], dropped[:, :1]):
        message = "All rows, or all columns, lose the same numbers: draw for each number."
        require(not torch.equal(dropped, part.expand_as(dropped)), message)
    kept = "p is the probability to be set to 0, and here it is that of being kept"
    require(abs(share - (1 - p)) > 0.03, f"{share:.0%} of the numbers are 0: {kept}.")
    require(abs(share - p) < 0.03, f"With p = {p}, {share:.0%} of the numbers are 0.")
    again = dropout(x, p, True) == 0
    require(not torch.equal(again, dropped), "The next call sets the same numbers to 0: draw anew.")
    mean = f"the mean was 3 and is {got.mean().item():.2f}"
    scale = f"What is not set to 0 should be scaled up by 1 / (1 - p): {mean}."
    require(is_close(got[~dropped], x[~dropped] / (1 - p)), scale)


CHECKS = {
    name: check_average if name.startswith("average") else globals()[f"check_{name}"]
    for name in STEPS
}
