"""A model made ready for `model.generate`: without padding tokens, and with the fastest kernels."""

import torch

from model import KVCache


class Decoder:
    """Stands in for the model in `generate`, with logits of the tokenizer's tokens alone.

    vocab_size: ids from here on are padding of the vocabulary, and never sampled.
    compiled: compile the step that reads one token; on CUDA it becomes the replay of a graph.
    """

    def __init__(self, model: torch.nn.Module, vocab_size: int, compiled: bool = False):
        self.model, self.config, self.vocab_size = model, model.config, vocab_size
        self.compiled = None
        if compiled:
            self.compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def new_cache(self, batch_size: int) -> KVCache | None:
        cache = self.model.new_cache(batch_size)
        if self.compiled is None or cache is None:
            return cache
        return FixedKVCache(self.model, batch_size)

    def __call__(self, idx, *, cache, last_only: bool):
        """idx (B, T) -> logits (B, T or 1, vocab_size), None"""
        model = self.model
        if self.compiled is not None and idx.size(1) == 1:
            model = self.compiled
        # For a single token oneDNN would rearrange the bfloat16 weights, which takes longer than
        # the matrix-vector products themselves; PyTorch's own kernel does not.
        has_onednn = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = has_onednn and idx.numel() > 1
        try:
            logits, _ = model(idx, cache=cache, last_only=last_only)
        finally:
            torch.backends.mkldnn.enabled = has_onednn
        return logits[..., : self.vocab_size], None


class FixedKVCache(KVCache):
    """A cache whose shapes and Python values never change, so that a step is compiled only once.

    The tensor `end` replaces n_tokens; a token attends to all block_size slots, later ones masked.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int):
        super().__init__(model, batch_size)
        self.slots = torch.arange(self.k.size(3), device=self.k.device)
        self.end = torch.zeros((), dtype=torch.int64, device=self.k.device)
        for tensor in (self.k, self.v, self.slots, self.end):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs need it

    def positions(self, T: int):
        return self.end + self.slots[:T]

    def append(self, layer: int, k, v):
        new = self.positions(k.size(2))
        self.k[layer].index_copy_(2, new, k.to(self.k.dtype))
        self.v[layer].index_copy_(2, new, v.to(self.v.dtype))
        return self.k[layer], self.v[layer]

    def mask(self, T: int):
        return self.slots <= self.positions(T)[:, None]  # (T, block_size)

    def advance(self, T: int) -> None:
        self.end += T

    def clear(self) -> None:
        self.end.zero_()
