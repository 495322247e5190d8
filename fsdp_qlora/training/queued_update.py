"""The update that is queued behind backward, before the host knows loss and norm."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.training.loss_scale import LossScale


class QueuedUpdate:
    """For optimizers whose kernel scales the gradients, or leaves everything as it is where a sum is not finite.

    A GPU continues with the update while the host still waits for the sums, and is not idle until a host that has read
    them launches it."""

    is_queued = True

    def __init__(
        self, optimizer: Optimizer, adapters: ShardedAdapters, scale: LossScale, max_norm: float | None
    ) -> None:
        self.optimizer, self.adapters, self.scale, self.max_norm = optimizer, adapters, scale, max_norm

    def queue(self, sums: Tensor) -> None:
        self.optimizer.grad_scale = self._divisor(sums)  # type: ignore[attr-defined]
        skip = torch.maximum(1.0 - sums.isfinite().all().float(), self.adapters.rescue.flag())
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.adapters.update(self.optimizer.step)

    def apply(self, norm: float) -> None:
        pass

    def _divisor(self, sums: Tensor) -> Tensor | None:
        """Return float32 []: the loss scale over the factor of clipping; None where neither is asked for."""
        if self.max_norm is not None:
            norm = sums[:, 1].double().sum().sqrt() / self.scale.value
            return (self.scale.value / (self.max_norm / (norm + 1e-6)).clamp(max=1.0)).float()
        return sums.new_full((), self.scale.value) if self.scale.enabled else None
