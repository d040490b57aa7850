"""The Transformer of "Attention Is All You Need" (Vaswani et al. 2017): an encoder and a decoder.

    python lecture/encoder_decoder.py [--seed N] [--picture FILE.png]

The lecture builds a decoder alone and says at 1:42:39 what it leaves out: an encoder, which reads a
source text in both directions, and cross-attention, by which the decoder looks at what the encoder
made of it. Here are both, trained to turn dates written in words into ISO dates:

    the twenty-first of march nineteen eighty-four   ->   1984-03-21

tests/lecture proves each piece equal to PyTorch's own.

Shapes:  B batch   S source length   T target length   C width   hs head size   V vocabulary
"""

import argparse
import datetime
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

BATCH_SIZE, N_STEPS, LEARNING_RATE = 128, 1000, 3e-3
C, N_HEAD, N_LAYER = 64, 4, 2  # layers of each of the two halves
FIRST_YEAR, LAST_YEAR = 1100, 2099
N_HELD_OUT = 2000  # dates that are not trained on
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- dates ---------------------------------------------------------------------------------------

MONTHS = "january february march april may june july august september october november december"
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
CHARS = "-0123456789 abcdefghijklmnopqrstuvwxyz"
PAD, START, END = range(len(CHARS), len(CHARS) + 3)  # tokens that are no characters
VOCAB_SIZE = len(CHARS) + 3
ID_OF = {char: i for i, char in enumerate(CHARS)}


def number(n: int) -> str:
    """0 <= n < 100."""
    if n < 20:
        return ONES.split()[n]
    ten, one = divmod(n, 10)
    return TENS.split()[ten - 2] + (f"-{number(one)}" if one else "")


def year_in_words(year: int) -> str:
    """1100 <= year < 2100."""
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return f"two thousand and {number(rest)}" if rest else "two thousand"
    if rest == 0:
        return f"{number(century)} hundred"
    return f"{number(century)} {'oh ' if rest < 10 else ''}{number(rest)}"


def day_in_words(day: int) -> str:
    if day <= 20:
        return ORDINALS.split()[day - 1]
    return "thirtieth" if day == 30 else f"{TENS.split()[day // 10 - 2]}-{day_in_words(day % 10)}"


def in_words(date: datetime.date, form: int) -> str:
    day, month = day_in_words(date.day), MONTHS.split()[date.month - 1]
    start = f"the {day} of {month}" if form == 0 else f"{month} the {day}"
    return f"{start} {year_in_words(date.year)}"


def make_dates(seed: int) -> tuple[list, list]:
    """Every date of these years as (words, ISO), in one of two forms -> train, held out."""
    rng = random.Random(seed)
    first, end = (datetime.date(y, 1, 1).toordinal() for y in (FIRST_YEAR, LAST_YEAR + 1))
    days = [datetime.date.fromordinal(n) for n in range(first, end)]
    rng.shuffle(days)
    pairs = [(in_words(day, rng.randrange(2)), day.isoformat()) for day in days]
    return pairs[N_HELD_OUT:], pairs[:N_HELD_OUT]


def encode(texts: list[str]):
    """-> ids (B, the longest + 1), each row with END and then PAD."""
    rows = [[ID_OF[char] for char in text] + [END] for text in texts]
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD
    ).to(DEVICE)


def decode(ids: list[int]) -> str:
    """Up to END."""
    return "".join(CHARS[i] if i < len(CHARS) else "?" for i in ids[: (*ids, END).index(END)])


# ---- the model -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Each position of x asks; each position of `source` may answer.

    Self-attention if source is x. Cross-attention if it is something else. Which of the two, and
    who may see whom, is all that tells the three attentions of a Transformer apart.
    """

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(C, C) for _ in range(3))
        self.proj = nn.Linear(C, C)

    def forward(self, x, source, may_see):
        """x (B, T, C), source (B, S, C), may_see: a bool that fits (B, T, S) -> (B, T, C)."""
        q, k, v = (
            part.unflatten(2, (N_HEAD, -1)).transpose(1, 2)  # (B, heads, T or S, hs)
            for part in (self.query(x), self.key(source), self.value(source))
        )
        scores = q @ k.transpose(2, 3) * k.size(3) ** -0.5  # (B, heads, T, S)
        scores = scores.masked_fill(~may_see[:, None], float("-inf"))
        self.weights = scores.softmax(dim=3)  # kept, to be looked at
        return self.proj((self.weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))


class EncoderBlock(nn.Module):
    """Self-attention without a causal mask: a character of the source sees those after it too."""

    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x, is_real):
        h = self.ln_1(x)
        x = x + self.attention(h, h, is_real)
        return x + self.feed_forward(self.ln_2(x))


class DecoderBlock(nn.Module):
    """Causal self-attention, as in the lecture; then cross-attention to what the encoder made."""

    def __init__(self):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(), Attention()
        self.feed_forward = FeedForward()
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(C) for _ in range(3))

    def forward(self, x, memory, is_past, is_real):
        h = self.ln_1(x)
        x = x + self.self_attention(h, h, is_past)
        x = x + self.cross_attention(self.ln_2(x), memory, is_real)
        return x + self.feed_forward(self.ln_3(x))


class Transformer(nn.Module):
    def __init__(self, max_length: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, C)  # of source and target
        self.positions = nn.Embedding(max_length, C)
        self.encoder = nn.ModuleList(EncoderBlock() for _ in range(N_LAYER))
        self.decoder = nn.ModuleList(DecoderBlock() for _ in range(N_LAYER))
        self.ln_encoder, self.ln_decoder = nn.LayerNorm(C), nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, VOCAB_SIZE)

    def embed(self, ids):
        return self.tokens(ids) + self.positions.weight[: ids.size(1)]

    def encode(self, source):
        """source (B, S) -> memory (B, S, C), and where it is more than padding (B, 1, S)."""
        is_real = (source != PAD)[:, None]
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, is_real)
        return self.ln_encoder(x), is_real

    def decode(self, target, memory, is_real):
        """target (B, T) from START on -> the scores of the token after each (B, T, V)."""
        T = target.size(1)
        is_past = torch.ones(1, T, T, dtype=torch.bool, device=target.device).tril()
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, memory, is_past, is_real)
        return self.lm_head(self.ln_decoder(x))

    def loss(self, source, target):
        """Teacher forcing: the decoder reads the right target so far, not what it would have said.

        So that all positions can be trained at once. target (B, T) ends with END, then has PAD.
        """
        start = torch.full_like(target[:, :1], START)
        logits = self.decode(torch.cat((start, target[:, :-1]), dim=1), *self.encode(source))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)

    @torch.no_grad()
    def translate(self, source, n_tokens: int):
        """The likeliest token, again and again: (B, S) -> (B, n_tokens)."""
        memory = self.encode(source)
        target = torch.full_like(source[:, :1], START)
        for _ in range(n_tokens):
            new = self.decode(target, *memory)[:, -1].argmax(dim=1, keepdim=True)
            target = torch.cat((target, new), dim=1)
        return target[:, 1:]


# ---- training ------------------------------------------------------------------------------------


def train(model: Transformer, pairs: list, n_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.1, anneal_strategy="linear"
    )
    for step in range(1, n_steps + 1):
        sources, targets = zip(*random.choices(pairs, k=BATCH_SIZE), strict=True)
        loss = model.loss(encode(sources), encode(targets))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def fraction_right(model: Transformer, pairs: list) -> float:
    """Of the dates that are right to the last character."""
    sources, targets = zip(*pairs, strict=True)
    said = [decode(row) for row in model.translate(encode(sources), 11).tolist()]
    return sum(a == b for a, b in zip(said, targets, strict=True)) / len(pairs)


def draw(model: Transformer, words: str, iso: str, path: Path) -> None:
    """The cross-attention of the last layer, the mean of its heads: which characters of the words
    each character of the date looks at.
    """
    from matplotlib.figure import Figure

    model.loss(encode([words]), encode([iso]))
    weights = model.decoder[-1].cross_attention.weights[0].mean(dim=0)  # (T, S)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(weights[: len(iso), : len(words)].numpy(force=True), cmap="viridis")
    axes.set_xticks(range(len(words)), words)
    axes.set_yticks(range(len(iso)), iso)
    axes.set(xlabel="the source: what the encoder read", ylabel="the date")
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1337, help="of weights and batches")
    parser.add_argument("--steps", type=int, default=N_STEPS, help=f"of training ({N_STEPS})")
    parser.add_argument("--picture", type=Path, help="draw the cross-attention of a date to a PNG")
    args = parser.parse_args(argv)
    picture = args.picture
    if args.steps < 1:
        parser.exit(2, f"error: --steps={args.steps}: at least 1\n")
    if picture and (picture.suffix != ".png" or picture.exists() or not picture.parent.is_dir()):
        parser.exit(2, f"error: --picture={picture}: give the name of a new file, NAME.png\n")
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    train_pairs, held_out = make_dates(seed=1337)
    model = Transformer().to(DEVICE)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_pairs):,} dates")
    started = time.perf_counter()
    train(model, train_pairs, args.steps)
    right, seconds = fraction_right(model, held_out), time.perf_counter() - started
    print(f"{right:.2%} of {len(held_out):,} held-out dates right, after {seconds:.0f} s")
    words, iso = held_out[0]
    print(f"{words} -> {decode(model.translate(encode([words]), 11)[0].tolist())}")
    if picture:
        draw(model, words, iso, picture)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C stops it without a traceback
    sys.exit(main(sys.argv[1:]))
