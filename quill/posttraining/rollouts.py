"""Completions that a policy writes, as batches that it can be trained on."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from model import KVCache, logits_to_probs, sample
from quill.data import tokenizers
from quill.data.dataset import IGNORE_INDEX
from quill.errors import RunError
from quill.sampling.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Batch:
    """N prompts with a completion each."""

    ids: torch.Tensor  # (N, T + 1) prompt and completion, then zeros
    targets: torch.Tensor  # (N, T) the token after each; IGNORE_INDEX outside of the completion

    @property
    def idx(self) -> torch.Tensor:
        return self.ids[:, :-1]

    def part(self, rows: torch.Tensor) -> "Batch":
        return Batch(self.ids[rows], self.targets[rows])

    def by_length(self, n_rows: int) -> Iterator[tuple[torch.Tensor, "Batch"]]:
        """The places of n_rows at a time, shortest first, and these rows without padding."""
        positions = torch.arange(1, self.targets.size(1) + 1, device=self.targets.device)
        lengths = torch.where(self.targets != IGNORE_INDEX, positions, 0).amax(dim=1)
        for rows in lengths.argsort(stable=True).split(n_rows):
            T = int(lengths[rows].max())
            yield rows, Batch(self.ids[rows, : T + 1], self.targets[rows, :T])

    def split(self, n_rows: int) -> list["Batch"]:
        parts = zip(self.ids.split(n_rows), self.targets.split(n_rows), strict=True)
        return [Batch(*part) for part in parts]


@dataclasses.dataclass(frozen=True)
class Rollouts(Batch):
    """The completions of one prompt are rows side by side."""

    texts: list[str]  # the completions, without the end of the text
    is_ended: np.ndarray  # (N,) whether the policy ended the text itself
    lengths: np.ndarray  # (N,) tokens of the completion, its end included


def padded(rows: list[np.ndarray], width: int = 0) -> np.ndarray:
    """N arrays of token ids -> (N, width), or as wide as the longest; zeros at the end."""
    ids = np.zeros((len(rows), max(width, *map(len, rows))), dtype=np.int64)
    for own, row in zip(ids, rows, strict=True):
        own[: len(row)] = row
    return ids


def pack(prompts: list, completions: list, device: torch.device) -> Batch:
    """N arrays of token ids each."""
    n_prompt = np.array([len(prompt) for prompt in prompts])[:, None]
    n_filled = n_prompt + np.array([len(tokens) for tokens in completions])[:, None]
    ids = padded([np.concatenate(pair) for pair in zip(prompts, completions, strict=True)])
    positions = np.arange(ids.shape[1])
    is_completion = (n_prompt <= positions) & (positions < n_filled)
    targets = np.where(is_completion, ids, IGNORE_INDEX)[:, 1:].copy()
    return Batch(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))


def roll_out(
    decoder: Decoder,
    tokenizer: tokenizers.Tokenizer,
    prompts: list[np.ndarray],
    n_each: int,
    max_new_tokens: int,
    temperature: float,
    seed: list[int],
) -> Rollouts:
    """Write n_each completions of each prompt, of max_new_tokens at most, within one window.

    The random numbers depend on `seed` and on a prompt's place alone. Raises RunError when the
    scores are not finite.
    """
    repeated = [prompt for prompt in prompts for _ in range(n_each)]
    n_prompt = np.array([len(prompt) for prompt in repeated])
    n_new = np.minimum(max_new_tokens, decoder.config.block_size + 1 - n_prompt)
    shape = (n_each, min(max_new_tokens, decoder.config.block_size))
    rngs = (np.random.default_rng([*seed, i]) for i in range(len(prompts)))
    numbers = np.concatenate([rng.random(shape, dtype=np.float32) for rng in rngs])
    completions = complete(decoder, repeated, n_new, numbers, temperature, tokenizer.end_of_text)
    batch = pack(repeated, completions, next(decoder.model.parameters()).device)
    is_ended = np.array([tokens[-1] == tokenizer.end_of_text for tokens in completions])
    texts = [
        tokenizers.decode(tokenizer, tokens[:-1] if ended else tokens)
        for tokens, ended in zip(completions, is_ended, strict=True)
    ]
    lengths = np.array([len(tokens) for tokens in completions])
    return Rollouts(batch.ids, batch.targets, texts, is_ended, lengths)


@torch.inference_mode()
def complete(
    decoder: Decoder,
    prompts: list[np.ndarray],
    n_new: np.ndarray,
    numbers: np.ndarray,
    temperature: float,
    end: int | None,
) -> list[np.ndarray]:
    """N prompts, of n_new (N,) tokens at most, numbers (N, n) in [0, 1) -> the new tokens of each.

    All are read side by side from the first token on; where the shortest prompt already has a new
    token, a longer one has its own. When a quarter of the batch is complete, it leaves the batch.
    """
    begins = np.array([len(prompt) for prompt in prompts])
    ends = begins + n_new
    ids = padded(prompts, ends.max())
    device = next(decoder.model.parameters()).device
    rows, is_open, n_read = np.arange(len(prompts)), np.ones(len(prompts), dtype=bool), 0
    cache = decoder.new_cache(len(rows))
    for position in range(begins.min(), ends.max()):
        kept = np.flatnonzero(is_open[rows])
        if not len(kept):
            break
        if 4 * len(kept) < 3 * len(rows):
            rows = rows[kept]
            if cache is not None:
                keep_rows(cache, torch.from_numpy(kept).to(device))
        unread = torch.from_numpy(ids[rows, n_read:position])
        logits, _ = decoder(unread.to(device), cache=cache, last_only=True)
        n_read = 0 if cache is None else position
        probs = logits_to_probs(logits[:, -1], temperature, top_k=0, top_p=1.0)
        own = numbers[rows, (position - begins[rows]).clip(0, numbers.shape[1] - 1)]
        new = sample(probs, torch.from_numpy(own).to(device))[:, 0].cpu().numpy()
        if new.max() >= decoder.vocab_size:  # probabilities of NaN
            raise RunError("the policy's scores are not finite: lower learning_rate")
        is_new = is_open[rows] & (begins[rows] <= position)
        ids[rows[is_new], position] = new[is_new]
        ends[rows[is_new & (new == end)]] = position + 1
        is_open &= position + 1 < ends
    parts = zip(ids, begins, ends, strict=True)
    return [row[begin:end] for row, begin, end in parts]


def keep_rows(cache: KVCache, rows: torch.Tensor) -> None:
    for tensors in (cache.k, cache.v, cache.newest):
        tensors[:] = [tensor[rows] for tensor in tensors]
