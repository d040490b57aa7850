"""What a run's checkpoint holds: taken from a Trainer, compared with it, put back into it.

In a run of several processes the functions are called by all of them, and a checkpoint is the same
as that of a run of one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from model import GPTConfig
from quill.data import tokenizers
from quill.errors import InputError
from quill.training import distributed
from quill.training.checkpoint import MISFITS, differences
from quill.training.optimizers import restore

if TYPE_CHECKING:
    from quill.training.trainer import Trainer


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer updates made, or skipped
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    stale_evaluations: int = 0  # since the best one
    evaluated_step: int = -1  # the last step whose evaluation is in the metrics
    skipped_steps: list = dataclasses.field(default_factory=list)  # not finite


def weights(trainer: Trainer) -> dict:
    """What sampling needs."""
    model = trainer.model.state_dict()
    tied = {"lm_head.weight"} & model.keys() if trainer.model_config.tied_head else set()
    model = _gathered({name: p for name, p in model.items() if name not in tied})
    model |= {name: model["transformer.wte.weight"] for name in tied}
    return {
        "model": model,
        "model_config": dataclasses.asdict(trainer.model_config),
        "config": dataclasses.asdict(trainer.config),
        "tokenizer": trainer.meta.tokenizer,
        "step": trainer.progress.step,
        "best_val_loss": trainer.progress.best_val_loss,
        "text_sha256": trainer.meta.sha256,
    }


def everything(trainer: Trainer) -> dict:
    """All that an exact resume needs; no random state, which `devices.seed_step` derives."""
    return weights(trainer) | {
        "optimizers": [_gathered(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "average": _gathered(trainer.average),
        "scaler": trainer.scaler.state_dict(),
        "progress": dataclasses.asdict(trainer.progress),
    }


def _gathered(value):
    """The same with every tensor whole; of several processes, only the main one keeps them."""
    if isinstance(value, dict):
        return {name: _gathered(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gathered(part) for part in value)
    if not torch.is_tensor(value) or distributed.size() == 1:
        return value
    value = distributed.whole(value)
    return value.cpu() if distributed.is_main() else None


def check_same_run(trainer: Trainer, saved: dict) -> None:
    """Raises InputError with every difference that makes the saved state unusable here."""
    config, path = trainer.config, trainer.out_dir / "ckpt.pt"
    defaults = dataclasses.asdict(GPTConfig())  # what an older checkpoint did not know yet
    then = defaults | saved["model_config"] | {"optimizer": saved["config"].get("optimizer")}
    now = dataclasses.asdict(trainer.model_config) | {"optimizer": config.optimizer}
    different = differences(then, now, free={"dropout", "init_std"})
    tokenizer = tokenizers.from_json(saved["tokenizer"], str(path))
    if tokenizer.to_json() != trainer.tokenizer.to_json():
        different.append(f"dataset {config.dataset!r} now has another tokenizer")
    if saved.get("text_sha256") != trainer.meta.sha256:
        different.append(f"dataset {config.dataset!r} is now made of another text")
    if different:
        raise InputError(
            f"{path} cannot be resumed: {', '.join(different)}; leave these options out, or "
            "start a new run in another --out_dir"
        )
    if saved["step"] > config.max_iters:
        raise InputError(f"max_iters={config.max_iters} lies before step {saved['step']} of {path}")


def put_back(trainer: Trainer, saved: dict) -> None:
    """Raises InputError when the saved state does not fit the model or its optimizers."""
    try:
        trainer.progress = _progress(saved)
        put_weights(trainer, saved["model"])
        if trainer.average:  # a run that kept none starts one from its present weights
            params = [distributed.whole(p) for p in trainer.model.parameters()]
            _copy(trainer.average, saved["average"] or params)
        for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
            restore(optimizer, state, has_stepped=trainer.progress.step > 0)
        if trainer.scaler.is_enabled():
            _restore_scaler(trainer.scaler, saved["scaler"])
    except MISFITS as error:
        path = trainer.out_dir / "ckpt.pt"
        raise InputError(f"{path} is not usable for a resume: {error}") from None


def put_weights(trainer: Trainer, weights: dict) -> None:
    """Raises ValueError when they are not those of the trainer's model."""
    named = trainer.model.state_dict()
    if named.keys() != weights.keys():
        raise ValueError("its weights are not the model's")
    _copy([*named.values()], [weights[name] for name in named])


def _progress(saved: dict) -> Progress:
    progress = Progress(**saved["progress"])
    for name, value in vars(Progress()).items():
        if type(getattr(progress, name)) is not type(value):
            raise ValueError(f"progress.{name} has another type")
    counts = [progress.step, progress.tokens, progress.stale_evaluations, *progress.skipped_steps]
    is_possible = all(type(count) is int and 0 <= count < 2**62 for count in counts)
    if not is_possible or progress.step != saved["step"] or not math.isfinite(progress.seconds):
        raise ValueError(f"its progress is not possible: {progress}")
    return progress


@torch.no_grad()
def _copy(targets: list, saved: list) -> None:
    for target, tensor in zip(targets, saved, strict=True):
        if target.shape != tensor.shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not fit the model")
        tensor = distributed.spread(tensor, like=target)
        distributed.own_part(target).copy_(distributed.own_part(tensor))


def _restore_scaler(scaler: torch.amp.GradScaler, saved: dict) -> None:
    if not all(type(value) in (int, float) and value >= 0 for value in saved.values()):
        raise ValueError("its loss scale is not usable")
    scaler.load_state_dict(saved)
