"""Generate text from a trained model; needs a run's folder, nothing from data/.

Usage:
    python sample.py --out_dir=out
    python sample.py --out_dir=out --start="ROMEO:" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt
    python sample.py --init_from=gpt2 --start="The meaning of life is"
    python sample.py --out_dir=out --interactive
    python sample.py --out_dir=out-a,out-b      two models, their probabilities averaged
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import functools

from model import GPT
from quill import settings
from quill.data import tokenizers
from quill.errors import InputError, blames_input, reader_may_leave, run_command
from quill.interop.for_sampling import DATASET, INIT_FROM, OUT_DIR, load_for_sampling
from quill.sampling import interactive
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, TextStream, read_prompt, sample_tokens, stream_text
from quill.settings import DType, option
from quill.training.devices import out_of_memory_advice, pick_device, pick_dtype

SEPARATOR = "---------------"


@dataclasses.dataclass(frozen=True)
class SampleConfig(SampleOptions):
    out_dir: str = option(*OUT_DIR)
    init_from: str = option(*INIT_FROM)
    dataset: str = option(*DATASET)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("auto", "dtype of the weights and of matrix products")
    compile: bool = option(False, "torch.compile the reading of a token: for long texts on a GPU")
    interactive: bool = option(False, "ask for prompts, one text for each; /help lists commands")


def main(argv: list[str]) -> int:
    config = settings.load(SampleConfig, argv, usage=__doc__)
    if config.interactive and config.start != SampleConfig.start:
        raise InputError("interactive=true asks for prompts: leave --start out")
    prompt = read_prompt(config.start)
    device = pick_device(config.device)
    with out_of_memory_advice(f"lower num_samples={config.num_samples}"), reader_may_leave():
        loaded, tokenizer = load_for_sampling(config)
        model = loaded.build().eval().to(device, pick_dtype(config.dtype, device))
        if config.compile and not isinstance(model, GPT):
            raise InputError("compile=true is for a single GPT: leave it out")
        decoder = Decoder(model, tokenizer.vocab_size, config.compile)
        if config.interactive:
            flags = {"reverses_answers": loaded.reverses_answers}
            interactive.run(functools.partial(stream_text, decoder, tokenizer, **flags), config)
            return 0
        with blames_input("the prompt does not fit this model, give another --start", InputError):
            ids = tokenizers.encode_prompt(tokenizer, prompt)
        streams = [
            TextStream(tokenizer, [config.stop], loaded.reverses_answers)
            for _ in range(config.num_samples)
        ]
        print_samples(prompt, sample_tokens(decoder, ids, config), streams)
    return 0


def print_samples(prompt: str, steps, streams: list[TextStream]) -> None:
    """Show the first text while it is made; the others are made at the same time and follow."""
    later = [""] * len(streams)
    print(prompt, end="", flush=True)
    for step in steps:
        for i, (stream, token) in enumerate(zip(streams, step, strict=True)):
            text = stream.feed(token)
            if i == 0:
                print(text, end="", flush=True)
            else:
                later[i] += text
        if all(stream.is_done for stream in streams):
            break
    print(streams[0].finish())
    print(SEPARATOR)
    for stream, text in zip(streams[1:], later[1:], strict=True):
        print(prompt + text + stream.finish())
        print(SEPARATOR)


if __name__ == "__main__":
    run_command(main)
