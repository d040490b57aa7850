"""Texts that grow in one batch, which each may join and leave between two tokens.

A batch of a GPT reads the weights once for a token of each text. Each text has the tokens that
sample.py would draw for it alone, but for the rounding of float32.

Shapes:  B texts in the batch   T tokens   V vocab_size   nh n_head   hs head size
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from model import GPT, KVCache, logits_to_probs, sample
from quill.errors import RunError
from quill.sampling.window import fast_kernels


class Cuts(NamedTuple):
    """How a token is drawn, see `model.logits_to_probs`."""

    temperature: float
    top_k: int
    top_p: float


@dataclasses.dataclass(eq=False)
class Text:
    """One text.

    ids: the prompt, and what was drawn since, as far as the model still reads it.
    rng: of the numbers that choose its tokens.
    on_token: called with a new token and the logits (V,) that it was drawn from; what it returns
    says whether the text is complete.
    on_error: called with the exception where the text can not be completed.
    """

    ids: list[int]
    cuts: Cuts
    rng: np.random.Generator
    on_token: Callable[[int, torch.Tensor], bool]
    on_error: Callable[[Exception], None]


class RowsCache(KVCache):
    """Keys and values of B texts of different lengths: `model.KVCache`, with a length for each row.

    It takes one new token of each row at a time; a row's first tokens come by `fill`.
    """

    def __init__(self, model: GPT, n_rows: int):
        super().__init__(model, n_rows)
        self.lengths = torch.zeros(n_rows, dtype=torch.int64, device=self.k[0].device)
        self.n_rows = 0  # in use, the first ones

    def fill(self, row: int, one) -> None:
        """Take the tokens of `one`, the KVCache of a single text, into a row."""
        n = one.n_tokens
        for own, theirs in zip((*self.k, *self.v), (*one.k, *one.v), strict=True):
            own[row, :, :n] = theirs[0, :, :n]
        for own, theirs in zip(self.newest, one.newest, strict=True):
            own[row] = theirs[0]
        self.lengths[row] = n

    def move(self, source: int, target: int) -> None:
        n = int(self.lengths[source])
        for own in (*self.k, *self.v):
            own[target, :, :n] = own[source, :, :n]
        for own in (*self.newest, self.lengths):
            own[target] = own[source]

    # ---- what model.GPT asks of a cache ----------------------------------------------------------

    def positions(self, T: int):
        """(B, 1). A forward pass asks for them once, and then each layer for what is made here."""
        assert T == 1, "one token of each row"
        lengths, device = self.lengths[: self.n_rows], self.lengths.device
        self.longest = int(lengths.max()) + 1
        self.new = torch.arange(self.n_rows, device=device), slice(None), lengths
        is_own = torch.arange(self.longest, device=device) <= lengths[:, None]
        self.scores_mask = torch.zeros(is_own.shape, dtype=self.k[0].dtype, device=device)
        self.scores_mask.masked_fill_(~is_own, -math.inf)
        return lengths[:, None]

    def append(self, layer: int, k, v):
        """k, v: (B, nh, 1, hs)"""
        self.k[layer][self.new] = k[:, :, 0]
        self.v[layer][self.new] = v[:, :, 0].to(k.dtype)  # as in `attend`
        used = slice(self.n_rows), slice(None), slice(self.longest)
        return self.k[layer][used], self.v[layer][used]

    def mask(self, T: int):
        """Added to the scores: each row reads its own tokens, the new one included. (B, 1, 1, n)"""
        return self.scores_mask[:, None, None]

    def before(self, layer: int, h):
        rows = self.newest[layer][: self.n_rows].clone()
        self.newest[layer][: self.n_rows] = h
        return rows

    def advance(self, T: int) -> None:
        self.lengths[: self.n_rows] += T


class Batch:
    """The texts that are being written."""

    def __init__(self, model: torch.nn.Module, vocab_size: int, max_texts: int):
        self.model, self.vocab_size, self.max_texts = model, vocab_size, max_texts
        self.block_size = model.config.block_size
        self.texts: list[Text] = []  # text i is row i of the cache
        self.prompt_cache = model.new_cache(1) if isinstance(model, GPT) else None
        self.cache = RowsCache(model, max_texts) if isinstance(model, GPT) else None

    @torch.inference_mode()
    def join(self, text: Text) -> None:
        self.texts.append(text)
        text.ids = text.ids[-self.block_size :]
        if self.cache is not None:
            self.cache.n_rows = len(self.texts)
            self._read_all_but_newest(len(self.texts) - 1)

    def leave(self, text: Text) -> None:
        """Its row goes to the last text."""
        row = self.texts.index(text)
        last = self.texts.pop()
        if last is not text:
            self.texts[row] = last
            if self.cache is not None:
                self.cache.move(len(self.texts), row)
        if self.cache is not None:
            self.cache.n_rows = len(self.texts)

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to each text; those that are complete leave."""
        logits = self._read_newest()[..., : self.vocab_size]  # (B, V)
        tokens = self._draw(logits)
        for text, token, scores in zip(tuple(self.texts), tokens, logits, strict=True):
            text.ids.append(token)
            if text.on_token(token, scores):
                self.leave(text)

    def _read_newest(self):
        """-> the logits after the newest token of each text, (B, V)."""
        device = next(self.model.parameters()).device
        for row, text in enumerate(self.texts):
            if len(text.ids) > self.block_size:  # as in model.generate
                text.ids = text.ids[-max(1, self.block_size // 2) :]
                if self.cache is not None:
                    self._read_all_but_newest(row)
        if self.cache is None:  # each reads all of its text each time
            windows = (torch.tensor([text.ids], device=device) for text in self.texts)
            return torch.cat([self.model(idx, last_only=True)[0][:, -1] for idx in windows])
        newest = torch.tensor([[text.ids[-1]] for text in self.texts], device=device)
        with fast_kernels(len(newest)):
            return self.model(newest, cache=self.cache, last_only=True)[0][:, -1]

    def _read_all_but_newest(self, row: int) -> None:
        ids = self.texts[row].ids[:-1]
        self.prompt_cache.clear()
        if ids:
            idx = torch.tensor([ids], device=self.cache.lengths.device)
            with fast_kernels(len(ids)):
                self.model(idx, cache=self.prompt_cache, last_only=True)
        self.cache.fill(row, self.prompt_cache)

    def _draw(self, logits) -> list[int]:
        """One token of each text; those that are drawn alike, at once."""
        if not logits.isfinite().all():
            raise RunError("the model's scores are not finite: choose another checkpoint")
        tokens = [0] * len(self.texts)
        for cuts in {text.cuts for text in self.texts}:
            rows = [row for row, text in enumerate(self.texts) if text.cuts == cuts]
            numbers = [self.texts[row].rng.random(dtype=np.float32) for row in rows]
            numbers = torch.tensor(numbers, device=logits.device)
            drawn = sample(logits_to_probs(logits[rows], *cuts), numbers)
            for row, token in zip(rows, drawn[:, 0].tolist(), strict=True):
                tokens[row] = token
        return tokens
