"""The update that waits until the host has read loss and norm."""

from torch import Tensor
from torch.optim import Optimizer

from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.torch_compat import foreach_mul_
from fsdp_qlora.training.loss_scale import LossScale


class HostUpdate:
    """For every optimizer: the host scales the gradients, then calls the optimizer's step."""

    is_queued = False

    def __init__(
        self, optimizer: Optimizer, adapters: ShardedAdapters, scale: LossScale, max_norm: float | None
    ) -> None:
        self.optimizer, self.adapters, self.scale, self.max_norm = optimizer, adapters, scale, max_norm

    def queue(self, sums: Tensor) -> None:
        pass

    def apply(self, norm: float) -> None:
        clip = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
        if clip != self.scale.value:
            foreach_mul_(self.adapters.gradients(), clip / self.scale.value)
        self.adapters.update(self.optimizer.step)
