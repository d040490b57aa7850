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
import functools
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from quill.data import tokenizers
from quill.data.dataset import IGNORE_INDEX
from quill.errors import InputError, run_command
from quill.posttraining import reward_model
from quill.posttraining.loop import Loop, LoopOptions, run_task
from quill.posttraining.policy import (
    clipped_loss,
    group_advantages,
    kl_estimate,
    squared_scores,
    token_log_probs,
)
from quill.posttraining.prompts import Prompts, prompts_of
from quill.posttraining.rewards import AnswerReward, FileReward, ModelReward
from quill.posttraining.rollouts import Rollouts, roll_out
from quill.sampling.decoder import Decoder
from quill.settings import option
from quill.training import devices
from quill.training.evaluation import evaluate_split
from quill.training.models import config_to_dict

VAL_PROMPTS = 10**9  # a step that no training reaches, for the random numbers of evaluations


@dataclasses.dataclass(frozen=True)
class RLConfig(LoopOptions):
    out_dir: str = option("out-rl", "folder for the checkpoint and metrics")
    reward: str = option(
        "answers",
        "answers: the dataset's; a .py file with reward(prompt, completion); or a run "
        "of quill.reward",
    )
    prompts_per_step: int = option(64, "prompts in a step", min=1, max=10**6)
    completions: int = option(8, "of each prompt", min=2, max=10**6)
    updates: int = option(1, "optimizer updates of a step, each with a part of it", min=1)
    prompt_tokens: int = option(16, "of a prompt, where the dataset is a text", min=1)
    max_new_tokens: int = option(256, "in a completion, at most", min=1)
    temperature: float = option(1.0, "of the completions and of the policy", min=1e-3)
    clip_low: float = option(0.2, "a token's probability may fall by this fraction", min=0, max=1)
    clip_high: float = option(0.28, "or grow by this one, before its gradient is cut off", min=0)
    kl_weight: float = option(0.0, "of the divergence from start_from, in the loss", min=0)
    scale_advantages: bool = option(True, "divide rewards by their group's standard deviation")
    baseline: Literal["mean", "optimal"] = option(
        "mean", "what a reward is compared with; optimal: a mean that makes the least noise"
    )
    val_prompts: int = option(200, "held out, for the mean reward of an evaluation", min=1)
    batch_size: int = option(256, "windows or completions that a model reads at a time", min=1)


class PolicyTask:
    """What a Loop asks of it is said there."""

    command = "rl"

    def __init__(self, loop: Loop):
        self.loop, self.config, self.data = loop, loop.config, loop.data
        self.model = loop.start.build().to(loop.device)
        self.model_config = config_to_dict(self.model.config)
        self.reference = loop.start.build().eval().to(loop.device)
        self.decoder = Decoder(self.model, self.data.tokenizer.vocab_size)
        self.reward = self.make_reward()
        self.train, self.val = (
            prompts_of(split, self.config.prompt_tokens)
            for split in (self.data.train, self.data.val)
        )

    def make_reward(self):
        name, path = self.config.reward, Path(self.config.reward)
        if name == "answers":
            if self.data.train.mask is None:
                raise InputError(
                    f"reward=answers: dataset {self.config.dataset!r} is a text without prompts "
                    "and answers; give --reward=FILE.py or a reward model"
                )
            return AnswerReward(self.data.reverses_answers)
        if path.suffix == ".py":
            return FileReward(path)
        model, tokenizer = reward_model.load(path)
        if tokenizer.to_json() != self.data.tokenizer.to_json():
            raise InputError(f"reward={name} has another tokenizer than {self.config.dataset!r}")
        return ModelReward(model.to(self.loop.device), self.config.batch_size)

    def summary(self) -> str:
        c = self.config
        return (
            f"{len(self.train):,} train and {len(self.val):,} val prompts, "
            f"{c.prompts_per_step} x {c.completions} completions in a step"
        )

    # ---- a step --------------------------------------------------------------------------------

    def losses(self, step: int):
        config = self.config
        prompts = self.train.draw(config.prompts_per_step, config.seed, step)
        rollouts, rewards = self.scored(self.train, prompts, config.completions, step)
        with torch.no_grad():
            old, _, scores = self.log_probs(self.model, rollouts)
            reference, *_ = self.log_probs(self.reference, rollouts)
        shape = (-1, config.completions)
        weights = scores.view(shape) if config.baseline == "optimal" else None
        groups = torch.from_numpy(rewards).to(self.loop.device).view(shape)
        advantages = group_advantages(groups, weights, config.scale_advantages)
        report = {
            "reward": float(rewards.mean()),
            "groups_used": float((advantages != 0).any(dim=1).float().mean()),
            "length": float(rollouts.lengths.mean()),
        }
        for rows in self.parts(advantages, step):
            loss, own = self.loss(rollouts, rows, advantages.flatten()[rows], old, reference)
            yield loss, report | own | {"tokens": int(rollouts.lengths[rows.cpu()].sum())}

    def scored(
        self, prompts: Prompts, places, n_each: int, step: int
    ) -> tuple[Rollouts, np.ndarray]:
        """-> n_each completions of each of these prompts, and their rewards (N,)."""
        tokenizer, config = self.data.tokenizer, self.config
        ids = [prompts.prompt(i) for i in places]
        seed = [config.seed, step]
        self.model.eval()
        rollouts = roll_out(
            self.decoder, tokenizer, ids, n_each, config.max_new_tokens, config.temperature, seed
        )
        self.model.train()
        decode = functools.partial(tokenizers.decode, tokenizer)
        asked = [decode(prompt) for prompt in ids for _ in range(n_each)]
        answers = [decode(prompts.answer(i)[:-1]) for i in places for _ in range(n_each)]
        return rollouts, self.reward(asked, answers, rollouts)

    def log_probs(self, model, rollouts, rows=slice(None)):
        """-> the log-probability of each token of the completions and the entropy there, (N, T),
        and the completions' squared_scores (N,).
        """
        parts = []
        idx, targets = rollouts.idx[rows], rollouts.targets[rows]
        size = self.config.batch_size
        for part, wanted in zip(idx.split(size), targets.split(size), strict=True):
            with devices.autocast(self.loop.device, self.loop.dtype):
                logits, _ = model(part)
            logits = logits[..., : self.data.tokenizer.vocab_size]
            of_tokens = token_log_probs(logits, wanted, self.config.temperature)
            with torch.no_grad():
                parts.append((*of_tokens, squared_scores(logits, wanted, self.config.temperature)))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def parts(self, advantages, step: int) -> list[torch.Tensor]:
        """The rows of each update. Groups without signal are left out (DAPO, Yu et al. 2025),
        unless none has any.
        """
        has_signal = (advantages != 0).any(dim=1)
        groups = has_signal.nonzero()[:, 0].cpu().numpy() if has_signal.any() else np.arange(1)
        groups = np.random.default_rng([self.config.seed, step]).permutation(groups)
        rows = groups[:, None] * self.config.completions + np.arange(self.config.completions)
        n_updates = min(self.config.updates, len(groups))
        return [
            torch.from_numpy(part.flatten()).to(self.loop.device)
            for part in np.array_split(rows, n_updates)
        ]

    def loss(self, rollouts: Rollouts, rows, advantages, old, reference):
        """The mean over the tokens of these rows (N,), and what to report of it."""
        config = self.config
        log_probs, entropy, _ = self.log_probs(self.model, rollouts, rows)
        counts = rollouts.targets[rows] != IGNORE_INDEX
        n_tokens = counts.sum()
        losses, is_clipped = clipped_loss(
            log_probs, old[rows], advantages[:, None], config.clip_low, config.clip_high
        )
        kl = kl_estimate(log_probs, reference[rows])  # 0 where there is no token
        loss = ((losses * counts).sum() + config.kl_weight * kl.sum()) / n_tokens
        report = {
            "kl": kl.sum() / n_tokens,
            "entropy": entropy.sum() / n_tokens,
            "clipped": (is_clipped & counts).sum() / n_tokens,
        }
        return loss, {name: float(value.detach()) for name, value in report.items()}

    # ---- evaluation ----------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict:
        loop, config = self.loop, self.config
        val_loss, val_exact = evaluate_split(
            self.model, self.data.val, config.batch_size, loop.dtype, loop.check_signals
        )
        places = self.val.spread(config.val_prompts)
        rollouts, rewards = self.scored(self.val, places, 1, VAL_PROMPTS)
        log_probs, *_ = self.log_probs(self.model, rollouts)
        reference, *_ = self.log_probs(self.reference, rollouts)
        kl = (log_probs - reference).sum() / int(rollouts.lengths.sum())
        metrics = {"val_loss": val_loss, "val_reward": float(rewards.mean()), "val_kl": float(kl)}
        if self.data.val.examples is not None:
            metrics["val_exact"] = val_exact
        return metrics


def main(argv: list[str]) -> int:
    return run_task(RLConfig, argv, __doc__, PolicyTask)


if __name__ == "__main__":
    run_command(main)
