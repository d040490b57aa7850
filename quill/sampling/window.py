"""Texts that grow on the device: on a GPU a token is one launch, and several are made at a time."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from model import GPT, KVCache, logits_to_probs, sample
from quill.training.cuda_graph import Recorded

TOKENS_PER_READ = 16  # for each text, before they are read back, which waits for the GPU
# PyTorch 2.11 fails to compile the cumulative sums of several rows that are much longer.
MAX_COMPILED_VOCABULARY = 4096


@contextlib.contextmanager
def fast_kernels(n_tokens: int):
    """Leave out, while a model reads so many tokens, kernels that are slow in sampling."""
    has_onednn, has_cudnn = torch.backends.mkldnn.enabled, torch.backends.cuda.cudnn_sdp_enabled()
    # For a single token oneDNN would rearrange the bfloat16 weights, which takes longer than the
    # matrix-vector products themselves; PyTorch's own kernel does not.
    torch.backends.mkldnn.enabled = has_onednn and n_tokens > 1
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, in 0.4 s, for each length
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = has_onednn
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)


class Window:
    """The contexts of B texts and the step that adds a token to each, all of it on the device.

    tokens, numbers: (block_size + 1, B), by position; a number in [0, 1) chooses the token there.
    """

    def __init__(self, model: GPT, vocab_size: int, compiled: bool, batch_size: int, **cuts):
        self.model, self.vocab_size, self.cuts = model, vocab_size, cuts
        is_large = vocab_size > MAX_COMPILED_VOCABULARY
        self.sample = torch.compiler.disable(sample) if is_large else sample
        self.cache = FixedKVCache(model, batch_size)
        shape, device = (model.config.block_size + 1, batch_size), self.cache.end.device
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(shape, device=device)
        self.half = max(1, model.config.block_size // 2)
        step = self._decode_step
        if compiled:
            # The first makes of a product with a single row a reduction, which is fused with its
            # neighbours; the second fuses kernels that read little else in common than a position.
            options = {"coordinate_descent_tuning": True, "score_fusion_memory_threshold": 1}
            step = torch.compile(step, dynamic=False, options=options)
        gpu = device if device.type == "cuda" else None
        self.decode_step = Recorded(fast_kernels(batch_size)(step), gpu)
        self.slide = Recorded(fast_kernels(batch_size * self.half)(self._slide), gpu)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens: int, uniform) -> Iterator[list[int]]:
        """As `Decoder.generate`, for one caller at a time."""
        self.texts = idx = idx[:, 1 - len(self.tokens) :]
        t = idx.size(1)  # the position of the next token
        self.tokens[:t] = idx.T
        self.cache.clear()
        add_token = functools.partial(fast_kernels(idx.numel())(self._read), idx)  # prefill
        while max_new_tokens > 0:
            assert self.texts is idx, "the window is in use for other texts"
            n = min(max_new_tokens, TOKENS_PER_READ, len(self.tokens) - t)
            self.numbers[t : t + n].copy_(uniform(n), non_blocking=True)
            for _ in range(n):
                add_token()
                add_token = self.decode_step
            yield from self.tokens[t : t + n].tolist()
            max_new_tokens, t = max_new_tokens - n, t + n
            if t == len(self.tokens):
                t, add_token = self.half, self.slide

    def _slide(self) -> None:
        """Go on with the most recent half of a full window, which is read anew."""
        self.tokens[: self.half] = self.tokens[-self.half :]
        self.cache.clear()
        self._read(self.tokens[: self.half].T)

    def _decode_step(self) -> None:
        newest = self.tokens.index_select(0, self.cache.end).T  # (B, 1)
        self._read(newest.clamp(max=self.vocab_size - 1))  # until the caller sees one of NaN

    def _read(self, idx) -> None:
        """Read idx (B, T), which continues the cache, and draw the next token."""
        logits, _ = self.model(idx, cache=self.cache, last_only=True)  # (B, 1, V)
        probs = logits_to_probs(logits[:, -1, : self.vocab_size], **self.cuts)
        new = self.sample(probs, self.numbers.index_select(0, self.cache.end)[0])  # (B, 1)
        # Where probabilities are NaN `sample` draws vocab_size, but not when it is compiled.
        new = new.masked_fill(probs[:, :1].isnan(), self.vocab_size)
        self.tokens.index_copy_(0, self.cache.end, new.T)


class FixedKVCache(KVCache):
    """A cache whose shapes and Python values never change, so that its use can be recorded.

    The tensor `end` replaces n_tokens; a token attends to all block_size slots, later ones masked.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int):
        super().__init__(model, batch_size)
        device = self.k[0].device
        self.slots = torch.arange(model.config.block_size, device=device)
        self.end = torch.zeros(1, dtype=torch.int64, device=device)

    def positions(self, T: int):
        """Also prepares what is the same for all layers."""
        self.new = self.end + self.slots[:T]
        # Added to the scores: from booleans the attention of each layer would make such a tensor.
        zeros = self.k[0].new_zeros(T, len(self.slots))
        self.bias = zeros.masked_fill(self.slots > self.new[:, None], -torch.inf)
        return self.new

    def append(self, layer: int, k, v):
        keys, values = self.k[layer], self.v[layer]
        v = v.to(values.dtype)  # on a CPU that is float32 where v is bfloat16
        return keys.index_copy_(2, self.new, k), values.index_copy_(2, self.new, v)

    def mask(self, T: int):
        return self.bias  # (T, block_size)

    def advance(self, T: int) -> None:
        self.end += T

    def clear(self) -> None:
        super().clear()
        self.end.zero_()
