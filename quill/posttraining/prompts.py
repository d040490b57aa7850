"""What a policy is asked: the prompts of a split, with their answers where the dataset has them."""

import dataclasses

import numpy as np

from quill.data.dataset import Split, shuffled_epoch
from quill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """N prompts in the ids of a split; all but `ids` are (N,) positions in it."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray  # where a prompt's answer begins, if there is one
    answer_ends: np.ndarray  # the same as `ends` where there is none

    def __len__(self) -> int:
        return len(self.begins)

    def prompt(self, i: int) -> np.ndarray:
        return self.ids[self.begins[i] : self.ends[i]]

    def answer(self, i: int) -> np.ndarray:
        """With the token that ends it; empty in a dataset of texts."""
        return self.ids[self.ends[i] : self.answer_ends[i]]

    def draw(self, n: int, seed: int, step: int) -> np.ndarray:
        """The n prompts of a step."""
        return draw_places(len(self), n, seed, step)

    def spread(self, n: int) -> np.ndarray:
        """At most n prompts, evenly from all."""
        return np.unique(np.linspace(0, len(self) - 1, n).astype(np.int64))


def draw_places(n_all: int, n: int, seed: int, step: int) -> np.ndarray:
    """The n of n_all things that a step takes, (n,): a function of seed and step alone. Each epoch
    has all of them once, in an order of its own.
    """
    epochs, places = np.divmod(step * n + np.arange(n), n_all)
    orders = {epoch: shuffled_epoch(n_all, 1, seed, int(epoch))[0] for epoch in {*epochs}}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def prompts_of(split: Split, n_tokens: int) -> Prompts:
    """The prompts of a dataset of examples, or pieces of n_tokens of a dataset of texts.

    Raises InputError where none leaves room for an answer in a window of the model.
    """
    ids = np.asarray(split.ids)
    if split.mask is None:
        begins = np.arange(0, len(ids) - n_tokens, n_tokens)
        ends = answer_ends = begins + n_tokens
    else:
        changes = np.flatnonzero(np.diff(np.asarray(split.mask).astype(np.int8))) + 1
        # Prompt, answer, prompt, answer ...; an answer at the very end has no change after it.
        bounds = np.concatenate(([0], changes, [len(ids)]))[: 2 * ((len(changes) + 1) // 2) + 1]
        begins, ends, answer_ends = bounds[:-1:2], bounds[1::2], bounds[2::2]
    has_room = ends - begins <= split.block_size
    if not has_room.any():
        raise InputError(
            f"{split.path}: no prompt leaves room for an answer in block_size={split.block_size}"
        )
    return Prompts(ids, begins[has_room], ends[has_room], answer_ends[has_room])
