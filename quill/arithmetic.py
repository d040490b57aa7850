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

from quill import settings
from quill.data.tokenizers import END_OF_TEXT, CharTokenizer, decode, plain
from quill.errors import InputError, run_command
from quill.settings import option

CHARS = {"addition": "+0123456789=", "calculator": "*+,-/0123456789:;<=>"}
SEED = 1337

Problem = tuple[int, str, int]  # a, operation, b

SUM_DIGITS = 3  # of the numbers that `addition` adds, at most
N_SUMS_HELD_OUT = 10_000

CALCULATOR_DIGITS = 8
N_CALCULATIONS = 400_000  # to train on; small numbers occur again and again
N_CELL_HELD_OUT = 40  # of the problems of an operation and two lengths, or a tenth of them
N_REPEATED_HELD_OUT = 15  # more with repeated digits, where both have five digits or more
N_CLOSE_HELD_OUT = 50  # more of close numbers, where both are equally long, too


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
    """a+b, a-b, a*b and a/b (the whole part) of numbers of up to eight digits.

    Random numbers alone do not teach 12345678-12345678 or 70000000*80000000: half of the numbers
    have repeated digits, and a quarter of the pairs of one length are close.
    """
    rng = random.Random(SEED)
    held_out = calculations_held_out(rng)
    n = 0
    while n < N_CALCULATIONS:
        problem = drawn(rng, rng.choice(CELLS), repeated=1 / 2, close=1 / 4)
        if problem not in held_out:
            n += 1
            yield "train", *written(*problem)
    for problem in held_out:
        yield "val", *written(*problem)


def calculations_held_out(rng: random.Random) -> dict[Problem, str]:
    """Each problem and the column of the table that it counts in: the digits of the longer number
    where both are random, else what is special about the two.
    """
    held_out: dict = {}
    for cell in CELLS:
        _, n, m = cell
        n_problems = 9**2 * 10 ** (n + m - 2)
        for _ in range(min(N_CELL_HELD_OUT, n_problems // 10)):
            held_out.setdefault(drawn(rng, cell), str(max(n, m)))
        if min(n, m) > max(LENGTHS) // 2:
            for _ in range(N_REPEATED_HELD_OUT):
                held_out.setdefault(drawn(rng, cell, repeated=1), "repeated")
            for _ in range(N_CLOSE_HELD_OUT if n == m else 0):
                held_out.setdefault(drawn(rng, cell, close=1), "close")
    return held_out


def drawn(
    rng: random.Random, cell: tuple[str, int, int], repeated: float = 0, close: float = 0
) -> Problem:
    """A problem of the cell. `repeated`: see number(). `close`: how probable it is that numbers of
    the same length differ by one of fewer digits, or not at all.
    """
    operation, n, m = cell
    a, b = number(rng, n, repeated), number(rng, m, repeated)
    if n == m and rng.random() < close:
        gap = number(rng, rng.randrange(n))
        b = rng.choice([near for near in (a - gap, a + gap) if len(str(near)) == n])
    if operation == "/":
        b = max(b, 1)
    return a, operation, b


def number(rng: random.Random, n_digits: int, repeated: float = 0) -> int:
    """`repeated`: how probable it is that the last digits, in half of the cases all of them, are
    drawn from one to three alone, often 0, as in 77777777, 40000000 or 1231212.
    """
    digits = rng.choices("0123456789", k=n_digits)
    if rng.random() < repeated:
        n_first = max(0, rng.randrange(-n_digits, n_digits))  # that stay as they are
        few = rng.choices("0" * 9 + "123456789", k=rng.choice((1, 1, 2, 3)))
        digits[n_first:] = rng.choices(few, k=n_digits - n_first)
    if n_digits > 1 and digits[0] == "0":
        digits[0] = rng.choice("123456789")
    return int("".join(digits) or 0)


def written(a: int, operation: str, b: int) -> tuple[str, str]:
    """-> prompt, completion."""
    work = {"+": adding, "-": subtracting, "*": multiplying, "/": dividing}[operation]
    return f"{a}{operation}{b}=", "=".join(work(a, b))


def backwards(value: int, width: int = 0) -> str:
    return str(value).zfill(width)[::-1]


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
    """Both numbers aligned and their difference; then its size from the first digit on, with a ;
    for each leading zero, to know where the answer will end: 2841-2331 is 1482-1332:0150>:;510=015.

    Below zero, the size comes before that from its last digit on: 300-345 leaves 955, which stands
    for 955 - 1000 = -45, and is 003-543:559<540:;45=54-.
    """
    digits, others = aligned(a, b)
    width, size = len(digits), abs(a - b)
    work = f"{digits}-{others}:{difference(a, b, width)}"
    if a < b:
        work += backwards(size, width)
    work += ":" + str(size).rjust(width, ";")
    return work, backwards(size) + ("-" if a < b else "")


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
    from quill.interop import pretrained
    from quill.training import devices

    device = devices.pick_device(config.device)
    loaded = pretrained.from_folder(Path(config.out_dir))
    if loaded.tokenizer.to_json() != tokenizer_of("calculator").to_json():
        raise InputError(
            f"{config.out_dir} is no run of the calculator: see `prepare.py calculator`"
        )
    model = loaded.build().eval().to(device)
    held_out = calculations_held_out(random.Random(SEED))
    columns = [*dict.fromkeys(held_out.values())]
    print("digits " + "".join(f"{column:>9}" for column in columns), flush=True)
    for operation in "+-*/":
        row: dict = {column: [] for column in columns}
        asked = [problem for problem in held_out if problem[1] == operation]
        for problem, is_right in answered(model, loaded.tokenizer, asked):
            row[held_out[problem]].append(is_right)
        shares = "".join(f"{fmean(right):9.2%}" for right in row.values())
        print(f"a {operation} b  {shares}", flush=True)
    return 0


def answered(model, tokenizer, asked: list[Problem]) -> Iterator[tuple[Problem, bool]]:
    """Each problem, in some order, and whether its answer is right."""
    batches: dict = {}  # by the length of their prompts
    for problem in asked:
        prompt, completion = written(*problem)
        batches.setdefault(len(prompt), {})[problem] = prompt, completion
    for batch in batches.values():
        yield from zip(batch, are_right(model, tokenizer, [*batch.values()]), strict=True)


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
    run_command(main)
