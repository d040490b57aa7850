"""`model.generate`, faster, and without the padding tokens of a vocabulary."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from model import GPT, KVCache, generate
from quill.sampling.window import TOKENS_PER_READ, Window, fast_kernels


class Decoder:
    """Continues texts as `model.generate` does, token for token, by the fastest kernels.

    vocab_size: ids from here on are padding of the vocabulary, and never sampled.
    compiled: compile the step that adds a token to each text.
    """

    def __init__(self, model: torch.nn.Module, vocab_size: int, compiled: bool = False):
        self.model, self.config, self.vocab_size = model, model.config, vocab_size
        self.is_fixed = isinstance(model, GPT) and (compiled or next(model.parameters()).is_cuda)
        make_window = functools.partial(Window, model, vocab_size, compiled)
        self.window_for = functools.lru_cache(maxsize=1)(make_window)  # what it recorded can serve

    def generate(
        self,
        idx,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        uniform: Callable[[int], torch.Tensor] | None = None,
    ) -> Iterator[list[int]]:
        """Continue idx (B, T), T >= 1; yields lists of B new tokens, one for each text.

        uniform: called with n for the (n, B) numbers in [0, 1) that choose the next n tokens, of
        which the last call's may be too many; torch.rand if None.
        """
        B, cuts = idx.size(0), {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        uniform = uniform or (lambda n: torch.rand(n, B))
        if self.is_fixed:
            yield from self.window_for(B, **cuts).generate(idx, max_new_tokens, uniform)
        else:
            rows = (row for n in itertools.repeat(TOKENS_PER_READ) for row in uniform(n))
            numbers = (row.to(idx.device) for row in rows)
            for new in generate(self, idx, max_new_tokens, **cuts, uniform=numbers.__next__):
                yield new.tolist()

    def new_cache(self, batch_size: int) -> KVCache | None:
        return self.model.new_cache(batch_size)

    def __call__(self, idx, *, cache, last_only: bool):
        """Stands in for the model in `model.generate`: logits (B, T or 1, vocab_size), None."""
        with fast_kernels(idx.numel()):
            logits, _ = self.model(idx, cache=cache, last_only=last_only)
        return logits[..., : self.vocab_size], None
