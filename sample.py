"""Generate text from a trained model; needs a run's folder, nothing from data/.

Usage:
    python sample.py --out_dir=out
    python sample.py --out_dir=out --start="ROMEO:" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt
    python sample.py --init_from=gpt2 --start="The meaning of life is"
    python sample.py --out_dir=out --interactive
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quill import settings
from quill.data import dataset, tokenizers
from quill.errors import InputError, RunError, run_command, silence_stdout
from quill.files import dataset_folder
from quill.settings import DType, option


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    out_dir: str = option("out", "the run's folder: its best.pt is used, else its ckpt.pt")
    init_from: str = option(
        "resume", "resume: out_dir's; gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a path to weights"
    )
    dataset: str = option("", "take data/<dataset>'s tokenizer, for weights without one")
    start: str = option("\n", "the prompt, or FILE:path to read it from a file")
    num_samples: int = option(10, "texts to generate, as one batch", min=1, max=10**6)
    max_new_tokens: int = option(500, "tokens in each, beyond the prompt", min=0, max=10**9)
    temperature: float = option(0.8, "below 1 safer, above 1 wilder, 0 always the likeliest", min=0)
    top_k: int = option(200, "draw from the k likeliest tokens; 0 from all", min=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that reach p together", min=0, max=1)
    stop: str = option("", "end a text where this string appears; it is not printed")
    seed: int = option(1337, "same seed, same texts", min=0, max=2**32 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("auto", "format of the weights and of matrix products")
    compile: bool = option(False, "torch.compile the reading of a token: for long texts on a GPU")
    interactive: bool = option(False, "ask for prompts, one text for each; /help lists commands")


SEPARATOR = "---------------"


class Sample:
    """One text as its tokens arrive: whole characters only, up to its end or the stop string."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: str):
        self._end_of_text = tokenizer.end_of_text
        self._reverses = tokenizer.reverses_answers
        self._reversed = ""  # can be read once all of it is there
        self._decoder = tokenizers.StreamDecoder(tokenizer)
        self._stop = stop
        self._pending = ""  # could still turn out to begin the stop string
        self.is_done = False

    def feed(self, token: int) -> str:
        """-> the text that is now certain to be part of the sample."""
        if token == self._end_of_text:
            return self.finish()
        text = "" if self.is_done else self._release(self._decoder.feed([token]))
        if not self._reverses:
            return text
        self._reversed += text
        return ""

    def finish(self) -> str:
        """-> what was held back. Nothing follows."""
        text = "" if self.is_done else self._release(self._decoder.finish()) + self._pending
        self.is_done, self._pending = True, ""
        if self._reverses:
            text, self._reversed = tokenizers.plain(self._reversed + text), ""
        return text

    def _release(self, text: str) -> str:
        text = self._pending + text
        before, found, _ = text.partition(self._stop) if self._stop else (text, "", "")
        if found:
            self.is_done, self._pending = True, ""
            return before
        n_held = next(
            (n for n in range(len(self._stop) - 1, 0, -1) if text.endswith(self._stop[:n])), 0
        )
        self._pending = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def main(argv: list[str]) -> int:
    config = settings.load(SampleConfig, argv, usage=__doc__)
    prompt = read_prompt(config.start)
    # Here, not at the top: torch takes a second, --help and typos should not.
    from quill.training import devices

    device = devices.pick_device(config.device)
    sys.stdout.reconfigure(errors="replace")
    with devices.out_of_memory_advice(f"lower num_samples={config.num_samples}"):
        model, tokenizer = load_model(config)
        model = model.eval().to(device, devices.pick_dtype(config.dtype, device))
        if config.interactive:
            from quill.sampling import interactive as chat

            with devices.fast_decoding(model):
                chat.run(functools.partial(write, model, tokenizer), config)
            return 0
        try:
            ids = tokenizers.encode_prompt(tokenizer, prompt)
        except InputError as error:
            raise InputError(
                f"the prompt does not fit this model, give another --start: {error}"
            ) from None
        try:
            with devices.fast_decoding(model):
                print_samples(prompt, tokens(model, tokenizer, ids, config), tokenizer, config)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            silence_stdout()
    return 0


def load_model(config: SampleConfig):
    """-> the model, and the tokenizer that it came with, or else that of a dataset."""
    from quill.interop import pretrained

    given = None
    if config.dataset:
        path = dataset_folder(config.dataset) / "meta.json"
        given = tokenizers.from_json(dataset.read_meta(path).tokenizer, str(path))
    if config.init_from == "resume":
        loaded = pretrained.from_folder(Path(config.out_dir))
    else:
        loaded = pretrained.load(config.init_from)
    if loaded.tokenizer is not None and given is not None:
        raise InputError(f"dataset={config.dataset}: the model came with a tokenizer; leave it out")
    tokenizer = loaded.tokenizer or given
    if tokenizer is None:
        raise InputError(
            f"{config.init_from} comes without a tokenizer: give --dataset=NAME, one that was "
            "prepared with the same"
        )
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise InputError(
            f"dataset {config.dataset!r} has {tokenizer.vocab_size:,} tokens, more than the "
            f"{loaded.config.vocab_size:,} of the model: it is not what that was trained on"
        )
    return loaded.build(), tokenizer


def read_prompt(start: str) -> str:
    """The text itself, or the contents of the file that `FILE:path` names."""
    text = start
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"prompt file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"prompt file {path} is not UTF-8 at byte {error.start}") from None
    if not text:
        raise InputError("the prompt is empty: give --start=TEXT with at least one character")
    return text


def write(model, tokenizer, prompt: str, config: SampleConfig, number: int) -> Iterator[str]:
    """Yield one text in pieces, the prompt first: number 0 is the first that a run shows.

    Raises InputError for a prompt that does not fit the vocabulary.
    """
    sample = Sample(tokenizer, config.stop)
    ids = tokenizers.encode_prompt(tokenizer, prompt)
    yield prompt
    one = dataclasses.replace(config, num_samples=1)
    for [token] in tokens(model, tokenizer, ids, one, first=number):
        yield sample.feed(token)
        if sample.is_done:
            return
    yield sample.finish()


def tokens(model, tokenizer: tokenizers.Tokenizer, ids: np.ndarray, config: SampleConfig, first=0):
    """Yield lists of `num_samples` new tokens, one for each text from number `first` on.

    Text i has random numbers of its own, drawn from (seed, i): how many others there are does not
    matter to it.
    """
    import torch

    from model import generate
    from quill.training import devices

    device = next(model.parameters()).device
    idx = torch.from_numpy(ids.astype(np.int64)).to(device).expand(config.num_samples, -1)
    rngs = [
        np.random.default_rng([config.seed, i]) for i in range(first, first + config.num_samples)
    ]
    rows = (
        np.array([rng.random(dtype=np.float32) for rng in rngs])
        for _ in range(config.max_new_tokens)
    )
    steps = generate(
        model,
        idx,
        (torch.from_numpy(row).to(device) for row in rows),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        vocab_size=tokenizer.vocab_size,
        read_one=devices.compiled_decoding(model) if config.compile else None,
    )
    for step in steps:
        ids = step.tolist()
        if max(ids) >= tokenizer.vocab_size:  # nothing was found to draw from
            raise RunError("the model's scores are not finite: choose a sounder checkpoint")
        yield ids


def print_samples(prompt: str, steps, tokenizer, config: SampleConfig) -> None:
    """Show the first text while it is made; the others grow beside it and follow."""
    samples = [Sample(tokenizer, config.stop) for _ in range(config.num_samples)]
    later = [""] * config.num_samples
    print(prompt, end="", flush=True)
    for step in steps:
        for i, (sample, token) in enumerate(zip(samples, step, strict=True)):
            text = sample.feed(token)
            if i == 0:
                print(text, end="", flush=True)
            else:
                later[i] += text
        if all(sample.is_done for sample in samples):
            break
    print(samples[0].finish())
    print(SEPARATOR)
    for sample, text in zip(samples[1:], later[1:], strict=True):
        print(prompt + text + sample.finish())
        print(SEPARATOR)


if __name__ == "__main__":
    run_command(main)
