"""Pairs of completions of which one is preferred: {"prompt", "chosen", "rejected"} in a .jsonl."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from quill.data.dataset import shuffled_epoch
from quill.data.tokenizers import Tokenizer
from quill.errors import InputError, blames_input
from quill.files import open_file

NAMES = ("prompt", "chosen", "rejected")
HELD_OUT = 10  # one pair of so many, the last ones of the file


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Token ids, N arrays each."""

    prompts: list[np.ndarray]
    chosen: list[np.ndarray]
    rejected: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, places) -> "Pairs":
        columns = (self.prompts, self.chosen, self.rejected)
        return Pairs(*([column[i] for i in places] for column in columns))

    def draw(self, n: int, seed: int, step: int) -> "Pairs":
        """The n pairs of a step: a function of seed and step alone."""
        epochs, places = np.divmod(step * n + np.arange(n), len(self))
        orders = {epoch: shuffled_epoch(len(self), 1, seed, int(epoch))[0] for epoch in {*epochs}}
        return self.part([orders[e][place] for e, place in zip(epochs, places, strict=True)])


def read(path: Path, tokenizer: Tokenizer, block_size: int) -> tuple[Pairs, Pairs]:
    """-> those to train on, and those held out. A completion ends with the tokenizer's end of text.

    Raises InputError, with the line's number, for what is no pair or does not fit into a window.
    """
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    pairs = Pairs([], [], [])
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            kinds = ValueError, TypeError, KeyError, InputError, RecursionError
            with blames_input(f"{path}, line {number}: no pair of this run's tokenizer", *kinds):
                record = json.loads(line)
                texts = [record[name] for name in NAMES]
                if not all(type(text) is str for text in texts):
                    raise ValueError("prompt, chosen and rejected are not texts")
                prompt, *both = map(tokenizer.encode, texts)
                room = block_size + 1 - len(prompt)
                if not len(prompt) or not 0 < max(map(len, both)) <= room:
                    raise ValueError(f"empty, or longer than block_size={block_size}")
            pairs.prompts.append(prompt)
            # The end is left off where it does not fit: such a completion was cut.
            chosen, rejected = (np.append(ids, end)[:room].astype(np.int64) for ids in both)
            pairs.chosen.append(chosen)
            pairs.rejected.append(rejected)
    n_held_out = len(pairs) // HELD_OUT
    if not n_held_out:
        raise InputError(f"{path} has {len(pairs)} pairs, fewer than {HELD_OUT}")
    n_train = len(pairs) - n_held_out
    return pairs.part(range(n_train)), pairs.part(range(n_train, len(pairs)))
