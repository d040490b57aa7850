"""The made-up problems: which there are, how they are written, what carries loss."""

from __future__ import annotations

import itertools
import random
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
from helpers import REPO
from hypothesis import given
from hypothesis import strategies as st

from quill.data import dataset_files, problems, tokenizers


def test_every_sum_is_train_or_val_in_both_orders(monkeypatch):
    monkeypatch.setattr(problems, "N_SUMS_HELD_OUT", 500)
    monkeypatch.setattr(problems, "SUM_DIGITS", 2)
    made = [*problems.addition()]
    parts = {"train": set(), "val": set()}
    for split, prompt, completion in made:
        a, b = map(int, prompt.removesuffix("=").split("+"))
        assert int(completion[::-1]) == a + b
        parts[split].add((a, b))
    assert len(made) == 100**2 and 500 <= len(parts["val"]) <= 501
    assert parts["train"] | parts["val"] == {(a, b) for a in range(100) for b in range(100)}
    assert not parts["train"] & parts["val"]
    assert all((b, a) in part for part in parts.values() for a, b in part)


def test_problems_are_written_with_loss_on_the_answers_alone(sums, call):
    meta, data = dataset_files.read(Path("data/addition"))
    tokenizer = tokenizers.from_json(meta.tokenizer, "meta")
    text = tokenizers.decode(tokenizer, data["val"].tolist())
    answers = tokenizers.decode(tokenizer, data["val"][data["val.mask"] == 1].tolist())
    lines = text.split(tokenizers.END_OF_TEXT)[:-1]
    assert len(lines) in (20, 21) and all(
        eval(f"{line[:3]} == int('{line[4:][::-1]}')") for line in lines
    )
    assert answers == "".join(line[4:] + tokenizers.END_OF_TEXT for line in lines)
    assert call("prepare", "addition")[1].startswith("up to date")


def test_every_calculation_is_right_and_none_of_val_is_in_train(monkeypatch):
    monkeypatch.setattr(problems, "N_CALCULATIONS", 5000)
    parts = {"train": set(), "val": set()}
    for split, prompt, completion in problems.calculator():
        parts[split].add(prompt)
        expected = eval(prompt[:-1].replace("/", "//"))
        assert problems.plain_answer(completion) == str(expected), (prompt, completion)
        assert {*prompt, *completion} <= {*problems.CHARS["calculator"]}
    assert parts["val"] and not parts["train"] & parts["val"]
    assert {prompt.strip("0123456789=") for prompt in parts["val"]} == {*"+-*/"}
    numbers = [re.split(r"[-+*/]", prompt[:-1]) for prompt in parts["train"]]
    long = [(a, b) for a, b in numbers if min(len(a), len(b)) > 4]
    assert sum(a == b for a, b in long) > 10  # close ones
    assert sum(a[1:].strip("0") == "" for a, _ in long) > 50  # repeated digits
    held_out = problems.calculations_held_out(random.Random(problems.SEED))
    assert {f"{a}{operation}{b}=" for a, operation, b in held_out} == parts["val"]


@given(
    st.randoms(use_true_random=False),
    st.sampled_from(problems.CELLS),
    *[st.sampled_from([0.0, 0.3, 1.0])] * 2,
)
def test_a_problem_has_the_lengths_of_its_cell(rng, cell, repeated, close):
    a, operation, b = problems.drawn(rng, cell, repeated, close)
    assert (operation, len(str(a)), len(str(b))) == cell
    assert b > 0 or operation != "/"
    if close == 1 and cell[1] == cell[2] > 1:
        assert abs(a - b) < 10 ** (cell[1] - 1)


def test_repeated_digits_and_close_numbers_come_often():
    rng = random.Random(0)
    numbers = [str(problems.number(rng, 8, repeated=1)) for _ in range(1000)]
    assert sum(len({*number[1:]}) <= 3 for number in numbers) > 500
    assert sum(number == number[0] * 8 for number in numbers) > 100
    assert sum(number[1:] == "0" * 7 for number in numbers) > 100
    drawn = [problems.drawn(rng, ("-", 8, 8), close=1) for _ in range(1000)]
    assert sum(a == b for a, _, b in drawn) > 100
    gaps = Counter(len(str(abs(a - b))) for a, _, b in drawn if a != b)
    assert {*gaps} == {*range(1, 8)} and min(gaps.values()) > 50


def test_a_held_out_problem_counts_in_the_column_of_its_kind():
    for (a, _, b), column in problems.calculations_held_out(random.Random(0)).items():
        n, m = len(str(a)), len(str(b))
        if column == "close":
            assert n == m > 4 and abs(a - b) < 10 ** (n - 1)
        elif column == "repeated":
            assert min(n, m) > 4
        else:
            assert column == str(max(n, m))


def test_the_longest_problem_fits_the_configs_window():
    numbers = [10 ** (n - 1) for n in problems.LENGTHS] + [10**n - 1 for n in problems.LENGTHS]
    config = runpy.run_path(str(REPO / "config" / "calculator.py"))
    n_tokens = 1 + max(
        len("".join(problems.written(a, operation, b)))
        for operation in "+-*/"
        for a, b in itertools.product(numbers, repeat=2)
    )
    assert n_tokens == config["block_size"]


@pytest.mark.parametrize(
    ("a", "operation", "b", "completion"),
    [
        (12, "+", 345, "210+543=753"),
        (300, "-", 345, "003-543:559<540:;45=54-"),
        (345, "-", 345, "543-543:000>:;;0=0"),
        (2841, "-", 2331, "1482-1332:0150>:;510=015"),
        (12, "*", 34, "21*4:84+84,3:063+804,=804"),
        (
            97,
            "/",
            4,
            "40,80,61,23;"  # 4, 8, 16, 32
            "90:77<90:39<90:10>:79<10:2,"  # 9: not 32, not 16, but 8, which leaves 1; not 4
            "71:58<71:10>:39<10:79<10:4,"  # 17: not 32, but 16, which leaves 1
            "=42",
        ),
        (10, "/", 50, "050,001,002,004;010:016<010:018<010:019<010:069<010:0,=0"),
        (3, "/", 10, "010,020,040,080;=0"),
    ],
)
def test_the_scratch_work(a, operation, b, completion):
    assert problems.written(a, operation, b) == (f"{a}{operation}{b}=", completion)
