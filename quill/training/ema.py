"""An exponential moving average of the weights. Polyak & Juditsky 1992."""

import contextlib

import torch

from quill.training.distributed import to_local


class EMA:
    """The average of a model's weights over the steps; with decay 0 there is none.

    Not swa_utils.AveragedModel: that copies the module, to be compiled a second time, and waits for
    the device where the decay depends on the step.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.restart()

    def restart(self) -> None:
        """From the present weights."""
        self.average = [p.clone() for p in self._weights()]

    def update(self, step: torch.Tensor, found_inf: torch.Tensor) -> None:
        """After the update of this step, counted from 0. The decay starts low: 1/10, 2/11, ...

        found_inf: 1.0 where the update was skipped, which the average then is too.
        """
        if self.decay:
            decay = ((1 + step) / (10 + step)).clamp(max=self.decay)
            average = [to_local(a) for a in self.average]
            change = torch._foreach_sub([to_local(p) for p in self._weights()], average)
            torch._foreach_mul_(change, (1 - decay) * (1 - found_inf))
            torch._foreach_add_(average, change)

    @contextlib.contextmanager
    def as_weights(self):
        """In the block the model has the averaged weights."""
        if not self.decay:
            yield
            return
        weights = [to_local(p) for p in self._weights()]
        latest = [p.clone() for p in weights]
        torch._foreach_copy_(weights, [to_local(a) for a in self.average])
        try:
            yield
        finally:
            torch._foreach_copy_(weights, latest)

    def _weights(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.model.parameters()] if self.decay else []
