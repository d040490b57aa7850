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
from statistics import fmean

import numpy as np

import settings
from errors import InputError, run_script
from settings import option
from tokenizer import END_OF_TEXT, CharTokenizer, decode, plain

CHARS = {"addition": "+0123456789=", "calculator": "*+,-/0123456789:;<=>"}
SEED = 1337

SUM_DIGITS = 3  # of the numbers that `addition` adds, at most
N_SUMS_HELD_OUT = 10_000

CALCULATOR_DIGITS = 8
N_CALCULATIONS = 400_000  # to train on; small numbers occur again and again
N_CELL_HELD_OUT = 50  # of the problems of an operation and two lengths, or a tenth of them


def problems(name: str) -> Iterator[tuple[str, str, str]]:
    """(split, prompt, completion), always the same; no problem of val is one of train."""
    return {"addition": addition, "calculator": calculator}[name]()


def tokenizer_of(name: str) -> CharTokenizer:
    return CharTokenizer(CHARS[name], ends_texts=True, reverses_answers=True)


def addition() -> Iterator[tuple[str, str, str]]:
    """Every a+b of numbers of up to three digits, once.

    Of two that differ by the order of their numbers, both are train or both are val.
    """
    rng = random.Random(SEED)
    n = 10**SUM_DIGITS
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

LENGTHS = range(1, CALCULATOR_DIGITS + 1)
CELLS = [(operation, n, m) for operation in "+-*/" for n in LENGTHS for m in LENGTHS]


def calculator() -> Iterator[tuple[str, str, str]]:
    """a+b, a-b, a*b and a/b (the whole part) of numbers of up to eight digits."""
    rng = random.Random(SEED)
    held_out = calculations_held_out(rng)
    n = 0
    while n < N_CALCULATIONS:
        problem = drawn(rng, rng.choice(CELLS))
        if problem not in held_out:
            n += 1
            yield "train", *written(*problem)
    for problem in held_out:
        yield "val", *written(*problem)


def calculations_held_out(rng: random.Random) -> dict[tuple[int, str, int], bool]:
    """An ordered set, of every cell about as many."""
    held_out: dict = {}
    for cell in CELLS:
        n_problems = 9**2 * 10 ** (cell[1] + cell[2] - 2)
        for _ in range(min(N_CELL_HELD_OUT, n_problems // 10)):
            held_out[drawn(rng, cell)] = True
    return held_out


def drawn(rng: random.Random, cell: tuple[str, int, int]) -> tuple[int, str, int]:
    operation, n, m = cell
    a = rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)
    b = rng.randrange(10 ** (m - 1) if m > 1 or operation == "/" else 0, 10**m)
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


def difference(a: int, b: int, width: int) -> str:
    """a - b with a mark: < if that went below zero, when a 1 was borrowed that is not there.

    The mark is known once all digits are, so the numbers need not be compared first.
    """
    return backwards((a - b) % 10**width, width) + ("<" if a < b else ">")


def subtracting(a: int, b: int) -> tuple[str, str]:
    """Both numbers aligned, and their difference, from which the answer is read: 12-345 is
    210-543:766<=333-, for 667 stands for 667 - 1000.
    """
    digits, others = aligned(a, b)
    work = f"{digits}-{others}:{difference(a, b, len(digits))}"
    return work, backwards(abs(a - b)) + ("-" if a < b else "")


def multiplying(a: int, b: int) -> tuple[str, str]:
    """By one digit after the other, with the sum so far: 12*34 is 21*4:84+84,3:063+804,=804."""
    work, total = f"{backwards(a)}*", 0
    for place, digit in enumerate(backwards(b)):
        total += a * int(digit) * 10**place
        work += f"{digit}:{'0' * place}{backwards(a * int(digit))}+{backwards(total)},"
    return work, backwards(total)


def dividing(a: int, b: int) -> tuple[str, str]:
    """Long division. No digit is guessed: 8, 4, 2 and 1 times b are taken away in turn, and put
    back where that went below zero, after b, 2b, 4b and 8b have been written down.

    97/4 is 40,80,61,23;90:77<90:39<90:10>:79<10:2,71:58<71:10>:39<10:79<10:4,=42.
    """
    width = len(str(b)) + 1
    multiples = [times * b for times in (1, 2, 4, 8)]
    work = ",".join(backwards(multiple, width) for multiple in multiples) + ";"
    digits = str(a)
    n_first = len(str(b)) - 1  # digits of a, too few to hold b even once
    rest = int(digits[:n_first] or 0)
    for digit in digits[n_first:]:
        rest = 10 * rest + int(digit)
        work += backwards(rest, width)
        quotient = rest // b
        for multiple in reversed(multiples):
            work += f":{difference(rest, multiple, width)}"
            if rest >= multiple:
                rest -= multiple
            else:
                work += backwards(rest, width)
        work += f":{quotient},"
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
    if loaded.tokenizer.to_json() != tokenizer_of("calculator").to_json():
        raise InputError(
            f"{config.out_dir} is no run of the calculator: see `prepare.py calculator`"
        )
    model = loaded.build().eval().to(device)
    print("digits " + "".join(f"{n:9}" for n in LENGTHS), flush=True)
    lowest = []
    for operation in "+-*/":
        row: dict = {n: [] for n in LENGTHS}
        for (n, m), right in answered(model, loaded.tokenizer, operation).items():
            row[max(n, m)] += right
            lowest.append((fmean(right), f"a {operation} b with {n} and {m} digits"))
        shares = "".join(f"{fmean(right):9.2%}" for right in row.values())
        print(f"a {operation} b  {shares}", flush=True)
    print("lowest: {:.1%}, {}".format(*min(lowest)))
    return 0


def answered(model, tokenizer, operation: str) -> dict[tuple[int, int], list[bool]]:
    """By the lengths of both numbers: which held-out problems are right."""
    batches: dict = {}  # their prompts are of one length
    for a, other, b in calculations_held_out(random.Random(SEED)):
        if other == operation:
            cell = len(str(a)), len(str(b))
            batches.setdefault(sum(cell), []).append((cell, written(a, operation, b)))
    cells: dict = {}
    for batch in batches.values():
        asked = [problem for _, problem in batch]
        for (cell, _), is_right in zip(batch, are_right(model, tokenizer, asked), strict=True):
            cells.setdefault(cell, []).append(is_right)
    return cells


def are_right(model, tokenizer, asked: list[tuple[str, str]]) -> list[bool]:
    """Of (prompt, completion) pairs, by greedy decoding; the prompts are of one length."""
    import torch

    from model import generate

    device = next(model.parameters()).device
    idx = np.stack([tokenizer.encode(prompt) for prompt, _ in asked]).astype(np.int64)
    longest = max(len(completion) for _, completion in asked) + 1
    noise = (torch.zeros(len(asked), device=device) for _ in range(longest))
    steps = generate(
        model,
        torch.from_numpy(idx).to(device),
        noise,
        temperature=0.0,
        vocab_size=tokenizer.vocab_size,
    )
    rows = torch.stack([*steps], dim=1).tolist()  # (N, longest)
    answers = [decode(tokenizer, ids).partition(END_OF_TEXT) for ids in rows]
    return [
        end != "" and plain(text) == plain(completion)
        for (text, end, _), (_, completion) in zip(answers, asked, strict=True)
    ]


if __name__ == "__main__":
    run_script(main)
