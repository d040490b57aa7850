"""Write pairs of a model's own completions, of which a judge prefers one.

Usage:
    python -m quill.pairs config/verse.py --start_from=out --n_pairs=5000 --to=pairs.jsonl

The judge is a Python file with a function reward(prompt, completion); what scores higher is chosen,
and pairs that score alike are left out. A line is {"prompt", "chosen", "rejected"}.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import json
from pathlib import Path

from quill import settings
from quill.data import tokenizers
from quill.errors import InputError, run_command
from quill.files import atomic_write, refuse_to_replace, show_progress
from quill.interop import pretrained
from quill.posttraining.prompts import prompts_of
from quill.posttraining.rewards import FileReward
from quill.posttraining.rollouts import roll_out
from quill.sampling.decoder import Decoder
from quill.settings import option
from quill.training import checks, devices
from quill.training.splits import open_splits


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    judge: str = option("", "a .py file with reward(prompt, completion)")
    start_from: str = option("", "folder of the run, or other weights, that write the completions")
    to: str = option("pairs.jsonl", "the file to write")
    dataset: str = option("", "folder below data/; if empty, the one it was trained on")
    margin: float = option(0.0, "pairs whose scores differ by no more are left out", min=0)
    n_pairs: int = option(5000, "pairs to write", min=1, max=10**9)
    prompt_tokens: int = option(16, "of a prompt, where the dataset is a text", min=1)
    max_new_tokens: int = option(256, "in a completion, at most", min=1)
    temperature: float = option(1.0, "of the completions", min=1e-3)
    batch_size: int = option(256, "pairs at a time", min=1, max=10**6)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = option(1337, "of everything that is drawn", min=0, max=2**32 - 1)


def main(argv: list[str]) -> int:
    config = settings.load(PairsConfig, argv, usage=__doc__, positional="judge")
    if not config.judge or not config.start_from:
        raise InputError("give a judge, a .py file, and --start_from=DIR, the folder of a run")
    refuse_to_replace(Path(config.to))
    judge, device = FileReward(Path(config.judge)), devices.pick_device(config.device)
    loaded = pretrained.load(config.start_from)
    dataset = config.dataset or loaded.dataset or ""
    data = open_splits(dataset, loaded.config.block_size, device)
    checks.check_tokenizer(dataset, data, loaded, config.start_from)
    checks.note_replaced_text(dataset, data, loaded, config.start_from)
    prompts = prompts_of(data.train, config.prompt_tokens)
    decoder = Decoder(loaded.build().eval().to(device), data.tokenizer.vocab_size)
    n_written = n_equal = step = 0
    advice = devices.out_of_memory_advice("lower batch_size")
    with advice, atomic_write(Path(config.to)) as (file,):
        while n_written < config.n_pairs:
            for line in judged(config, step, prompts, decoder, data.tokenizer, judge):
                if line is None:
                    n_equal += 1
                elif n_written < config.n_pairs:
                    file.write((json.dumps(line) + "\n").encode())
                    n_written += 1
            step += 1
            if n_equal > 100 * (n_written + config.batch_size):
                raise InputError(f"{config.judge} scores nearly all pairs alike")
            show_progress("pairs", n_written, config.n_pairs)
    print(f"wrote {config.to}: {n_written:,} pairs; {n_equal:,} that score too much alike left out")
    return 0


def judged(config: PairsConfig, step: int, prompts, decoder, tokenizer, judge):
    """Yields a dict for each pair of a batch, None where both score nearly the same."""
    places = prompts.draw(config.batch_size, config.seed, step)
    ids = [prompts.prompt(i) for i in places]
    sizes = config.max_new_tokens, config.temperature
    rollouts = roll_out(decoder, tokenizer, ids, 2, *sizes, [config.seed, step])
    asked = [tokenizers.decode(tokenizer, prompt) for prompt in ids for _ in range(2)]
    scores = judge(asked, [], rollouts)
    for i in range(0, len(asked), 2):
        first, second = rollouts.texts[i : i + 2]
        if abs(scores[i] - scores[i + 1]) <= config.margin:
            yield None
            continue
        chosen, rejected = (first, second) if scores[i] > scores[i + 1] else (second, first)
        yield {"prompt": asked[i], "chosen": chosen, "rejected": rejected}


if __name__ == "__main__":
    run_command(main)
