"""Made-up problems with their answers: the datasets `addition` and `calculator` of prepare.py.

An answer is written from its last digit on, as one adds on paper: each digit then follows from
digits that are already there and from the last carry. The calculator's completions begin with
scratch work, so that each step is a small one; the answer comes after the last "=".
"""

import random
from collections.abc import Iterator

from quill.data.tokenizers import CharTokenizer

CHARS = {"addition": "+0123456789=", "calculator": "*+,-/0123456789:;<=>"}
SEED = 1337

Problem = tuple[int, str, int]  # a, operation, b
Cell = tuple[str, int, int]  # operation, and the lengths of a and b

SUM_DIGITS = 3  # of the numbers that `addition` adds, at most
N_SUMS_HELD_OUT = 10_000

LENGTHS = range(1, 9)  # of the numbers that `calculator` calculates with
CELLS = [(operation, n, m) for operation in "+-*/" for n in LENGTHS for m in LENGTHS]
N_CALCULATIONS = 400_000  # to train on; small numbers occur again and again
N_CELL_HELD_OUT = 40  # for an operation and two lengths, or a tenth of these problems
N_REPEATED_HELD_OUT = 15  # more with repeated digits, where both numbers have five or more
N_CLOSE_HELD_OUT = 50  # more of close numbers, where both are also of one length


def problems(name: str) -> Iterator[tuple[str, str, str]]:
    """(split, prompt, completion), always the same; no problem of val is one of train."""
    return {"addition": addition, "calculator": calculator}[name]()


def tokenizer_of(name: str) -> CharTokenizer:
    return CharTokenizer(CHARS[name], ends_texts=True)


def reverses_answers(spec: dict) -> bool:
    """Whether completions are written as here; spec: the tokenizer in meta.json or a checkpoint."""
    return spec.get("reverses_answers") is True


def plain_answer(completion: str) -> str:
    """The answer as a person reads it: what comes after the last "=", if any, in plain order."""
    return completion.rpartition("=")[2][::-1]


def addition() -> Iterator[tuple[str, str, str]]:
    """Every a+b of numbers of up to three digits, once; a+b and b+a are in the same split."""
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


def calculator() -> Iterator[tuple[str, str, str]]:
    """a+b, a-b, a*b and a/b (the whole part) of numbers of up to eight digits.

    Uniformly random numbers do not teach 12345678-12345678 or 70000000*80000000, so half of the
    numbers have repeated digits, and a quarter of the pairs of one length are close.
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
    """Each problem, and its column in the table of quill.arithmetic: the number of digits of the
    longer number where both are random, else what is special about them.
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


def drawn(rng: random.Random, cell: Cell, repeated: float = 0, close: float = 0) -> Problem:
    """A random problem of the cell. repeated: see `number`. close: the probability that numbers of
    the same length are equal, or differ by a number of fewer digits.
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
    """repeated: the probability that the last digits, half of the time all of them, are drawn from
    only one to three different ones, often 0, as in 77777777, 40000000 or 1231212.
    """
    digits = rng.choices("0123456789", k=n_digits)
    if rng.random() < repeated:
        n_first = max(0, rng.randrange(-n_digits, n_digits))  # which stay as they are
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
    """Both numbers from their last digits on, padded with zeros to the same length."""
    width = max(len(str(a)), len(str(b)))
    return backwards(a, width), backwards(b, width)


def adding(a: int, b: int) -> tuple[str, str]:
    """Both numbers aligned: 12+345 is 210+543=753."""
    return "+".join(aligned(a, b)), backwards(a + b)


def difference(a: int, b: int, width: int) -> str:
    """The last `width` digits of a - b, and a mark: < if a - b is below zero.

    The mark follows from the last borrow, so the numbers need not be compared first.
    """
    return backwards((a - b) % 10**width, width) + ("<" if a < b else ">")


def subtracting(a: int, b: int) -> tuple[str, str]:
    """Both numbers aligned and their difference; then its absolute value from the first digit on,
    with a ; for each leading zero, which shows where the answer ends: 2841-2331 is
    1482-1332:0150>:;510=015.

    Below zero, the absolute value from its last digit on comes before that: 300-345 gives 955,
    which stands for 955 - 1000 = -45, and is 003-543:559<540:;45=54-.
    """
    digits, others = aligned(a, b)
    width, size = len(digits), abs(a - b)
    work = f"{digits}-{others}:{difference(a, b, width)}"
    if a < b:
        work += backwards(size, width)
    return f"{work}:{str(size).rjust(width, ';')}", backwards(a - b)


def multiplying(a: int, b: int) -> tuple[str, str]:
    """One digit of b after the other, with the sum so far: 12*34 is 21*4:84+84,3:063+804,=804."""
    work, total = f"{backwards(a)}*", 0
    for place, digit in enumerate(backwards(b)):
        total += a * int(digit) * 10**place
        work += f"{digit}:{'0' * place}{backwards(a * int(digit))}+{backwards(total)},"
    return work, backwards(total)


def dividing(a: int, b: int) -> tuple[str, str]:
    """Long division. No digit is guessed: first b, 2b, 4b and 8b are written down, then 8b, 4b, 2b
    and b are subtracted in turn, and the rest is restored where that is below zero.

    97/4 is 40,80,61,23;90:77<90:39<90:10>:79<10:2,71:58<71:10>:39<10:79<10:4,=42.
    """
    width = len(str(b)) + 1
    multiples = [times * b for times in (1, 2, 4, 8)]
    work = ",".join(backwards(multiple, width) for multiple in multiples) + ";"
    digits = str(a)
    n_first = width - 2  # these digits of a are fewer than those of b
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
