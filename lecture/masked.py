"""An encoder alone: it reads a text in both directions and fills in characters that are masked.

    python lecture/masked.py [TEXT] [--seed N]

BERT (Devlin et al. 2019) is trained like this. A decoder can only use what stands before a
character. An encoder uses both sides, so it fills gaps better, but it cannot write a text. Beside
it stands what counting can do: a two-sided n-gram, which looks up two characters on either side.

TEXT is a UTF-8 file, by default data/tinyshakespeare.txt, which `python prepare.py` downloads. The
blocks are PyTorch's, which encoder_decoder.py spells out.

Shapes:  B batch   T time, in characters   V vocabulary   N any number
"""

import argparse
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

BATCH_SIZE, T, N_STEPS, LEARNING_RATE = 32, 65, 3000, 3e-3
C, N_HEAD, N_LAYER = 128, 4, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GAP = 3  # every third character is masked: two that can be seen stand on either side


class Encoder(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.mask = vocab_size  # a token of its own
        self.tokens, self.positions = nn.Embedding(vocab_size + 1, C), nn.Embedding(T, C)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # from PyTorch's 1 on it learns far slower
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(C, N_HEAD, 4 * C, **options) for _ in range(N_LAYER))
        )
        self.ln, self.lm_head = nn.LayerNorm(C), nn.Linear(C, vocab_size)

    def forward(self, idx, is_masked):
        """idx (B, T), is_masked (B, T) -> scores of what stands behind each mask (N, V)."""
        x = self.tokens(idx.masked_fill(is_masked, self.mask)) + self.positions.weight
        return self.lm_head(self.ln(self.blocks(x)[is_masked]))


def masks(n_rows: int, offset: int):
    """(n_rows, T): from the offset on, 0 <= offset < GAP, every GAP-th character."""
    is_masked = torch.zeros(n_rows, T, dtype=torch.bool, device=DEVICE)
    is_masked[:, offset::GAP] = True
    is_masked[:, :2] = is_masked[:, -2:] = False  # two characters are left on either side
    return is_masked


def train(model: Encoder, ids, n_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.1, anneal_strategy="linear"
    )
    for step in range(1, n_steps + 1):
        offsets = torch.randint(len(ids) - T, (BATCH_SIZE,)).tolist()
        idx = torch.stack([ids[i : i + T] for i in offsets])
        is_masked = masks(BATCH_SIZE, int(torch.randint(GAP, ())))
        loss = F.cross_entropy(model(idx, is_masked), idx[is_masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def held_out(ids):
    """Windows side by side, (N, T), with their masks."""
    idx = ids[: len(ids) // T * T].view(-1, T)
    return idx, masks(len(idx), GAP // 2)


@torch.no_grad()
def encoder_loss(model: Encoder, ids) -> float:
    """Nats per masked character of the held-out text."""
    idx, is_masked = held_out(ids)
    parts = zip(idx.split(512), is_masked.split(512), strict=True)
    losses = [F.cross_entropy(model(a, b), a[b], reduction="sum") for a, b in parts]
    return (sum(losses) / is_masked.sum()).item()


# ---- counting ------------------------------------------------------------------------------------


def contexts(text: list[int], i: int) -> list[tuple]:
    """What may be known of character i, from nothing to the two characters on either side."""
    left, right = tuple(text[i - 2 : i]), tuple(text[i + 1 : i + 3])
    return [(), (left[1:], right[:1]), (left, right[:1]), (left, right)]


def ngram_loss(train_ids: list[int], idx, is_masked, vocab_size: int) -> float:
    """Nats per masked character, of counts that are smoothed by those of the shorter context.

    Of Witten & Bell, 1991: the shorter context weighs as much as the longer one has had different
    characters, each of which was once a surprise.
    """
    counts, totals, kinds = Counter(), Counter(), Counter()
    for i in range(2, len(train_ids) - 2):
        for context in contexts(train_ids, i):
            counts[context, train_ids[i]] += 1
            totals[context] += 1
            kinds[context] += counts[context, train_ids[i]] == 1
    log_probs = []
    for row, place in is_masked.nonzero().tolist():
        text = idx[row].tolist()
        prob = 1 / vocab_size
        for context in contexts(text, place):
            if totals[context]:
                new = kinds[context]
                prob = (counts[context, text[place]] + new * prob) / (totals[context] + new)
        log_probs.append(torch.tensor(prob).log())
    return -torch.stack(log_probs).mean().item()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path("data/tinyshakespeare.txt")
    parser.add_argument("text", type=Path, nargs="?", default=default, help=f"default: {default}")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and batches")
    parser.add_argument("--steps", type=int, default=N_STEPS, help=f"of training ({N_STEPS})")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.exit(2, f"error: --steps={args.steps}: at least 1\n")
    try:
        if args.text.exists() and not args.text.is_file():
            raise ValueError("it is no regular file")
        text = args.text.read_text(encoding="utf-8")
        if len(text) < 100 * T:
            raise ValueError(f"{len(text)} characters are too few, take at least {100 * T}")
    except (OSError, ValueError) as error:
        hint = "python prepare.py downloads Tiny Shakespeare"
        parser.exit(2, f"error: {args.text}: {getattr(error, 'strerror', error)}; {hint}\n")
    chars = sorted(set(text))
    ids_of = {char: i for i, char in enumerate(chars)}
    ids = torch.tensor([ids_of[char] for char in text], device=DEVICE)
    n_train = int(0.9 * len(ids))
    torch.manual_seed(args.seed)
    counted = ngram_loss(ids[:n_train].tolist(), *held_out(ids[n_train:]), len(chars))
    print(f"two-sided n-gram, counted: {counted:.4f} nats per masked character", flush=True)
    model = Encoder(len(chars)).to(DEVICE)
    print(f"encoder of {sum(p.numel() for p in model.parameters()):,} parameters:")
    train(model, ids[:n_train], args.steps)
    print(f"encoder: {encoder_loss(model, ids[n_train:]):.4f} nats per masked character")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C stops it without a traceback
    sys.exit(main(sys.argv[1:]))
