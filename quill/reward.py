"""Train a reward model on pairs of completions: a language model with one number for a head.

Usage:
    python -m quill.reward --start_from=out --pairs=pairs.jsonl
    python -m quill.reward --out_dir=out-reward --init_from=resume

The score of the chosen completion should be the higher one (Bradley & Terry 1952; Ouyang et al.
2022). The pairs are lines of {"prompt", "chosen", "rejected"}, as quill.pairs writes them; the last
tenth is held out. `python -m quill.rl --reward=out-reward` trains a policy on the scores.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
from pathlib import Path

import torch

from model import GPTConfig
from quill.errors import InputError, run_command
from quill.posttraining import pairs
from quill.posttraining.loop import Loop, LoopOptions, run_task
from quill.posttraining.pairs import Pairs
from quill.posttraining.policy import pair_loss
from quill.posttraining.reward_model import KIND, RewardModel
from quill.posttraining.rollouts import pack
from quill.settings import option
from quill.training import devices


@dataclasses.dataclass(frozen=True)
class RewardConfig(LoopOptions):
    out_dir: str = option("out-reward", "folder for the checkpoint and metrics")
    pairs: str = option("pairs.jsonl", "file of pairs")
    pairs_per_step: int = option(64, "pairs in a step", min=1, max=10**6)
    batch_size: int = option(256, "pairs that the model reads at a time in evaluations", min=1)


class RewardTask:
    """What a Loop asks of it is said there."""

    command = "reward"

    def __init__(self, loop: Loop):
        self.loop, self.config = loop, loop.config
        if not isinstance(loop.start.config, GPTConfig):
            raise InputError(f"start_from={self.config.start_from}: a bigram reads no completions")
        self.model = RewardModel(loop.start.config).to(loop.device)
        self.model.load_body(loop.start.weights)
        self.model_config = dataclasses.asdict(self.model.config) | {"model": KIND}
        sizes = loop.data.tokenizer, self.model.config.block_size
        self.train_pairs, self.val_pairs = pairs.read(Path(self.config.pairs), *sizes)

    def summary(self) -> str:
        return (
            f"{len(self.train_pairs):,} train and {len(self.val_pairs):,} val pairs, "
            f"{self.config.pairs_per_step} in a step"
        )

    def losses(self, step: int):
        drawn = self.train_pairs.draw(self.config.pairs_per_step, self.config.seed, step)
        losses, is_right, n_tokens = self.of_pairs(drawn)
        yield losses.mean(), {"pairs_right": is_right.float().mean().item(), "tokens": n_tokens}

    def of_pairs(self, drawn: Pairs):
        """-> the loss of each pair, whether its chosen completion scores higher, and all tokens."""
        both = drawn.chosen + drawn.rejected
        batch = pack(drawn.prompts * 2, both, self.loop.device)
        with devices.autocast(self.loop.device, self.loop.dtype):
            chosen, rejected = self.model(batch).split(len(drawn))
        return pair_loss(chosen, rejected), chosen > rejected, sum(map(len, both))

    @torch.no_grad()
    def evaluate(self) -> dict:
        sums = torch.zeros(2)
        for start in range(0, len(self.val_pairs), self.config.batch_size):
            self.loop.check_signals()
            stop = min(start + self.config.batch_size, len(self.val_pairs))
            losses, is_right, _ = self.of_pairs(self.val_pairs.part(range(start, stop)))
            sums += torch.stack((losses.sum(), is_right.sum())).cpu()
        mean_loss, right = (sums / len(self.val_pairs)).tolist()
        return {"val_loss": mean_loss, "val_pairs": right}


def main(argv: list[str]) -> int:
    return run_task(RewardConfig, argv, __doc__, RewardTask)


if __name__ == "__main__":
    run_command(main)
