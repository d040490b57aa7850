"""Problems and their answers, made up: the datasets `addition` and `calculator` of prepare.py.

An answer is written from its last digit on, as one adds on paper: each digit then follows from
digits that are there already, and a carry that has just been made. The calculator's completions
begin with scratch work, so that each step is a small one; the answer stands behind the last "=".

Usage, to see how much of the calculator's held-out problems a run has right:
    python arithmetic.py --out_dir=out
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import settings
from errors import InputError, run_script
from settings import option

CHARS = {"addition": "+0123456789=", "calculator": "*+,-/0123456789:<=>"}
SEED = 1337
MOST_DIGITS = 3

N_SUMS_HELD_OUT = 10_000
N_CALCULATIONS = 400_000  # to train on; small numbers occur again and again
N_CELL_HELD_OUT = 150  # of the problems of an operation and two lengths, or a tenth of them


def problems(name: str) -> Iterator[tuple[str, str, str]]:
    """(split, prompt, completion), always the same; no problem of val is one of train."""
    return {"addition": addition, "calculator": calculator}[name]()


def addition() -> Iterator[tuple[str, str, str]]:
    """Every a+b of numbers of up to three digits, once.

    Of two that differ by the order of their numbers, both are train or both are val.
    """
    rng = random.Random(SEED)
    n = 10**MOST_DIGITS
    sums = [(a, b) for a in range(n) for b in range(n)]
    rng.shuffle(sums)
    held_out: set = set()
    for a, b in sums:
        if len(held_out) >= N_SUMS_HELD_OUT:
            break
        held_out |= {(a, b), (b, a)}
    for split in ("train", "val"):
        for a, b in sums:
            if ((a, b) in held_out) == (split == "val"):
                yield split, f"{a}+{b}=", backwards(a + b)


# ---- the calculator ----------------------------------------------------------------------------

LENGTHS = range(1, MOST_DIGITS + 1)
CELLS = [(operation, n, m) for operation in "+-*/" for n in LENGTHS for m in LENGTHS]
WEIGHTS = [2 if operation in "*/" else 1 for operation, _, _ in CELLS]  # these need more practice


def calculator() -> Iterator[tuple[str, str, str]]:
    """a+b, a-b, a*b and a/b (the whole part) of numbers of up to three digits."""
    rng = random.Random(SEED)
    held_out: dict = {}
    for cell in CELLS:
        n_problems = 9**2 * 10 ** (cell[1] + cell[2] - 2)
        for _ in range(min(N_CELL_HELD_OUT, n_problems // 10)):
            held_out[drawn(rng, cell)] = True
    n = 0
    while n < N_CALCULATIONS:
        (cell,) = rng.choices(CELLS, WEIGHTS)
        problem = drawn(rng, cell)
        if problem not in held_out:
            n += 1
            yield "train", *written(*problem)
    for problem in held_out:
        yield "val", *written(*problem)


def drawn(rng: random.Random, cell: tuple[str, int, int]) -> tuple[int, str, int]:
    operation, n, m = cell
    a = rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)
    b = rng.randrange(10 ** (m - 1) if m > 1 else operation == "/", 10**m)
    return a, operation, b


def written(a: int, operation: str, b: int) -> tuple[str, str]:
    """-> prompt, completion."""
    work = {"+": adding, "-": subtracting, "*": multiplying, "/": dividing}[operation]
    return f"{a}{operation}{b}=", "=".join(work(a, b))


def backwards(number: int, width: int = 0) -> str:
    return str(number).zfill(width)[::-1]


def aligned(a: int, b: int) -> tuple[str, str]:
    """Both from their last digits on, and as long as each other."""
    width = max(len(str(a)), len(str(b)))
    return backwards(a, width), backwards(b, width)


def adding(a: int, b: int) -> tuple[str, str]:
    """Both numbers aligned: 12+345 is 210+543=753."""
    return "+".join(aligned(a, b)), backwards(a + b)


def subtracting(a: int, b: int) -> tuple[str, str]:
    """The same, and which is larger: 12-345 is 210-543<=333-."""
    work = "-".join(aligned(a, b))
    answer = backwards(abs(a - b))
    return (f"{work}<", f"{answer}-") if a < b else (f"{work}>", answer)


def multiplying(a: int, b: int) -> tuple[str, str]:
    """By one digit after the other, with the sum so far: 12*34 is 21*4:84+84,3:063+804,=804."""
    work, total = f"{backwards(a)}*", 0
    for place, digit in enumerate(backwards(b)):
        total += a * int(digit) * 10**place
        work += f"{digit}:{'0' * place}{backwards(a * int(digit))}+{backwards(total)},"
    return work, backwards(total)


def dividing(a: int, b: int) -> tuple[str, str]:
    """Long division, a digit at a time: 97/4 is 9:2*8-1,17:4*16-1,=42."""
    work, rest = "", 0
    for digit in str(a):
        part = 10 * rest + int(digit)
        rest = part % b
        work += f"{part}:{part // b}*{part - rest}-{rest},"
    return work, backwards(a // b)


# ---- how much is right -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    out_dir: str = option("out", "the run's folder: its best.pt is used, else its ckpt.pt")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


def main(argv: list[str]) -> int:
    config = settings.load(MeasureConfig, argv, usage=__doc__)
    import pretrained
    import runtime

    device = runtime.pick_device(config.device)
    loaded = pretrained.from_folder(Path(config.out_dir))
    if not loaded.tokenizer.reverses_answers:
        raise InputError(f"{config.out_dir} is no run that calculates: see `prepare.py calculator`")
    model = loaded.build().eval().to(device)
    cells: dict = {}
    for split, prompt, completion in problems("calculator"):
        if split == "val":
            operation = next(char for char in prompt if not char.isdigit())
            a, b = prompt[:-1].split(operation)
            cells.setdefault((operation, len(a), len(b)), []).append((prompt, completion))
    print("digits" + "".join(f"{f'{n} and {m}':>9}" for n in LENGTHS for m in LENGTHS))
    for operation in "+-*/":
        row = [cells[operation, n, m] for n in LENGTHS for m in LENGTHS]
        shares = (share_right(model, loaded.tokenizer, asked) for asked in row)
        print(f"a {operation} b " + "".join(f"{share:9.1%}" for share in shares), flush=True)
    return 0


def share_right(model, tokenizer, asked: list[tuple[str, str]]) -> float:
    """Of (prompt, completion) pairs, by greedy decoding; the prompts are of one length."""
    import numpy as np
    import torch

    from model import generate
    from tokenizer import decode, plain

    device = next(model.parameters()).device
    idx = np.stack([tokenizer.encode(prompt) for prompt, _ in asked]).astype(np.int64)
    longest = max(len(completion) for _, completion in asked) + 1
    noise = (torch.zeros(len(asked), device=device) for _ in range(longest))
    steps = generate(model, torch.from_numpy(idx).to(device), noise, temperature=0.0)
    answers = torch.stack([*steps], dim=1).tolist()  # (N, longest)
    n_right = 0
    for ids, (_, completion) in zip(answers, asked, strict=True):
        end = ids.index(tokenizer.end_of_text) if tokenizer.end_of_text in ids else 0
        n_right += plain(decode(tokenizer, ids[:end])) == plain(completion)
    return n_right / len(asked)


if __name__ == "__main__":
    run_script(main)
