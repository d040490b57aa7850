"""The lecture's final model in one file: a GPT by character, trained and sampled from.

    python lecture/gpt.py [TEXT]

TEXT is a UTF-8 file, by default data/tinyshakespeare.txt, which `python prepare.py` downloads. The
sizes suit a 2-core CPU, where the run takes 98 s and ends at a val loss of 1.76 (one run); the
lecture's own sizes, for a GPU, are in the comments. spelled_out.py explains the pieces; model.py
and train.py are the fast and general form.

Shapes:  B batch   T time, in tokens   C N_EMBD   hs head size   V vocab_size
"""

import argparse
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

BATCH_SIZE = 16  # 64 in the lecture
BLOCK_SIZE = 64  # 256: the longest context, in tokens
N_EMBD = 96  # 384
N_HEAD = 4  # 6
N_LAYER = 3  # 6
DROPOUT = 0.0  # 0.2: against overfitting, when training sees the text many times
LEARNING_RATE = 3e-3  # 3e-4
N_STEPS = 2000  # 5000
EVAL_INTERVAL = 250  # 500 steps
EVAL_ITERS = 50  # 200 batches of each split
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def get_batch(ids):
    """Random windows of the ids, and for each token of a window the one after it: (B, T) each."""
    offsets = torch.randint(len(ids) - BLOCK_SIZE, (BATCH_SIZE,)).tolist()
    rows = torch.stack([ids[i : i + BLOCK_SIZE + 1] for i in offsets]).to(DEVICE)  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def estimate_loss(model, ids) -> float:
    """Mean loss of random batches, in nats per token."""
    model.eval()  # no dropout
    losses = [model(*get_batch(ids))[1].item() for _ in range(EVAL_ITERS)]
    model.train()
    return sum(losses) / len(losses)


class Head(nn.Module):
    """Causal self-attention: each token takes from itself and those before it."""

    def __init__(self, head_size: int):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(N_EMBD, head_size, bias=False) for _ in range(3)
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("past", torch.ones(BLOCK_SIZE, BLOCK_SIZE).tril().bool())

    def forward(self, x):
        T = x.size(1)
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, hs) each
        scores = q @ k.transpose(1, 2) * k.size(2) ** -0.5  # (B, T, T)
        scores = scores.masked_fill(~self.past[:T, :T], float("-inf"))
        return self.dropout(scores.softmax(dim=2)) @ v  # (B, T, hs)


class MultiHeadAttention(nn.Module):
    """Several heads in parallel; a projection mixes what they found."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(Head(N_EMBD // N_HEAD) for _ in range(N_HEAD))
        self.proj = nn.Linear(N_EMBD, N_EMBD)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        x = torch.cat([head(x) for head in self.heads], dim=2)  # (B, T, C)
        return self.dropout(self.proj(x))


class FeedForward(nn.Sequential):
    """A small network that is applied to each token on its own."""

    def __init__(self):
        expand, project = nn.Linear(N_EMBD, 4 * N_EMBD), nn.Linear(4 * N_EMBD, N_EMBD)
        super().__init__(expand, nn.ReLU(), project, nn.Dropout(DROPOUT))


class Block(nn.Module):
    """Communication, then computation; each reads a normalised x and adds its result to x."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(N_EMBD), nn.LayerNorm(N_EMBD)
        self.attention = MultiHeadAttention()
        self.feed_forward = FeedForward()

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.feed_forward(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, N_EMBD)
        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.ln_f = nn.LayerNorm(N_EMBD)
        self.lm_head = nn.Linear(N_EMBD, vocab_size)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V), mean loss over the targets (B, T)."""
        positions = torch.arange(idx.size(1), device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C) + (T, C)
        logits = self.lm_head(self.ln_f(self.blocks(x)))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, n_tokens: int):
        """Append n_tokens to each row of idx (B, T), drawn one at a time."""
        for _ in range(n_tokens):
            logits, _ = self(idx[:, -BLOCK_SIZE:])
            new = torch.multinomial(logits[:, -1].softmax(dim=1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)  # (B, T + 1)
        return idx


def train(model, train_ids, val_ids) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(N_STEPS + 1):
        if step % EVAL_INTERVAL == 0 or step == N_STEPS:
            losses = estimate_loss(model, train_ids), estimate_loss(model, val_ids)
            print("step {}: train loss {:.4f}, val loss {:.4f}".format(step, *losses), flush=True)
        if step < N_STEPS:
            _, loss = model(*get_batch(train_ids))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path("data/tinyshakespeare.txt")
    parser.add_argument("text", type=Path, nargs="?", default=default, help=f"default: {default}")
    path = parser.parse_args(argv).text
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        text = path.read_text(encoding="utf-8")
        if len(text) <= 10 * BLOCK_SIZE:
            raise ValueError(f"{len(text)} characters are too few for a BLOCK_SIZE of {BLOCK_SIZE}")
    except (OSError, ValueError) as error:
        hint = "python prepare.py downloads Tiny Shakespeare"
        parser.exit(2, f"error: {path}: {getattr(error, 'strerror', error)}; {hint}\n")
    chars = sorted(set(text))  # each distinct character is a token
    ids_of = {char: i for i, char in enumerate(chars)}
    ids = torch.tensor([ids_of[char] for char in text])
    n_train = int(0.9 * len(ids))

    torch.manual_seed(1337)
    model = GPT(len(chars)).to(DEVICE)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, on {DEVICE}")
    train(model, ids[:n_train], ids[n_train:])
    start = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)  # the first of `chars`
    print("".join(chars[i] for i in model.generate(start, 500)[0].tolist()))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C stops it without a traceback
    sys.exit(main(sys.argv[1:]))
