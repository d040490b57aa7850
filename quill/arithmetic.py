"""A table of how many of the calculator's held-out problems a run answers right.

Usage:
    python -m quill.arithmetic --out_dir=out
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from quill import settings
from quill.data import problems
from quill.data.problems import Problem, plain_answer
from quill.data.tokenizers import END_OF_TEXT, decode
from quill.errors import InputError, reader_may_leave, run_command
from quill.interop import pretrained
from quill.sampling.decoder import Decoder
from quill.settings import option
from quill.training import devices


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    out_dir: str = option("out", "the run's folder: its best.pt is used, else its ckpt.pt")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


def main(argv: list[str]) -> int:
    config = settings.load(MeasureConfig, argv, usage=__doc__)
    device = devices.pick_device(config.device)
    loaded = pretrained.from_folder(Path(config.out_dir))
    tokenizer = problems.tokenizer_of("calculator")
    if loaded.tokenizer.to_json() != tokenizer.to_json() or not loaded.reverses_answers:
        raise InputError(f"{config.out_dir} is no run of the calculator: see docs/lecture.md")
    model = loaded.build().eval().to(device)
    held_out = problems.calculations_held_out(random.Random(problems.SEED))
    columns = [*dict.fromkeys(held_out.values())]
    with reader_may_leave():
        print("digits " + "".join(f"{column:>9}" for column in columns), flush=True)
        for operation in "+-*/":
            row: dict = {column: [] for column in columns}
            asked = [problem for problem in held_out if problem[1] == operation]
            for problem, is_right in answered(model, tokenizer, asked):
                row[held_out[problem]].append(is_right)
            cells = "".join(f"{fmean(right):9.2%}" for right in row.values())
            print(f"a {operation} b  {cells}", flush=True)
    return 0


def answered(model, tokenizer, asked: list[Problem]) -> Iterator[tuple[Problem, bool]]:
    """Each problem, in some order, and whether its answer is right."""
    batches: dict = {}  # by the length of their prompts
    for problem in asked:
        prompt, completion = problems.written(*problem)
        batches.setdefault(len(prompt), {})[problem] = prompt, completion
    for batch in batches.values():
        yield from zip(batch, are_right(model, tokenizer, [*batch.values()]), strict=True)


def are_right(model, tokenizer, asked: list[tuple[str, str]]) -> list[bool]:
    """For (prompt, completion) pairs, by greedy decoding; the prompts must have the same length."""
    device = next(model.parameters()).device
    idx = np.stack([tokenizer.encode(prompt) for prompt, _ in asked]).astype(np.int64)
    longest = max(len(completion) for _, completion in asked) + 1  # with the end of the text
    decoder = Decoder(model, tokenizer.vocab_size)
    steps = decoder.generate(torch.from_numpy(idx).to(device), longest, temperature=0.0)
    rows = zip(*steps, strict=True)  # N of length `longest`
    answers = [decode(tokenizer, ids).partition(END_OF_TEXT) for ids in rows]
    return [
        end != "" and plain_answer(text) == plain_answer(completion)
        for (text, end, _), (_, completion) in zip(answers, asked, strict=True)
    ]


if __name__ == "__main__":
    run_command(main)
