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


from model import GPTConfig
from quill.errors import InputError, run_command
from quill.posttraining.loop import Loop, LoopOptions, run_task
from quill.posttraining.pairs import Pairs, PairsTask
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


class RewardTask(PairsTask):
    """What a Loop asks of it is said there."""

    command = "reward"

    def __init__(self, loop: Loop):
        if not isinstance(loop.start.config, GPTConfig):
            raise InputError(f"start_from={loop.config.start_from}: a bigram reads no completions")
        self.model = RewardModel(loop.start.config).to(loop.device)
        self.model.load_body(loop.start.weights)
        self.model_config = dataclasses.asdict(self.model.config) | {"model": KIND}
        self.open_pairs(loop, self.model.config.block_size)

    def of_pairs(self, drawn: Pairs):
        """-> the loss of each pair, whether its chosen completion scores higher, and all tokens."""
        both = drawn.chosen + drawn.rejected
        batch = pack(drawn.prompts * 2, both, self.loop.device)
        with devices.autocast(self.loop.device, self.loop.dtype):
            chosen, rejected = self.model(batch).split(len(drawn))
        return pair_loss(chosen, rejected), chosen > rejected, sum(map(len, both))

    def evaluate(self) -> dict:
        mean_loss, right = self.evaluate_pairs()
        return {"val_loss": mean_loss, "val_pairs": right}


def main(argv: list[str]) -> int:
    return run_task(RewardConfig, argv, __doc__, RewardTask)


if __name__ == "__main__":
    run_command(main)
