"""Problems and their answers, made up: what `prepare.py addition` teaches a model.

An answer is written from its last digit on, as one adds on paper: each digit then follows from
digits that are there already, and a carry that has just been made.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

CHARS = "+0123456789="

MOST_DIGITS = 3
N_HELD_OUT = 10_000
SEED = 1337


def addition() -> Iterator[tuple[str, str, str]]:
    """Every a+b of numbers of up to three digits, once: (split, prompt, completion).

    Of two that differ by the order of their numbers, both are train or both are val.
    """
    rng = random.Random(SEED)
    n = 10**MOST_DIGITS
    problems = [(a, b) for a in range(n) for b in range(n)]
    rng.shuffle(problems)
    held_out: set = set()
    for a, b in problems:
        if len(held_out) >= N_HELD_OUT:
            break
        held_out |= {(a, b), (b, a)}
    for split in ("train", "val"):
        for a, b in problems:
            if ((a, b) in held_out) == (split == "val"):
                yield split, f"{a}+{b}=", str(a + b)[::-1]
