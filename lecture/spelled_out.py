"""The lecture's slow and obvious forms, in its order: for reading, top to bottom.

"Let's build GPT: from scratch, in code, spelled out" builds everything once the long way. This file
does so, too; test_spelled_out.py proves each piece equal to what model.py and PyTorch do in short.

    python tests/spelled_out.py [data/shakespeare_char]

trains the lecture's small models, rung by rung, and prints what each is worth.

Shapes:  B batch   T time, in tokens   C n_embd   hs head size   V vocab_size   N any number
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

SEEDS = (1337, 1338, 1339)
BATCH_SIZE, BLOCK_SIZE = 32, 8  # 32 windows of 8 tokens a step
N_EMBD, N_HEAD, N_LAYER = 32, 4, 3
LEARNING_RATE, N_STEPS = 1e-3, 5000


# ---- 0:07:52 to 0:14:27 text, tokens, windows ----------------------------------------------------
# prepare.py has read the text, tokenizer.py has made a number of each character, and the last tenth
# is put aside. dataset.py cuts windows out of it: T tokens, and for each of them the one that
# follows as its target. So a window is T examples, with contexts of 1 to T tokens.


def open_splits(folder: Path):
    """-> train and val as dataset.Split, and the size of their vocabulary."""
    from quill.data import dataset
    from quill.errors import InputError

    meta, files = dataset.read(folder)
    if meta.vocab_size > 1000:
        raise InputError(
            f"{folder} has a vocabulary of {meta.vocab_size:,}, too many for these small models: "
            "prepare the text with --tokenizer=byte"
        )
    cpu = torch.device("cpu")
    splits = (
        dataset.Split(files[name], None, meta.vocab_size, BLOCK_SIZE, cpu, folder / f"{name}.bin")
        for name in dataset.SPLITS
    )
    return *splits, meta.vocab_size


# ---- 0:22:11 the simplest baseline: a bigram, and how its loss is measured -----------------------
# Which token follows depends on the last one alone. No training is needed to find the best such
# model: count which pairs occur. Whatever looks further back has to beat this floor.


def count_bigrams(ids: list[int], vocab_size: int):
    """How often each token (row) is followed by each other (column): (V, V)."""
    counts = torch.zeros(vocab_size, vocab_size)
    for (token, following), n in Counter(itertools.pairwise(ids)).items():
        counts[token, following] = n
    return counts


def bigram_log_probs(counts, smoothing: float):
    """Log-probabilities of what follows each token: (V, V).

    Smoothing pretends that every pair was seen that much more often. Without it a pair new to the
    model has probability 0, and one such pair makes a text's loss infinite.
    """
    counts = counts + smoothing
    return (counts / counts.sum(dim=1, keepdim=True)).log()


def bigram_loss(counts, log_probs) -> float:
    """Nats per token, of a text that has these counts."""
    seen = counts > 0
    return -((counts[seen] * log_probs[seen]).sum() / counts.sum()).item()


def cross_entropy(logits, targets, reduction: str = "mean"):
    """Minus the log-probability that the scores (N, V) give to the targets (N,); -1 is ignored."""
    logits = logits - logits.amax(dim=1, keepdim=True)  # the same probabilities, and no overflow
    log_probs = logits - logits.exp().sum(dim=1, keepdim=True).log()  # (N, V)
    counts = targets != -1
    of_targets = log_probs[torch.arange(len(targets))[counts], targets[counts]]
    return -of_targets.mean() if reduction == "mean" else -of_targets.sum()


# ---- 0:34:53 training: the optimizer and the loop ------------------------------------------------


class AdamW:
    """Two running averages for each weight, of its gradient and of its gradient's square.

    The first over the root of the second is near 1 where gradients agree and near 0 where they
    quarrel, whatever their size, so all weights move at a similar pace. Apart from that each weight
    decays towards zero. In optim.py matrices do and vectors don't, which takes one of these each.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.params, self.lr, self.betas = list(params), lr, betas
        self.eps, self.weight_decay = eps, weight_decay
        self.means = [torch.zeros_like(p) for p in self.params]
        self.squares = [torch.zeros_like(p) for p in self.params]
        self.n_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.n_steps += 1
        beta1, beta2 = self.betas
        # The averages begin at zero and so are too small at first, by just these factors.
        grown1, grown2 = 1 - beta1**self.n_steps, 1 - beta2**self.n_steps
        for p, mean, square in zip(self.params, self.means, self.squares, strict=True):
            mean.lerp_(p.grad, 1 - beta1)  # a tenth of the way to the newest
            square.lerp_(p.grad**2, 1 - beta2)
            p *= 1 - self.lr * self.weight_decay
            p -= self.lr / grown1 * mean / ((square / grown2).sqrt() + self.eps)


def train(model, split, seed: int) -> None:
    """The whole loop: windows, loss, gradients, update."""
    optimizer = AdamW(model.parameters(), LEARNING_RATE)
    for step in range(N_STEPS):
        idx, targets = split.windows(split.train_offsets(BATCH_SIZE, seed, step))  # (B, T) each
        loss = cross_entropy(model(idx).flatten(0, 1), targets.flatten())
        for p in optimizer.params:
            p.grad = None  # backward() adds to what is there
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model, split) -> float:
    """Nats per token, over all of the split but its first token, which nothing precedes."""
    total = 0.0
    for starts in torch.from_numpy(split.eval_offsets(0, whole=True)).split(1000):
        idx, targets = split.windows(starts.numpy())
        total += cross_entropy(model(idx).flatten(0, 1), targets.flatten(), "sum").item()
    return total / (len(split) - 1)


# ---- 0:42:13 to 0:54:42 averaging the past, three times the same ---------------------------------
# A token that is to know what came before needs some summary of it. The crudest is the mean, which
# forgets all order. The point is its third form: weights that sum to 1 and leave out the future,
# made by softmax from scores that are all zero here, and that attention will compute.


def average_with_loops(x):
    """Version 1: at each time the mean of all there is up to it; (B, T, C) -> (B, T, C)."""
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            out[b, t] = x[b, : t + 1].mean(dim=0)  # (C,)
    return out


def average_with_matrix(x):
    """Version 2: row t of a triangular matrix has 1 / (t + 1) for each of the times up to t."""
    T = x.size(1)
    weights = torch.ones(T, T).tril()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def average_with_softmax(x):
    """Version 3: equal scores for the past, minus infinity for the future."""
    T = x.size(1)
    scores = torch.zeros(T, T).masked_fill(future(T), -math.inf)
    return scores.softmax(dim=1) @ x


def future(T: int):
    """Which times (columns) lie ahead of each time (rows): (T, T)."""
    return torch.ones(T, T, dtype=torch.bool).triu(1)


# ---- 0:58:26 the frame, 1:00:18 positions --------------------------------------------------------


class LanguageModel(nn.Module):
    """Ids to vectors, vectors to scores; what stands in the middle is the rest of the lecture."""

    def __init__(self, vocab_size: int, block_size: int, n_embd: int, middle: list[nn.Module]):
        super().__init__()
        self.token = nn.Embedding(vocab_size, n_embd)
        self.position = nn.Embedding(block_size, n_embd)  # attention alone would not see order
        self.middle = nn.Sequential(*middle)
        self.score = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        x = self.token(idx) + self.position(torch.arange(idx.size(1)))  # (B, T, C) + (T, C)
        return self.score(self.middle(x))  # (B, T, V)


# ---- 1:02:00 self-attention, 1:11:38 to 1:16:56 six notes on it ----------------------------------


class Head(nn.Module):
    """Version 4: each token decides what it wants from which of the tokens before it.

    The lecture's six notes, and where they show:
    1. Attention is communication: a graph in which each token gathers from those that point at it.
    2. It works on sets and has no notion of space: order comes from `LanguageModel`'s positions.
    3. The rows of a batch never meet: each product below has B in front.
    4. Without masking the future this would be an encoder's head; with it, it is a decoder's.
    5. Query, key and value come from the same x: self-attention. In cross-attention the keys and
       values are another text's.
    6. Scaled: a score sums hs products and would vary as much; softmax would pick one token alone.
    """

    def __init__(self, n_embd: int, head_size: int, bias: bool = False):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=bias)  # what this token asks
        self.key = nn.Linear(n_embd, head_size, bias=bias)  # what the others' questions find it by
        self.value = nn.Linear(n_embd, head_size, bias=bias)  # what they then get

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, hs) each
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(2))  # (B, T, T)
        weights = scores.masked_fill(future(x.size(1)), -math.inf).softmax(dim=2)
        return weights @ v  # (B, T, hs)


# ---- 1:21:59 several heads -----------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """Several small heads side by side: a token has more than one thing to ask.

    model.CausalSelfAttention computes all of them at once, the heads as one more batch dimension:
    the lecture's first exercise.
    """

    def __init__(self, n_embd: int, n_head: int, bias: bool = False):
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd, n_embd // n_head, bias) for _ in range(n_head))

    def forward(self, x):
        found = [head(x) for head in self.heads]  # nh times (B, T, hs)
        return torch.cat(found, dim=2)  # (B, T, C)


# ---- 1:24:25 feed-forward ------------------------------------------------------------------------


class FeedForward(nn.Module):
    """After listening, thinking: each token on its own, all in the same way."""

    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(n_embd, hidden)

    def forward(self, x):
        return self.linear(x).relu()  # (B, T, hidden)


# ---- 1:26:48 residual paths ----------------------------------------------------------------------


class Block(nn.Module):
    """Listening, then thinking, each added to what is there instead of taking its place.

    A sum hands its gradient on to all its terms, so the first block learns as directly as the last.
    What leaves the path comes back through a matrix of its own, and may be wider on the way.
    """

    def __init__(self, n_embd: int, n_head: int, norm=nn.Identity, bias: bool = False):
        super().__init__()
        self.norm_1, self.norm_2 = norm(n_embd), norm(n_embd)
        self.attention = MultiHeadAttention(n_embd, n_head, bias)
        self.back_1 = nn.Linear(n_embd, n_embd)
        self.feed_forward = FeedForward(n_embd, 4 * n_embd)
        self.back_2 = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        x = x + self.back_1(self.attention(self.norm_1(x)))
        return x + self.back_2(self.feed_forward(self.norm_2(x)))


# ---- 1:32:51 layer norm --------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Each token's C numbers get mean 0 and variance 1, then gains and biases that are learned.

    Batch norm does so with each of the C over all tokens of a batch, and must remember what it saw
    for the time after training. Here no token needs another, and nothing has to be remembered.
    """

    def __init__(self, n_embd: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred**2).mean(dim=-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * self.gain + self.bias


class RMSNorm(nn.Module):
    """Half of that, as newer models have it: mean square 1, nothing centred, no bias."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        return x / ((x**2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * self.gain


# ---- 1:37:49 dropout -----------------------------------------------------------------------------
# The small models here have seen each token about once and need none. In model.py it is where the
# lecture has it, on the attention's weights and where a branch rejoins the path, and on the sum of
# embeddings.


def drop(x, kept, share: float):
    """Zero what is not `kept`; the rest grows so that the expected sum stays the same."""
    return x * kept / (1 - share)


class Dropout(nn.Module):
    """In training, silence a random share: nothing can rely on any single number being there."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x):
        return drop(x, torch.rand_like(x) >= self.share, self.share) if self.training else x


# ---- the ladder ----------------------------------------------------------------------------------


def ladder() -> dict[str, list[nn.Module]]:
    """What stands in the middle of each model, by the name of what it adds."""
    heads = functools.partial(MultiHeadAttention, N_EMBD, N_HEAD)
    feed_forward = functools.partial(FeedForward, N_EMBD, N_EMBD)
    block = functools.partial(Block, N_EMBD, N_HEAD)
    return {
        "one head": [Head(N_EMBD, N_EMBD)],
        "several heads": [heads()],
        "feed-forward": [heads(), feed_forward()],
        "three layers": [part() for _ in range(N_LAYER) for part in (heads, feed_forward)],
        "residual paths": [block() for _ in range(N_LAYER)],
        "layer norm": [*(block(LayerNorm) for _ in range(N_LAYER)), LayerNorm(N_EMBD)],
    }


def print_row(name: str, n_parameters: int, losses: list[float], seconds: float) -> None:
    spread = f"{min(losses):.4f} .. {max(losses):.4f}" if len(losses) > 1 else ""
    mean = sum(losses) / len(losses)
    print(f"{name:16}{n_parameters:10,}{mean:12.4f}    {spread:20}{seconds:7.1f}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Train the lecture's small models, rung by rung.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/shakespeare_char"))
    train_split, val_split, vocab_size = open_splits(parser.parse_args(argv).folder)
    torch.set_num_threads(1)  # tensors this small are faster so
    print(f"{'rung':16}parameters    val loss    of {len(SEEDS)} seeds          seconds a run")
    began = time.perf_counter()
    counts, of_val = (count_bigrams(s.ids.tolist(), vocab_size) for s in (train_split, val_split))
    floor = bigram_loss(of_val, bigram_log_probs(counts, 1))
    print_row("bigram, counted", counts.numel(), [floor], time.perf_counter() - began)
    for name in ladder():
        losses, began = [], time.perf_counter()
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = LanguageModel(vocab_size, BLOCK_SIZE, N_EMBD, ladder()[name])
            train(model, train_split, seed)
            losses.append(evaluate(model, val_split))
        n_parameters = sum(p.numel() for p in model.parameters())
        print_row(name, n_parameters, losses, (time.perf_counter() - began) / len(SEEDS))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where dataset.py is
    from quill.errors import run_command

    run_command(main)
