"""Pairs of completions of which one is preferred: {"prompt", "chosen", "rejected"} in a .jsonl."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from quill.data.tokenizers import Tokenizer
from quill.errors import InputError, blames_input
from quill.files import open_file, sha256_of_file
from quill.posttraining.prompts import draw_places

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
        """The n pairs of a step."""
        return self.part(draw_places(len(self), n, seed, step))


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
                if texts[1] == texts[2]:
                    raise ValueError("chosen and rejected are the same")
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


class PairsTask:
    """What quill.dpo and quill.reward have in common. `of_pairs` is theirs:

    of_pairs(pairs) -> the loss of each (N,), whether its chosen completion is the better one, and
    how many tokens were read.
    """

    def open_pairs(self, loop, block_size: int) -> None:
        self.loop, self.config = loop, loop.config
        path = Path(self.config.pairs)
        loop.made_of["pairs"] = sha256_of_file(path)
        self.train_pairs, self.val_pairs = read(path, loop.data.tokenizer, block_size)

    def summary(self) -> str:
        return (
            f"{len(self.train_pairs):,} train and {len(self.val_pairs):,} val pairs, "
            f"{self.config.pairs_per_step} in a step"
        )

    def losses(self, step: int):
        drawn = self.train_pairs.draw(self.config.pairs_per_step, self.config.seed, step)
        losses, is_right, n_tokens = self.of_pairs(drawn)
        yield losses.mean(), {"pairs_right": is_right.float().mean().item(), "tokens": n_tokens}

    @torch.no_grad()
    def evaluate_pairs(self) -> tuple[float, float]:
        """-> the mean loss of those held out, and the fraction that is right."""
        sums = torch.zeros(2)
        for start in range(0, len(self.val_pairs), self.config.batch_size):
            self.loop.check_signals()
            stop = min(start + self.config.batch_size, len(self.val_pairs))
            losses, is_right, _ = self.of_pairs(self.val_pairs.part(range(start, stop)))
            sums += torch.stack((losses.sum(), is_right.sum())).cpu()
        mean_loss, right = (sums / len(self.val_pairs)).tolist()
        return mean_loss, right
