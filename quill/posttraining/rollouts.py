"""Completions that a policy writes, as batches that it can be trained on."""

import dataclasses

import numpy as np
import torch

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

    def split(self, n_rows: int) -> list["Batch"]:
        parts = zip(self.ids.split(n_rows), self.targets.split(n_rows), strict=True)
        return [Batch(*part) for part in parts]


@dataclasses.dataclass(frozen=True)
class Rollouts(Batch):
    """The completions of one prompt are rows side by side."""

    texts: list[str]  # the completions, without the end of the text
    is_ended: np.ndarray  # (N,) whether the policy ended the text itself
    lengths: np.ndarray  # (N,) tokens of the completion, its end included


def pack(prompts: list, completions: list, device: torch.device) -> Batch:
    """N arrays of token ids each."""
    n_prompt = np.array([len(prompt) for prompt in prompts])[:, None]
    n_filled = n_prompt + np.array([len(tokens) for tokens in completions])[:, None]
    ids = np.zeros((len(prompts), n_filled.max()), dtype=np.int64)
    for row, prompt, tokens in zip(ids, prompts, completions, strict=True):
        row[: len(prompt) + len(tokens)] = np.concatenate((prompt, tokens))
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

    The random numbers depend on `seed` and on a prompt's place alone. Prompts of one length are
    read as one batch. Raises RunError when the scores are not finite.
    """
    completions: list = [None] * (len(prompts) * n_each)
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        n_new = min(max_new_tokens, decoder.config.block_size + 1 - length)
        rngs = [np.random.default_rng([*seed, i]) for i in places]
        numbers = np.concatenate([rng.random((n_each, n_new), dtype=np.float32) for rng in rngs])
        batch = np.repeat(np.stack([prompts[i] for i in places]), n_each, axis=0)
        written = continue_prompts(decoder, batch, numbers, temperature, tokenizer.end_of_text)
        rows = (i * n_each + j for i in places for j in range(n_each))
        for row, tokens in zip(rows, written, strict=True):
            completions[row] = tokens
    repeated = [prompt for prompt in prompts for _ in range(n_each)]
    batch = pack(repeated, completions, next(decoder.model.parameters()).device)
    is_ended = np.array([tokens[-1] == tokenizer.end_of_text for tokens in completions])
    texts = [
        tokenizers.decode(tokenizer, tokens[:-1] if ended else tokens)
        for tokens, ended in zip(completions, is_ended, strict=True)
    ]
    lengths = np.array([len(tokens) for tokens in completions])
    return Rollouts(batch.ids, batch.targets, texts, is_ended, lengths)


def continue_prompts(
    decoder: Decoder, batch: np.ndarray, numbers: np.ndarray, temperature: float, end: int | None
) -> list[np.ndarray]:
    """batch (N, T), numbers (N, n) in [0, 1) -> the new tokens of each row, up to its end."""
    n_new = numbers.shape[1]
    columns = iter(torch.from_numpy(numbers.T.copy()))  # of N each
    unused = torch.zeros(len(batch))  # a decoder may ask for more than it uses

    def uniform(n: int) -> torch.Tensor:
        return torch.stack([next(columns, unused) for _ in range(n)])

    idx = torch.from_numpy(batch.astype(np.int64)).to(next(decoder.model.parameters()).device)
    steps, is_open = [], np.ones(len(batch), dtype=bool)
    for tokens in decoder.generate(idx, n_new, temperature=temperature, uniform=uniform):
        steps.append(np.array(tokens))
        if steps[-1].max() >= decoder.vocab_size:  # probabilities of NaN
            raise RunError("the policy's scores are not finite: lower learning_rate")
        is_open &= steps[-1] != end
        if not is_open.any():
            break
    new = np.stack(steps, axis=1)  # (N, n or fewer), with what follows an end
    is_end = new == (-1 if end is None else end)
    n_tokens = np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, new.shape[1])
    return [row[:n] for row, n in zip(new, n_tokens, strict=True)]
