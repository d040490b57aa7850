"""From a prompt to text: token ids drawn from a model, decoded as they come."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from quill.data import tokenizers
from quill.data.problems import plain_answer
from quill.errors import InputError, RunError
from quill.files import open_file
from quill.sampling.decoder import Decoder
from quill.settings import option


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How a text is drawn; the options of sample.py but for files and devices."""

    start: str = option("\n", "the prompt, or FILE:path to read it from a file")
    num_samples: int = option(10, "texts to generate, as one batch", min=1, max=10**6)
    max_new_tokens: int = option(500, "tokens in each, beyond the prompt", min=0, max=10**9)
    temperature: float = option(0.8, "higher is more random; 0 takes the likeliest token", min=0)
    top_k: int = option(200, "sample from the k likeliest tokens; 0 from all", min=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that sum to p", min=0, max=1)
    stop: str = option("", "end a text where this string appears; it is not printed")
    seed: int = option(1337, "same seed, same texts", min=0, max=2**32 - 1)


class TextStream:
    """One text as its tokens arrive: whole characters only, up to its end or a stop string.

    reverses_answers: show the completion as `plain_answer` does, once all of it is there.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        stops: Iterable[str] = (),
        reverses_answers: bool = False,
    ):
        self._end_of_text = tokenizer.end_of_text
        self._reverses_answers = reverses_answers
        self._completion = ""  # kept until it can be reversed
        self._decoder = tokenizers.StreamDecoder(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._pending = ""  # may still turn out to begin a stop string
        self.is_done = False

    def feed(self, token: int) -> str:
        """-> the text that is now certain to be part of the sample."""
        if token == self._end_of_text:
            return self.finish()
        text = "" if self.is_done else self._release(self._decoder.feed([token]))
        return self._as_shown(text)

    def finish(self) -> str:
        """-> what was held back. Nothing follows."""
        text = "" if self.is_done else self._release(self._decoder.finish()) + self._pending
        self.is_done, self._pending = True, ""
        return self._as_shown(text)

    def _as_shown(self, text: str) -> str:
        if not self._reverses_answers:
            return text
        self._completion += text
        if not self.is_done:
            return ""
        text, self._completion = self._completion, ""
        return plain_answer(text)

    def _release(self, text: str) -> str:
        text = self._pending + text
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            self.is_done, self._pending = True, ""
            return text[: min(found)]
        begun = (stop[:n] for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)))
        n_held = max((len(part) for part in begun if text.endswith(part)), default=0)
        self._pending = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def read_prompt(start: str) -> str:
    """The text itself, or the contents of the file that `FILE:path` names."""
    text = start
    if start == "FILE:":
        raise InputError("start=FILE: names no file")
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            with open_file(path) as file:
                text = file.read().decode("utf-8-sig")  # without the mark, as prepare.py reads
        except UnicodeDecodeError as error:
            raise InputError(f"prompt file {path} is not UTF-8 at byte {error.start}") from None
    if not text:
        raise InputError("the prompt is empty: give --start=TEXT with at least one character")
    return text


def sample_tokens(decoder: Decoder, ids, options: SampleOptions, first: int = 0):
    """ids (T,) -> yields lists of `num_samples` new tokens, one for each text from `first` on.

    Text i has random numbers of its own, drawn from (seed, i), so it does not depend on how many
    others there are. Raises RunError when the scores are not finite.
    """
    device = next(decoder.model.parameters()).device
    n = options.num_samples
    idx = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(device).expand(n, -1)
    rngs = [np.random.default_rng([options.seed, i]) for i in range(first, first + n)]

    def uniform(n_tokens: int):
        rows = [rng.random(n_tokens, dtype=np.float32) for rng in rngs]
        return torch.from_numpy(np.stack(rows, axis=1))

    cuts = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    for tokens in decoder.generate(idx, options.max_new_tokens, **cuts, uniform=uniform):
        if max(tokens) >= decoder.vocab_size:  # probabilities of NaN
            raise RunError("the model's scores are not finite: choose another checkpoint")
        yield tokens


def stream_text(
    decoder: Decoder,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    options: SampleOptions,
    number: int,
    reverses_answers: bool = False,
) -> Iterator[str]:
    """Yield one text piece by piece, the prompt first; number 0 is the first that a run shows.

    Raises InputError for a prompt that does not fit the vocabulary.
    """
    stream = TextStream(tokenizer, [options.stop], reverses_answers)
    ids = tokenizers.encode_prompt(tokenizer, prompt)
    yield prompt
    one = dataclasses.replace(options, num_samples=1)
    for [token] in sample_tokens(decoder, ids, one, first=number):
        yield stream.feed(token)
        if stream.is_done:
            return
    yield stream.finish()
