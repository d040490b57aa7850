"""Learning to calculate: what counts as right, the table of a run, what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

from model import generate
from quill import arithmetic
from quill.data import dataset, dataset_files, problems, tokenizers
from quill.interop import pretrained
from quill.training.metrics import count_answers
from quill.training.models import Bigram, BigramConfig


def tiny_on(name: str) -> list[str]:
    return [flag for flag in TINY if not flag.startswith("--dataset")] + [f"--dataset={name}"]


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
    sums = [(f"{a}+{b}=", str(a + b)[::-1]) for a in range(6) for b in range(6)]
    both = [
        (split, *problem) for split in dataset_files.SPLITS for problem in sums
    ]  # known by heart
    monkeypatch.setattr(problems, "addition", lambda: both)
    assert call("prepare", "addition")[0] == 0
    flags = tiny_on("addition")
    flags += ["--block_size=11", "--max_iters=60", "--eval_interval=60", "--learning_rate=3e-2"]
    code, out, _ = call("train", *flags)
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert code == 0 and f"{last['val_exact']:.2%} of the answers right" in out
    loaded = pretrained.load("out")
    model = loaded.build().eval()
    _, data = dataset_files.read(Path("data/addition"))
    meta = dataset_files.read_meta(Path("data/addition/meta.json"))
    split = dataset.Split(
        data["val"], data["val.mask"], meta.vocab_size, 11, torch.device("cpu"), Path("x")
    )
    n_right = n = 0
    for start, end in zip(*split.examples, strict=True):
        # Several problems share a row: a later one is read after the others, as in training.
        ids, mask = data["val"][start:end].tolist(), data["val.mask"][start:end].tolist()
        begins = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        for i in begins:
            length = [*mask[i:], 0].index(0)
            steps = generate(model, torch.tensor([ids[:i]]), length, temperature=0.0)
            n_right += [int(step) for step in steps] == ids[i : i + length]
            n += 1
    assert n == len(sums) and 0 < n_right < n
    assert n_right / n == pytest.approx(last["val_exact"])


def test_answers_are_shown_in_plain_order(sums, call, monkeypatch):
    flags = tiny_on("addition")
    assert call("train", *flags, "--max_iters=1")[0] == 0
    argv = ["sample", "--start=1+2=", "--max_new_tokens=6", "--device=cpu"]
    plain = call(*argv, "--num_samples=2")[1].split("---------------")
    loaded = pretrained.load("out")
    assert loaded.reverses_answers
    monkeypatch.setattr(tokenizers.CharTokenizer, "to_json", lambda self: {})
    for kind in ("plain", "as written"):
        if kind == "as written":
            monkeypatch.setattr("quill.sampling.text.plain_answer", lambda completion: completion)
        texts = call(*argv, "--num_samples=2")[1].split("---------------")
        answers = [text.strip().removeprefix("1+2=") for text in texts[:2]]
        if kind == "plain":
            assert texts == plain
            first = answers
    assert [answer.rpartition("=")[2][::-1] for answer in answers] == first


def test_what_is_right_is_counted_by_the_answer(monkeypatch):
    """By a stand-in that knows all answers, but those of numbers that begin with a 7, and does not
    end those that begin with a 6. Its scratch work is always wrong."""
    tokenizer = problems.tokenizer_of("calculator")
    asked = [problems.written(a, "-", 31) for a in range(10, 80)]
    known = {prompt: "0=" + completion.split("=")[1] for prompt, completion in asked}

    def write(decoder, idx, max_new_tokens, temperature):
        prompts = [tokenizers.decode(tokenizer, row.tolist()) for row in idx]
        texts = [known[prompt] if prompt[0] != "7" else "=42" for prompt in prompts]
        rows = [
            [*tokenizer.encode(text), *[tokenizer.end_of_text] * max_new_tokens] for text in texts
        ]
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt[0] == "6":
                row[:max_new_tokens] = tokenizer.encode(known[prompt].rjust(max_new_tokens, "0"))
        yield from torch.tensor([row[:max_new_tokens] for row in rows]).T.tolist()

    monkeypatch.setattr(arithmetic.Decoder, "generate", write)
    model = Bigram(BigramConfig(block_size=1024, vocab_size=21))
    expected = [prompt[0] not in "67" for prompt, _ in asked]
    assert arithmetic.are_right(model, tokenizer, asked) == expected


def test_the_table_has_a_column_for_each_kind_of_numbers(folder, call, monkeypatch):
    cells = [cell for cell in problems.CELLS if max(cell[1:]) <= 2]
    monkeypatch.setattr(problems, "LENGTHS", range(1, 3))
    monkeypatch.setattr(problems, "CELLS", cells)
    monkeypatch.setattr(problems, "N_CALCULATIONS", 500)
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
