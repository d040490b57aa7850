"""Losses and gradients that are not finite: skipped steps, and the loss scale of float16."""

import torch

from quill.errors import RunError


class NonFiniteGuard:
    """Remembers on the device which steps were not finite, so that no step waits for it.

    The first skip_nonfinite of them are skipped. The next one ends the run, at the next log line or
    evaluation; until then every update is skipped, so that the weights stay as they were.
    """

    def __init__(self, config, device: torch.device):
        self.n_allowed = config.skip_nonfinite
        self.remedies = f"learning_rate ({config.learning_rate})"
        if config.optimizer == "muon":
            self.remedies += f" or muon_learning_rate ({config.muon_learning_rate})"
        if not 0 < config.grad_clip <= 1:
            self.remedies += ", set grad_clip=1.0"
        self.slots = torch.arange(self.n_allowed + 1, device=device)
        self.bad_steps = torch.zeros_like(self.slots)  # numbered from 1; 0 is an empty slot

    def restore(self, skipped_steps: list[int]) -> None:
        """Those of a run that is resumed."""
        known = skipped_steps[: self.n_allowed]
        self.bad_steps[: len(known)] = torch.tensor(known, dtype=torch.int64)

    def record(self, loss, grad_norm, step):
        """Note the step, counted from 0, if it is not finite; -> 1.0 to skip its update, or 0.0.

        All of these are tensors on the device. A step of several updates is noted once.
        """
        is_bad = ~torch.isfinite(loss + grad_norm)
        is_over = self.bad_steps[-1] > 0
        next_slot = self.slots == (self.bad_steps > 0).sum()
        is_new = (self.bad_steps != step + 1).all()
        self.bad_steps.copy_(torch.where(next_slot & is_bad & is_new, step + 1, self.bad_steps))
        return (is_bad | is_over).float()

    def report(self, known: list[int], log) -> None:
        """Log the steps skipped since the last call and append them to `known`.

        Waits for the device. Raises RunError when they are too many.
        """
        bad_steps = [step for step in self.bad_steps.tolist() if step > 0]
        for step in bad_steps[: self.n_allowed]:
            if step not in known:
                known.append(step)
                log.skipped(step, len(known), self.n_allowed)
        if len(bad_steps) > self.n_allowed:
            raise RunError(
                f"the loss or its gradient was not finite at step {bad_steps[-1]}; stopped before "
                f"that update, which no checkpoint has: lower {self.remedies}, raise warmup_iters, "
                f"or allow more than skip_nonfinite={self.n_allowed}"
            )


class LossScaler(torch.amp.GradScaler):
    """Scales the loss for float16, whose range is too small for gradients. Micikevicius 2018.

    A step whose gradients overflowed is made again, not left out: max_iters counts updates.
    """

    def prepare_retry(self, loss, grad_norm, optimizers: list) -> bool:
        """Whether the gradients overflowed; then the scale is lowered and they are zeroed.

        Not if the loss itself is not finite, which a lower scale would not mend.
        """
        if not self.is_enabled() or torch.isfinite(grad_norm) or not torch.isfinite(loss):
            return False
        if self.get_scale() < 1:
            return False
        self.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        return True
