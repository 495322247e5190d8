"""An optimizer update of the adapters, clipped and without the loss scale; queued behind backward where possible."""

from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.optim.optimizers import OPTIMIZERS
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.training.host_update import HostUpdate
from fsdp_qlora.training.loss_scale import LossScale
from fsdp_qlora.training.queued_update import QueuedUpdate


class Update(Protocol):
    """One update for each step, by `queue` or by `apply`: the same to the last bit where nothing is clipped."""

    is_queued: bool  # `queue` updates, and `apply` has nothing left to do; else the other way round

    def queue(self, sums: Tensor) -> None:
        """Queue the update behind the kernels that compute `sums` [ranks, 2]: each rank's loss and squared norm."""
        ...

    def apply(self, norm: float) -> None:
        """Update, once the host has read the sums. norm: of the gradients, without the loss scale."""
        ...


def make_update(
    options: TrainingOptions, optimizer: Optimizer, adapters: ShardedAdapters, scale: LossScale, device: torch.device
) -> Update:
    """Make the queued update where the optimizer can take its scale from the device, else the host's."""
    max_norm = options.grad_norm if options.apply_gradient_clipping else None
    kind = QueuedUpdate if OPTIMIZERS[options.optimizer].takes_device_scale(device) else HostUpdate
    return kind(optimizer, adapters, scale, max_norm)
