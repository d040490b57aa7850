"""Train a policy on pairs of completions, without a reward: direct preference optimization.

Usage:
    python -m quill.dpo --start_from=out --pairs=pairs.jsonl
    python -m quill.dpo --out_dir=out-dpo --init_from=resume

Rafailov et al. 2023. The pairs are lines of {"prompt", "chosen", "rejected"}, as quill.pairs writes
them; the last tenth is held out.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses

import torch

from quill.errors import run_command
from quill.posttraining.loop import Loop, run_task
from quill.posttraining.pairs import Pairs, PairsTask
from quill.posttraining.policy import dpo_loss
from quill.posttraining.rollouts import Rollouts, pack
from quill.posttraining.task import PolicyOptions, PolicyTask
from quill.settings import option


@dataclasses.dataclass(frozen=True)
class DPOConfig(PolicyOptions):
    out_dir: str = option("out-dpo", "folder for the checkpoint and metrics")
    pairs: str = option("pairs.jsonl", "file of pairs")
    pairs_per_step: int = option(64, "pairs in a step", min=1, max=10**6)
    beta: float = option(0.1, "higher: stay closer to start_from", min=1e-6)


class DPOTask(PairsTask, PolicyTask):
    """What a Loop asks of it is said there."""

    command = "dpo"

    def __init__(self, loop: Loop):
        super().__init__(loop)
        self.open_pairs(loop, self.model.config.block_size)

    def of_pairs(self, drawn: Pairs):
        """-> the loss of each pair, whether its chosen completion gained more, and all tokens."""
        both = drawn.chosen + drawn.rejected
        batch = pack(drawn.prompts * 2, both, self.loop.device)
        log_probs = self.log_probs(self.model, batch)[0].sum(dim=1)
        with torch.no_grad():
            reference = self.log_probs(self.reference, batch)[0].sum(dim=1)
        n = len(drawn)
        losses = dpo_loss(*log_probs.split(n), *reference.split(n), self.config.beta)
        chosen, rejected = (log_probs - reference).split(n)
        return losses, chosen > rejected, sum(map(len, both))

    def evaluate_rollouts(self, places, rollouts: Rollouts) -> dict:
        mean_loss, right = self.evaluate_pairs()
        return {"val_dpo": mean_loss, "val_pairs": right}


def main(argv: list[str]) -> int:
    return run_task(DPOConfig, argv, __doc__, DPOTask)


if __name__ == "__main__":
    run_command(main)
