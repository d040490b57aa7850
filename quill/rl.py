"""Train a policy on the rewards of its own completions, by group-relative policy gradients.

Usage:
    python -m quill.rl config/rl_addition.py --start_from=out-addition
    python -m quill.rl --start_from=out --reward=config/verse.py       a rule of your own
    python -m quill.rl --start_from=out --reward=out-reward            a reward model
    python -m quill.rl --out_dir=out-rl --init_from=resume

A step writes several completions of each of some prompts, scores them, and makes those that are
better than the others of their prompt more probable (GRPO, Shao et al. 2024).
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from quill.data.dataset import IGNORE_INDEX
from quill.errors import InputError, run_command
from quill.files import sha256_of_file
from quill.interop.start import lies_in
from quill.posttraining import reward_model
from quill.posttraining.loop import Loop, run_task
from quill.posttraining.policy import (
    clipped_loss,
    group_advantages,
    kl_estimate,
    squared_scores,
    token_log_probs,
)
from quill.posttraining.rewards import AnswerReward, FileReward, ModelReward
from quill.posttraining.rollouts import Batch, Rollouts
from quill.posttraining.task import PolicyOptions, PolicyTask
from quill.settings import option
from quill.training import state_dict


SCREENING = 2 * 10**9  # added to a step, for random numbers of its own


@dataclasses.dataclass(frozen=True)
class RLConfig(PolicyOptions):
    out_dir: str = option("out-rl", "folder for the checkpoint and metrics")
    reward: str = option(
        "answers",
        "answers: the dataset's; a .py file with reward(prompt, completion); or a run of "
        "quill.reward",
    )
    prompts_per_step: int = option(64, "prompts in a step", min=1, max=10**6)
    completions: int = option(8, "of each prompt", min=2, max=10**6)
    screened: int = option(1, "times the prompts, asked once: the worst stay", min=1, max=10**6)
    updates: int = option(1, "optimizer updates of a step, each with a part of it", min=1)
    clip_low: float = option(0.2, "a token's probability may fall by this fraction", min=0, max=1)
    clip_high: float = option(0.28, "or grow by this one; its gradient then ends", min=0, max=1e9)
    kl_weight: float = option(0.0, "of the divergence from start_from, in the loss", min=0)
    scale_advantages: bool = option(True, "divide rewards by their group's standard deviation")
    baseline: Literal["mean", "optimal"] = option(
        "mean", "what a reward is compared with; optimal: a mean that makes the least noise"
    )


class RLTask(PolicyTask):
    """What a Loop asks of it is said there."""

    command = "rl"

    def __init__(self, loop: Loop):
        super().__init__(loop)
        self.reward = self.make_reward()

    def make_reward(self):
        name, path = self.config.reward, Path(self.config.reward)
        if name == "answers":
            if self.data.train.mask is None:
                raise InputError(
                    f"reward=answers: dataset {self.config.dataset!r} is a text without prompts "
                    "and answers; give --reward=FILE.py or a reward model"
                )
            self.loop.made_of["reward"] = name
            return AnswerReward(self.data.reverses_answers)
        if path.suffix == ".py":
            reward = FileReward(path)
            self.loop.made_of["reward"] = sha256_of_file(path)
            return reward
        if lies_in(name, self.config.out_dir):
            raise InputError(f"out_dir={name} is the reward model's: choose another folder")
        model, tokenizer = reward_model.load(path)
        if tokenizer.to_json() != self.data.tokenizer.to_json():
            raise InputError(f"reward={name} has another tokenizer than {self.config.dataset!r}")
        self.loop.made_of["reward"] = state_dict.digest(model.state_dict())
        return ModelReward(model.to(self.loop.device), self.config.batch_size)

    def summary(self) -> str:
        c = self.config
        return (
            f"{len(self.train):,} train and {len(self.val):,} val prompts, "
            f"{c.prompts_per_step} x {c.completions} completions in a step"
        )

    def losses(self, step: int):
        config = self.config
        places = self.pick_prompts(step)
        rollouts = self.roll_out(self.train, places, config.completions, step)
        rewards = self.score(self.reward, self.train, places, rollouts)
        report = {"reward": float(rewards.mean()), "length": float(rollouts.lengths.mean())}
        groups = torch.from_numpy(rewards).view(-1, config.completions)
        has_signal = (groups != groups[:, :1]).any(dim=1)
        report["groups_used"] = has_signal.float().mean().item()
        used = self.pick_groups(has_signal, step)
        rows = (used[:, None] * config.completions + torch.arange(config.completions)).flatten()
        batch = rollouts.part(rows.to(self.loop.device))
        with torch.no_grad():
            old, scores = self.log_probs(self.model, batch, of=log_probs_and_scores)
            reference, _ = self.log_probs(self.reference, batch)
        groups = groups[used].to(self.loop.device)
        weights = scores.view(groups.shape) if config.baseline == "optimal" else None
        advantages = group_advantages(groups, weights, config.scale_advantages).flatten()
        for part in torch.arange(len(rows)).tensor_split(min(config.updates, len(used))):
            own = batch.part(part)
            loss, more = self.loss(own, advantages[part], old[part], reference[part])
            yield loss, report | more | {"tokens": int((own.targets != IGNORE_INDEX).sum())}

    def pick_prompts(self, step: int) -> np.ndarray:
        """Those of a step, (prompts_per_step,). With screening, those that are not solved yet."""
        n, screened = self.config.prompts_per_step, self.config.screened
        places = self.train.draw(n * screened, self.config.seed, step)
        if screened == 1:
            return places
        asked_once = self.roll_out(self.train, places, 1, SCREENING + step)
        rewards = self.score(self.reward, self.train, places, asked_once)
        return places[rewards.argsort(kind="stable")[:n]]

    def pick_groups(self, has_signal, step: int) -> torch.Tensor:
        """The places of the groups to learn from, in random order: those whose rewards are not all
        the same (DAPO, Yu et al. 2025), or a single one, whose advantages are 0.
        """
        used = has_signal.nonzero()[:, 0].numpy() if has_signal.any() else np.arange(1)
        return torch.from_numpy(np.random.default_rng([self.config.seed, step]).permutation(used))

    def loss(self, batch: Batch, advantages, old, reference):
        """The mean over the tokens of these completions, and what to report of it.

        advantages: (N,). old, reference: (N, T), log-probabilities before the step's first update
        and of the start.
        """
        config = self.config
        log_probs, entropy = self.log_probs(self.model, batch)
        counts = batch.targets != IGNORE_INDEX
        n_tokens = counts.sum()
        losses, is_clipped = clipped_loss(
            log_probs, old, advantages[:, None], config.clip_low, config.clip_high
        )
        kl = kl_estimate(log_probs, reference)  # 0 where there is no token
        loss = ((losses * counts).sum() + config.kl_weight * kl.sum()) / n_tokens
        report = {
            "kl": kl.sum() / n_tokens,
            "entropy": entropy.sum() / n_tokens,
            "clipped": (is_clipped & counts).sum() / n_tokens,
        }
        return loss, {name: value.item() for name, value in report.items()}

    def evaluate_rollouts(self, places, rollouts: Rollouts) -> dict:
        rewards = self.score(self.reward, self.val, places, rollouts)
        return {"val_reward": float(rewards.mean())}


def log_probs_and_scores(logits, targets, temperature: float):
    log_probs, _ = token_log_probs(logits, targets, temperature)
    return log_probs, squared_scores(logits, targets, temperature)


def main(argv: list[str]) -> int:
    return run_task(RLConfig, argv, __doc__, RLTask)


if __name__ == "__main__":
    run_command(main)
