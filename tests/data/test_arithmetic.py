"""Learning to add: the problems, what is counted as right, what a person sees."""

from __future__ import annotations

import itertools
import json
import random
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import REPO, TINY
from hypothesis import given
from hypothesis import strategies as st

from model import Bigram, GPTConfig, generate
from quill import arithmetic
from quill.data import dataset, tokenizers
from quill.interop import pretrained
from quill.training.trainer import count_answers


@pytest.fixture
def sums(folder, call, monkeypatch) -> Path:
    """A working folder with the sums of single digits."""
    monkeypatch.setattr(arithmetic, "SUM_DIGITS", 1)
    monkeypatch.setattr(arithmetic, "N_SUMS_HELD_OUT", 20)
    assert call("prepare", "addition")[0] == 0
    return folder


def tiny_on(name: str) -> list[str]:
    return [flag for flag in TINY if not flag.startswith("--dataset")] + [f"--dataset={name}"]


def test_every_sum_is_train_or_val_in_both_orders(monkeypatch):
    monkeypatch.setattr(arithmetic, "N_SUMS_HELD_OUT", 500)
    monkeypatch.setattr(arithmetic, "SUM_DIGITS", 2)
    problems = [*arithmetic.addition()]
    parts = {"train": set(), "val": set()}
    for split, prompt, completion in problems:
        a, b = map(int, prompt.removesuffix("=").split("+"))
        assert int(completion[::-1]) == a + b
        parts[split].add((a, b))
    assert len(problems) == 100**2 and 500 <= len(parts["val"]) <= 501
    assert parts["train"] | parts["val"] == {(a, b) for a in range(100) for b in range(100)}
    assert not parts["train"] & parts["val"]
    assert all((b, a) in part for part in parts.values() for a, b in part)


def test_problems_are_written_with_loss_on_the_answers_alone(sums, call):
    meta, data = dataset.read(Path("data/addition"))
    tokenizer = tokenizers.from_json(meta.tokenizer, "meta")
    text = tokenizers.decode(tokenizer, data["val"].tolist())
    answers = tokenizers.decode(tokenizer, data["val"][data["val.mask"] == 1].tolist())
    lines = text.split(tokenizers.END_OF_TEXT)[:-1]
    assert len(lines) in (20, 21) and all(
        eval(f"{line[:3]} == int('{line[4:][::-1]}')") for line in lines
    )
    assert answers == "".join(line[4:] + tokenizers.END_OF_TEXT for line in lines)
    assert call("prepare", "addition")[1].startswith("up to date")


runs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.booleans()), max_size=4)


@given(st.lists(runs, min_size=1, max_size=3))
def test_an_answer_is_right_when_all_of_it_is(rows):
    """Rows of (tokens without loss, tokens with it, whether one of these is missed)."""
    targets = torch.full((len(rows), 30), -1)
    said = torch.zeros(len(rows), 30, dtype=torch.int64)
    n_right = 0
    for row, answers in enumerate(rows):
        t = 0
        for n_without, n_with, is_missed in answers:
            t += n_without
            targets[row, t : t + n_with] = said[row, t : t + n_with] = 1
            said[row, t + n_with // 2] -= int(is_missed)
            t += n_with
            n_right += not is_missed
    logits = torch.nn.functional.one_hot(said, 2).float()
    assert count_answers(logits, targets).tolist() == [sum(map(len, rows)), n_right]


def test_what_is_counted_is_what_greedy_decoding_writes(folder, call, monkeypatch):
    problems = [(f"{a}+{b}=", str(a + b)[::-1]) for a in range(6) for b in range(6)]
    both = [(split, *problem) for split in dataset.SPLITS for problem in problems]  # known by heart
    monkeypatch.setattr(arithmetic, "addition", lambda: both)
    assert call("prepare", "addition")[0] == 0
    flags = tiny_on("addition")
    flags += ["--block_size=11", "--max_iters=60", "--eval_interval=60", "--learning_rate=3e-2"]
    code, out, _ = call("train", *flags)
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert code == 0 and f"{last['val_exact']:.2%} of the answers right" in out
    loaded = pretrained.load("out")
    model = loaded.build().eval()
    _, data = dataset.read(Path("data/addition"))
    meta = dataset.read_meta(Path("data/addition/meta.json"))
    split = dataset.Split(
        data["val"], data["val.mask"], meta.vocab_size, 11, torch.device("cpu"), Path("x")
    )
    n_right = n = 0
    for start, end in zip(*split.records, strict=True):
        # Several problems share a window: a short one is read behind another, as in training.
        ids, mask = data["val"][start:end].tolist(), data["val.mask"][start:end].tolist()
        begins = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        for i in begins:
            length = [*mask[i:], 0].index(0)
            noise = (torch.zeros(1) for _ in range(length))
            steps = generate(model, torch.tensor([ids[:i]]), noise, temperature=0.0)
            n_right += [int(step) for step in steps] == ids[i : i + length]
            n += 1
    assert n == len(problems) and 0 < n_right < n
    assert n_right / n == pytest.approx(last["val_exact"])


def test_answers_are_shown_in_plain_order(sums, call, monkeypatch):
    flags = tiny_on("addition")
    assert call("train", *flags, "--max_iters=1")[0] == 0
    argv = ["sample", "--start=1+2=", "--max_new_tokens=6", "--device=cpu"]
    plain = call(*argv, "--num_samples=2")[1].split("---------------")
    loaded = pretrained.load("out")
    assert loaded.tokenizer.reverses_answers
    monkeypatch.setattr(tokenizers.CharTokenizer, "to_json", lambda self: {})
    for kind in ("plain", "as written"):
        if kind == "as written":
            monkeypatch.setattr(tokenizers, "plain", lambda completion: completion)
        texts = call(*argv, "--num_samples=2")[1].split("---------------")
        answers = [text.strip().removeprefix("1+2=") for text in texts[:2]]
        if kind == "plain":
            assert texts == plain
            first = answers
    assert [answer.rpartition("=")[2][::-1] for answer in answers] == first


def test_every_calculation_is_right_and_none_of_val_is_in_train(monkeypatch):
    monkeypatch.setattr(arithmetic, "N_CALCULATIONS", 5000)
    parts = {"train": set(), "val": set()}
    for split, prompt, completion in arithmetic.calculator():
        parts[split].add(prompt)
        expected = eval(prompt[:-1].replace("/", "//"))
        assert tokenizers.plain(completion) == str(expected), (prompt, completion)
        assert {*prompt, *completion} <= {*arithmetic.CHARS["calculator"]}
    assert parts["val"] and not parts["train"] & parts["val"]
    assert {prompt.strip("0123456789=") for prompt in parts["val"]} == {*"+-*/"}
    numbers = [re.split(r"[-+*/]", prompt[:-1]) for prompt in parts["train"]]
    long = [(a, b) for a, b in numbers if min(len(a), len(b)) > 4]
    assert sum(a == b for a, b in long) > 10  # close ones
    assert sum(a[1:].strip("0") == "" for a, _ in long) > 50  # repeated digits
    held_out = arithmetic.calculations_held_out(random.Random(arithmetic.SEED))
    assert {f"{a}{operation}{b}=" for a, operation, b in held_out} == parts["val"]


@given(
    st.randoms(use_true_random=False),
    st.sampled_from(arithmetic.CELLS),
    *[st.sampled_from([0.0, 0.3, 1.0])] * 2,
)
def test_a_problem_has_the_lengths_of_its_cell(rng, cell, repeated, close):
    a, operation, b = arithmetic.drawn(rng, cell, repeated, close)
    assert (operation, len(str(a)), len(str(b))) == cell
    assert b > 0 or operation != "/"
    if close == 1 and cell[1] == cell[2] > 1:
        assert abs(a - b) < 10 ** (cell[1] - 1)


def test_repeated_digits_and_close_numbers_come_often():
    rng = random.Random(0)
    numbers = [str(arithmetic.number(rng, 8, repeated=1)) for _ in range(1000)]
    assert sum(len({*number[1:]}) <= 3 for number in numbers) > 500
    assert sum(number == number[0] * 8 for number in numbers) > 100
    assert sum(number[1:] == "0" * 7 for number in numbers) > 100
    problems = [arithmetic.drawn(rng, ("-", 8, 8), close=1) for _ in range(1000)]
    assert sum(a == b for a, _, b in problems) > 100
    gaps = Counter(len(str(abs(a - b))) for a, _, b in problems if a != b)
    assert {*gaps} == {*range(1, 8)} and min(gaps.values()) > 50


def test_a_held_out_problem_counts_in_the_column_of_its_kind():
    for (a, _, b), column in arithmetic.calculations_held_out(random.Random(0)).items():
        n, m = len(str(a)), len(str(b))
        if column == "close":
            assert n == m > 4 and abs(a - b) < 10 ** (n - 1)
        elif column == "repeated":
            assert min(n, m) > 4
        else:
            assert column == str(max(n, m))


def test_the_longest_problem_fits_the_configs_window():
    numbers = [10 ** (n - 1) for n in arithmetic.LENGTHS] + [10**n - 1 for n in arithmetic.LENGTHS]
    config = runpy.run_path(str(REPO / "config" / "calculator.py"))
    n_tokens = 1 + max(
        len("".join(arithmetic.written(a, operation, b)))
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
    assert arithmetic.written(a, operation, b) == (f"{a}{operation}{b}=", completion)


def test_what_is_right_is_counted_by_the_answer(monkeypatch):
    """By a stand-in that knows all answers, but those of numbers that begin with a 7, and does not
    end those that begin with a 6. Its scratch work is always wrong."""
    tokenizer = arithmetic.tokenizer_of("calculator")
    asked = [arithmetic.written(a, "-", 31) for a in range(10, 80)]
    known = {prompt: "0=" + completion.split("=")[1] for prompt, completion in asked}

    def write(model, idx, noise, temperature, vocab_size):
        prompts = [tokenizers.decode(tokenizer, row.tolist()) for row in idx]
        texts = [known[prompt] if prompt[0] != "7" else "=42" for prompt in prompts]
        n_steps = sum(1 for _ in noise)
        rows = [[*tokenizer.encode(text), *[tokenizer.end_of_text] * n_steps] for text in texts]
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt[0] == "6":
                row[:n_steps] = tokenizer.encode(known[prompt].rjust(n_steps, "0"))
        yield from torch.tensor([row[:n_steps] for row in rows]).T

    monkeypatch.setattr("model.generate", write)
    model = Bigram(GPTConfig(model="bigram", vocab_size=21))
    expected = [prompt[0] not in "67" for prompt, _ in asked]
    assert arithmetic.are_right(model, tokenizer, asked) == expected


def test_the_table_has_a_column_for_each_kind_of_numbers(folder, call, monkeypatch):
    cells = [cell for cell in arithmetic.CELLS if max(cell[1:]) <= 2]
    monkeypatch.setattr(arithmetic, "LENGTHS", range(1, 3))
    monkeypatch.setattr(arithmetic, "CELLS", cells)
    monkeypatch.setattr(arithmetic, "N_CALCULATIONS", 500)
    assert call("prepare", "calculator")[0] == 0
    flags = tiny_on("calculator")
    assert call("train", *flags, "--block_size=80", "--max_iters=1", "--vocab_multiple=64")[0] == 0
    code, out, _ = call("arithmetic", "--device=cpu")
    assert code == 0 and out.count(" 0.00%") == 16, "one step is not enough"

    def are_right(model, tokenizer, asked):
        """Wrong are differences that begin with a number of one digit, and those of equal ones."""
        parts = [prompt[:-1].split("-") for prompt, _ in asked]
        return [len(part) < 2 or (len(part[0]) > 1 and part[0] != part[1]) for part in parts]

    monkeypatch.setattr(arithmetic, "are_right", are_right)
    lines = call("arithmetic", "--device=cpu")[1].splitlines()
    assert lines[0].split() == ["digits", "1", "2", "repeated", "close"]
    rows = [line.split()[3:] for line in lines[1:]]
    assert [rows[0], *rows[2:]] == [["100.00%"] * 4] * 3
    assert rows[1][:2] == ["0.00%", "66.39%"]
    assert float(rows[1][3].rstrip("%")) < float(rows[1][2].rstrip("%"))


def test_a_run_that_is_no_calculator_is_refused(sums, call):
    flags = tiny_on("addition")
    assert call("train", *flags, "--max_iters=1")[0] == 0
    code, out, err = call("arithmetic", "--device=cpu")
    assert (code, out) == (2, "") and "out is no run of the calculator" in err
