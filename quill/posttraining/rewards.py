"""How good a completion is: the dataset's own answers, a rule in a file, or a reward model."""

import numbers
from pathlib import Path

import numpy as np
import torch

from quill import settings
from quill.data.problems import plain_answer
from quill.errors import InputError, blames_program
from quill.posttraining.reward_model import RewardModel
from quill.posttraining.rollouts import Rollouts

LARGEST = float(np.finfo(np.float32).max)


class AnswerReward:
    """1 for the dataset's answer, 0 for any other, and for one that does not end."""

    def __init__(self, reverses_answers: bool):
        self.reverses_answers = reverses_answers  # compare what a person would read

    def __call__(self, prompts: list[str], answers: list[str], rollouts: Rollouts) -> np.ndarray:
        """prompts, answers: of each of the N rollouts -> (N,) float32."""
        read = plain_answer if self.reverses_answers else str
        right = [read(t) == read(a) for t, a in zip(rollouts.texts, answers, strict=True)]
        return (np.array(right) & rollouts.is_ended).astype(np.float32)


class FileReward:
    """What the function `reward(prompt, completion)` of a Python file returns."""

    def __init__(self, path: Path):
        self.path = path
        self.function = settings.run_program(str(path), "reward file").get("reward")
        if not callable(self.function):
            raise InputError(f"reward file {path} defines no function reward(prompt, completion)")

    def of(self, prompt: str, completion: str) -> float:
        with blames_program(
            str(self.path), f"{self.path}: reward({prompt[-40:]!r}, {completion[:40]!r})"
        ):
            value = self.function(prompt, completion)
            value = value.item() if hasattr(value, "item") else value  # NumPy's and PyTorch's
            is_number = isinstance(value, numbers.Real) and abs(value) <= LARGEST
            shown = repr(value)[:40]
        if not is_number:
            raise InputError(f"{self.path}: reward returned {shown}, no number that float32 holds")
        return float(value)

    def __call__(self, prompts: list[str], answers: list[str], rollouts: Rollouts) -> np.ndarray:
        pairs = zip(prompts, rollouts.texts, strict=True)
        return np.array([self.of(*pair) for pair in pairs], dtype=np.float32)


class ModelReward:
    """The score of a reward model (quill.reward), which read the same pairs of a judge."""

    def __init__(self, model: RewardModel, batch_size: int):
        self.model, self.batch_size = model, batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[str], answers: list[str], rollouts: Rollouts) -> np.ndarray:
        parts = rollouts.split(self.batch_size)
        return torch.cat([self.model(part) for part in parts]).cpu().numpy()
