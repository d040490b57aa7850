"""What tasks that train a policy have in common: its start, its completions, its evaluation."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from quill.data import tokenizers
from quill.posttraining.loop import Loop, LoopOptions
from quill.posttraining.policy import token_log_probs
from quill.posttraining.prompts import Prompts, prompts_of
from quill.posttraining.rewards import FileReward
from quill.posttraining.rollouts import Batch, Rollouts, roll_out
from quill.sampling.decoder import Decoder
from quill.settings import option
from quill.training import checks, devices, lora
from quill.training.evaluation import evaluate_split
from quill.training.models import config_to_dict

VAL_PROMPTS = 10**9  # a step that no training reaches, for the random numbers of evaluations


@dataclasses.dataclass(frozen=True)
class PolicyOptions(LoopOptions):
    lora_rank: int = option(0, "train adapters of this rank alone; 0: all", min=0, max=10**5)
    judge: str = option("", "a .py file with reward(prompt, completion), to evaluate with")
    prompt_tokens: int = option(16, "of a prompt, where the dataset is a text", min=1)
    max_new_tokens: int = option(256, "in a completion, at most", min=1)
    temperature: float = option(1.0, "of the completions and of the policy", min=1e-3)
    val_prompts: int = option(200, "held out, for an evaluation's completions", min=1, max=10**6)
    batch_size: int = option(256, "windows or completions that a model reads at a time", min=1)


class PolicyTask:
    """A model that starts as `reference`, which stays as it is."""

    def __init__(self, loop: Loop):
        self.loop, self.config, self.data = loop, loop.config, loop.data
        self.model = loop.start.build()
        if loop.config.lora_rank:
            checks.check_lora(loop.config.lora_rank, self.model.config, has_weights=True)
            lora.add_adapters(self.model, loop.config.lora_rank)
        self.model.to(loop.device)
        self.model_config = config_to_dict(self.model.config)
        self.reference = loop.start.build().eval().to(loop.device)
        self.decoder = Decoder(self.model, self.data.tokenizer.vocab_size)
        self.judge = FileReward(Path(self.config.judge)) if self.config.judge else None
        self.train, self.val = (
            prompts_of(split, self.config.prompt_tokens)
            for split in (self.data.train, self.data.val)
        )

    def roll_out(self, prompts: Prompts, places, n_each: int, step: int) -> Rollouts:
        ids = [prompts.prompt(i) for i in places]
        config, seed = self.config, [self.config.seed, step]
        return roll_out(
            self.decoder,
            self.data.tokenizer,
            ids,
            n_each,
            config.max_new_tokens,
            config.temperature,
            seed,
        )

    def score(self, reward, prompts: Prompts, places, rollouts: Rollouts) -> np.ndarray:
        """The rewards (N,) of completions of the prompts at these places."""
        tokenizer, n_each = self.data.tokenizer, len(rollouts.texts) // len(places)
        asked = [tokenizers.decode(tokenizer, prompts.prompt(i)) for i in places]
        answers = [tokenizers.decode(tokenizer, prompts.answer(i)[:-1]) for i in places]
        asked, answers = ([t for t in texts for _ in range(n_each)] for texts in (asked, answers))
        return reward(asked, answers, rollouts)

    def log_probs(self, model, batch: Batch, of=token_log_probs):
        """-> the log-probability of each token of the completions and the entropy there, (N, T).

        of: another function of logits, targets and temperature -> tensors of N rows.
        """
        places, parts, T = [], [], batch.targets.size(1)
        for rows, part in batch.by_length(self.config.batch_size):
            with devices.autocast(self.loop.device, self.loop.dtype):
                logits, _ = model(part.idx)
            logits = logits[..., : self.data.tokenizer.vocab_size]
            values = of(logits, part.targets, self.config.temperature)
            padding = T - part.targets.size(1)
            parts.append([F.pad(v, (0, padding)) if v.dim() == 2 else v for v in values])
            places.append(rows)
        order = torch.cat(places).argsort()
        return tuple(torch.cat(column)[order] for column in zip(*parts, strict=True))

    @torch.no_grad()
    def evaluate(self) -> dict:
        """On the val split: its loss, and how the policy completes some of its prompts."""
        loop, config = self.loop, self.config
        split, sizes = self.data.val, (config.batch_size, loop.dtype)
        whole = split.eval_offsets(0, whole=True)
        val_loss, val_exact = evaluate_split(self.model, split, whole, *sizes, loop.check_signals)
        places = self.val.spread(config.val_prompts)
        rollouts = self.roll_out(self.val, places, 1, VAL_PROMPTS)
        log_probs, _ = self.log_probs(self.model, rollouts)
        reference, _ = self.log_probs(self.reference, rollouts)
        kl = (log_probs - reference).sum() / int(rollouts.lengths.sum())
        metrics = {"val_loss": val_loss, "val_kl": float(kl)}
        if self.data.val.examples is not None:
            metrics["val_exact"] = val_exact
        if self.judge is not None:
            scores = self.score(self.judge, self.val, places, rollouts)
            metrics["val_judge"] = float(scores.mean())
        return metrics | self.evaluate_rollouts(places, rollouts)

    def evaluate_rollouts(self, places, rollouts: Rollouts) -> dict:
        """Further metrics of a task."""
        return {}
