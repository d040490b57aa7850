"""Loss scaling for float16, whose range is too small for gradients. Micikevicius et al. 2018."""

from __future__ import annotations

import torch


class LossScaler(torch.amp.GradScaler):
    """A GradScaler that has a step made again when its gradients overflowed.

    PyTorch's own would leave the step out, and max_iters would not be the number of updates.
    """

    def lower_after_overflow(self, loss, grad_norm, optimizers: list, set_to_none: bool) -> bool:
        """Whether the gradients overflowed; then the scale is lowered and they are zeroed.

        Not if the loss itself is not finite, which a lower scale would not mend.
        """
        if not self.is_enabled() or torch.isfinite(grad_norm) or not torch.isfinite(loss):
            return False
        if self.get_scale() < 1:
            return False
        self.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none)
        return True
