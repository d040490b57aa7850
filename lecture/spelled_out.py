"""The pieces of "Let's build GPT: from scratch, in code, spelled out", the long way, in its order.

To be read from top to bottom: every piece of a small GPT, written out in plain tensor operations.
tests/lecture proves each of them equal to what model.py and PyTorch do in fewer lines.

    python lecture/spelled_out.py [TEXT]

trains the lecture's small models on a text, each of which adds one piece to the one above, and
prints what the piece is worth. TEXT is a UTF-8 file, by default data/tinyshakespeare.txt, which
`python prepare.py` downloads. lecture/gpt.py puts the pieces together into the final model.

Shapes:  B batch   T time, in tokens   C n_embd   hs head size   V vocab_size   N any number
"""

import argparse
import functools
import itertools
import math
import signal
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
MAX_VOCAB_SIZE = 1000  # the counted bigram has a row and a column for each token


# ---- 0:07:52 to 0:14:27 text, tokens, batches ----------------------------------------------------


class CharTokenizer:
    """Each distinct character of the text is a token; its id is its place in sorted order."""

    def __init__(self, text: str):
        self.chars = sorted(set(text))
        self.ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[char] for char in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)


def split(ids):
    """-> the ids of train, the ids of val, which is the last tenth.

    No model trains on val, so its loss shows what a model has learned about text in general, and
    not what it remembers of this one.
    """
    n_train = int(0.9 * len(ids))
    return ids[:n_train], ids[n_train:]


def open_splits(path: Path):
    """-> the ids of train, the ids of val, the tokenizer. Raises OSError or ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    text = path.read_text(encoding="utf-8")
    tokenizer = CharTokenizer(text)
    if len(tokenizer.chars) > MAX_VOCAB_SIZE:
        raise ValueError(
            f"{len(tokenizer.chars):,} distinct characters are too many for these small models; "
            f"choose a text with at most {MAX_VOCAB_SIZE:,}"
        )
    train_ids, val_ids = split(torch.tensor(tokenizer.encode(text)))
    if len(val_ids) <= BLOCK_SIZE:
        raise ValueError(f"its last tenth must have more than {BLOCK_SIZE} characters")
    return train_ids, val_ids, tokenizer


def get_batch(ids):
    """Random windows of the ids, and for each token of a window the one after it: (B, T) each.

    One window holds T examples: its first token predicts the second, the first two the third, ...
    """
    offsets = torch.randint(len(ids) - BLOCK_SIZE, (BATCH_SIZE,)).tolist()
    idx = torch.stack([ids[i : i + BLOCK_SIZE] for i in offsets])
    return idx, torch.stack([ids[i + 1 : i + 1 + BLOCK_SIZE] for i in offsets])


# ---- 0:22:11 the simplest baseline: a bigram, its loss, and generating from it -------------------
# A bigram model predicts the next token from the last one alone. The best one needs no training:
# count how often each pair occurs. A model that looks further back should have a lower loss.


def count_bigrams(ids: list[int], vocab_size: int):
    """How often each token (row) is followed by each other (column): (V, V)."""
    counts = torch.zeros(vocab_size, vocab_size)
    for (token, following), n in Counter(itertools.pairwise(ids)).items():
        counts[token, following] = n
    return counts


def bigram_log_probs(counts, smoothing: float):
    """Log-probabilities of the token after each token: (V, V).

    Smoothing adds this number to each count. Without it a pair that never occurred has probability
    0, and the loss of a text that has such a pair is infinite.
    """
    counts = counts + smoothing
    return (counts / counts.sum(dim=1, keepdim=True)).log()


def bigram_loss(counts, log_probs) -> float:
    """Nats per token of a text with these counts."""
    seen = counts > 0
    return -((counts[seen] * log_probs[seen]).sum() / counts.sum()).item()


def cross_entropy(logits, targets, reduction: str = "mean"):
    """-log p of the targets (N,), where p is the softmax of the logits (N, V); -1 is ignored."""
    logits = logits - logits.amax(dim=1, keepdim=True)  # same probabilities, and exp can't overflow
    log_probs = logits - logits.exp().sum(dim=1, keepdim=True).log()  # (N, V)
    rows = (targets != -1).nonzero()[:, 0]
    of_targets = log_probs[rows, targets[rows]]
    return -of_targets.mean() if reduction == "mean" else -of_targets.sum()


@torch.no_grad()
def generate(model, idx, n_tokens: int):
    """Append n_tokens to each row of idx (B, T), each drawn from what the model predicts."""
    for _ in range(n_tokens):
        logits = model(idx[:, -BLOCK_SIZE:])[:, -1]  # (B, V), of the last position
        new = torch.multinomial(logits.softmax(dim=1), num_samples=1)  # (B, 1)
        idx = torch.cat((idx, new), dim=1)  # (B, T + 1)
    return idx


# ---- 0:34:53 training: the optimizer and the loop ------------------------------------------------


class AdamW:
    """Keeps two running averages for each weight: of its gradient, and of the gradient's square.

    A step is the first divided by the root of the second. That is near 1 where successive gradients
    agree and near 0 where they cancel, whatever their size, so all weights move at a similar pace.
    Weight decay is separate: each step also shrinks every weight a little. The optimizers of
    train.py decay matrices only; that takes two of these.
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
        # The averages start at zero, so at first they are too small, by exactly these factors.
        correction1, correction2 = 1 - beta1**self.n_steps, 1 - beta2**self.n_steps
        for p, mean, square in zip(self.params, self.means, self.squares, strict=True):
            mean.lerp_(p.grad, 1 - beta1)  # move a tenth of the way to the new gradient
            square.lerp_(p.grad**2, 1 - beta2)
            p *= 1 - self.lr * self.weight_decay
            p -= self.lr / correction1 * mean / ((square / correction2).sqrt() + self.eps)


def train_step(model, optimizer, idx, targets):
    """One update of the model's weights; -> the loss before it."""
    loss = cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    for p in model.parameters():
        p.grad = None  # backward() would add to the gradients of the last step
    loss.backward()
    optimizer.step()
    return loss


def train(model, ids, seed: int, name: str = "") -> None:
    """Batch, loss, gradients, update; N_STEPS times."""
    torch.manual_seed(seed)  # every rung of the ladder sees the same batches
    optimizer = AdamW(model.parameters(), LEARNING_RATE)
    for step in range(1, N_STEPS + 1):
        idx, targets = get_batch(ids)  # (B, T) each
        loss = train_step(model, optimizer, idx, targets)
        show_progress(name, seed, step, loss)


@torch.no_grad()
def evaluate(model, ids) -> float:
    """Nats per token over the whole split, in windows side by side.

    Each token but the first is predicted once. The last window may reach past the end: its targets
    there are -1.
    """
    n_windows = math.ceil((len(ids) - 1) / BLOCK_SIZE)
    padded = nn.functional.pad(ids, (0, n_windows * BLOCK_SIZE + 1 - len(ids)), value=-1)
    idx = padded[:-1].clamp(min=0).view(n_windows, BLOCK_SIZE)
    targets = padded[1:].view(n_windows, BLOCK_SIZE)
    total = 0.0
    for x, y in zip(idx.split(1000), targets.split(1000), strict=True):
        total += cross_entropy(model(x).flatten(0, 1), y.flatten(), "sum").item()
    return total / (len(ids) - 1)


# ---- 0:42:13 to 0:54:42 averaging the past, in three equivalent ways -----------------------------
# A token should know something about the tokens before it. The simplest summary is their mean,
# though it loses their order. Version 3 is the important one: the weights of the mean come out of a
# softmax over scores, with minus infinity for the future. Here all scores are zero; self-attention
# computes them from the data.


def average_with_loops(x):
    """Version 1: at each time the mean of x up to and including it; (B, T, C) -> (B, T, C)."""
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            out[b, t] = x[b, : t + 1].mean(dim=0)  # (C,)
    return out


def average_with_matrix(x):
    """Version 2: row t of a lower triangular matrix has 1 / (t + 1) in columns 0 to t."""
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
    """True where the column's time comes after the row's: (T, T)."""
    return torch.ones(T, T, dtype=torch.bool).triu(1)


# ---- 0:58:26 the model around it, 1:00:18 positional encoding ------------------------------------


class LanguageModel(nn.Module):
    """Token ids to vectors, and vectors to logits. The rest of the lecture is about the middle."""

    def __init__(self, vocab_size: int, block_size: int, n_embd: int, middle: list[nn.Module]):
        super().__init__()
        self.token = nn.Embedding(vocab_size, n_embd)
        self.position = nn.Embedding(block_size, n_embd)  # attention by itself ignores order
        self.middle = nn.Sequential(*middle)
        self.score = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        x = self.token(idx) + self.position(torch.arange(idx.size(1)))  # (B, T, C) + (T, C)
        return self.score(self.middle(x))  # (B, T, V)


# ---- 1:02:00 self-attention, 1:11:38 to 1:16:56 six notes on it ----------------------------------


class Head(nn.Module):
    """Version 4: each token decides how much it takes from each of the tokens before it.

    The lecture's six notes, and where to see them:
    1. Attention is communication: each token gathers from the nodes of a graph that point to it.
    2. It works on a set, with no notion of space: order comes from `LanguageModel.position`.
    3. The rows of a batch never mix: B is a batch dimension of each product below.
    4. This is a decoder's head. Without the mask over the future it would be an encoder's.
    5. Query, key and value come from the same x: self-attention. In cross-attention the keys and
       values come from another text.
    6. Scaled: a score is a sum of hs products, so its variance grows with hs, and softmax of large
       scores is nearly one-hot. Dividing by the root of hs keeps the variance near 1.
    """

    def __init__(self, n_embd: int, head_size: int, bias: bool = False):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=bias)  # what this token is looking for
        self.key = nn.Linear(n_embd, head_size, bias=bias)  # what it has to offer
        self.value = nn.Linear(n_embd, head_size, bias=bias)  # what it passes on

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, hs) each
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(2))  # (B, T, T)
        weights = scores.masked_fill(future(x.size(1)), -math.inf).softmax(dim=2)
        return weights @ v  # (B, T, hs)


# ---- 1:21:59 several heads -----------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """Several small heads in parallel: a token may look for several things at once.

    model.CausalSelfAttention computes all heads in one go, with the heads as one more batch
    dimension: that is the lecture's first exercise.
    """

    def __init__(self, n_embd: int, n_head: int, bias: bool = False):
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd, n_embd // n_head, bias) for _ in range(n_head))

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=2)  # nh times (B, T, hs): (B, T, C)


# ---- 1:24:25 feed-forward ------------------------------------------------------------------------


class FeedForward(nn.Module):
    """After the communication, computation: the same small network for each token on its own."""

    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(n_embd, hidden)

    def forward(self, x):
        return self.linear(x).relu()  # (B, T, hidden)


# ---- 1:26:48 residual connections ----------------------------------------------------------------


class Block(nn.Module):
    """Attention, then feed-forward, each added to its input.

    A sum passes its gradient to all its terms unchanged, so gradients reach the first block as
    directly as the last. A projection brings each branch back to the residual path, which also lets
    the hidden layer be 4 times as wide.
    """

    def __init__(self, n_embd: int, n_head: int, norm=nn.Identity, bias: bool = False):
        super().__init__()
        self.norm_1, self.norm_2 = norm(n_embd), norm(n_embd)
        self.attention = MultiHeadAttention(n_embd, n_head, bias)
        self.proj_1 = nn.Linear(n_embd, n_embd)
        self.feed_forward = FeedForward(n_embd, 4 * n_embd)
        self.proj_2 = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        x = x + self.proj_1(self.attention(self.norm_1(x)))
        return x + self.proj_2(self.feed_forward(self.norm_2(x)))


# ---- 1:32:51 layer norm --------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Scale each token's C numbers to mean 0 and variance 1, then apply a learned gain and bias.

    Batch norm does this for each of the C channels over the tokens of a batch, so it needs running
    statistics for the time after training. Here each token is normalised on its own.
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
    """A simpler norm that many newer models use: no mean is subtracted and there is no bias."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        return x / ((x**2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * self.gain


# ---- 1:37:49 dropout -----------------------------------------------------------------------------
# The small models below see each token about once, so they can't overfit and need no dropout.
# lecture/gpt.py and model.py have it where the lecture has it: on the attention weights and at the
# end of each branch; model.py also has it on the embeddings.


def drop(x, kept, p: float):
    """Zero x where it is not `kept`; scale up the rest, so that the expected value stays."""
    return x * kept / (1 - p)


class Dropout(nn.Module):
    """In training, zero each number with probability p, so that none can be relied on alone."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        return drop(x, torch.rand_like(x) >= self.p, self.p) if self.training else x


# ---- the ladder: what is each piece worth? -------------------------------------------------------


def ladder() -> dict[str, list[nn.Module]]:
    """The middle of each model, by the name of the piece it adds."""
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


def show_progress(name: str, seed: int, step: int, loss) -> None:
    """On stderr: one line that is rewritten on a terminal, elsewhere a line at the end of a run."""
    is_terminal = sys.stderr.isatty()
    if step == N_STEPS or (is_terminal and step % 100 == 0):
        line = f"{name:16}seed {seed}    step {step:,} of {N_STEPS:,}    loss {loss.item():.4f}"
        start, end = ("\r", "\x1b[K") if is_terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)


def print_row(name: str, n_parameters: int, losses: list[float], seconds: float) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # clear the progress line
    spread = f"{min(losses):.4f} .. {max(losses):.4f}" if len(losses) > 1 else ""
    mean = sum(losses) / len(losses)
    print(f"{name:16}{n_parameters:10,}{mean:12.4f}    {spread:20}{seconds:7.1f}", flush=True)


def run_ladder(train_ids, val_ids, vocab_size: int):
    """Train and evaluate each rung, with each seed; -> the last model."""
    print(f"{'rung':16}parameters    val loss    of {len(SEEDS)} seeds          seconds a run")
    began = time.perf_counter()
    counts, of_val = (count_bigrams(ids.tolist(), vocab_size) for ids in (train_ids, val_ids))
    floor = bigram_loss(of_val, bigram_log_probs(counts, smoothing=1))
    print_row("bigram, counted", counts.numel(), [floor], time.perf_counter() - began)
    for name in ladder():
        losses, began = [], time.perf_counter()
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = LanguageModel(vocab_size, BLOCK_SIZE, N_EMBD, ladder()[name])
            train(model, train_ids, seed, name)
            losses.append(evaluate(model, val_ids))
        n_parameters = sum(p.numel() for p in model.parameters())
        print_row(name, n_parameters, losses, (time.perf_counter() - began) / len(SEEDS))
    return model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Train the lecture's small models, rung by rung.")
    default = Path("data/tinyshakespeare.txt")
    parser.add_argument("text", type=Path, nargs="?", default=default, help=f"default: {default}")
    path = parser.parse_args(argv).text
    try:
        train_ids, val_ids, tokenizer = open_splits(path)
    except OSError as error:
        hint = "python prepare.py downloads Tiny Shakespeare"
        parser.exit(2, f"error: {path}: {error.strerror}; {hint}\n")
    except ValueError as error:  # as it is when the text is not UTF-8
        parser.exit(2, f"error: {path}: {error}\n")
    torch.set_num_threads(1)  # faster for tensors as small as these
    model = run_ladder(train_ids, val_ids, len(tokenizer.chars))
    start = torch.zeros(1, 1, dtype=torch.long)  # token 0: in Tiny Shakespeare the line break
    sample = tokenizer.decode(generate(model, start, 300)[0].tolist())
    print(f"\nthe last model writes:\n{sample}")
    print("\nnext, the lecture's final model: python lecture/gpt.py")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C stops it without a traceback
    sys.exit(main(sys.argv[1:]))
