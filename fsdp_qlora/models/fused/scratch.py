"""Memory that all fused blocks of a rank share: the buffer of decoded weights, and a gradient padded for its reader."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fsdp_qlora.kernels.lora_wide import PITCH


class WeightScratch:
    """A buffer for decoded weights, shared because on one stream each is used before the next is written.

    What backward uses twice, to recompute a matmul and for its gradient, it decodes once, and nothing else in
    between."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype

    def room(self, rows: int, columns: int) -> Tensor:
        """Return [rows, columns] with rows on whole cache lines, good until the next call."""
        pitch = -(-columns // PITCH) * PITCH
        numel = rows * pitch
        if self.buffer.numel() < numel:
            self.buffer = self.buffer.new_empty(0)  # freed first: the two never live at once
            self.buffer = self.buffer.new_empty(numel)
        return self.buffer[:numel].view(rows, pitch)[:, :columns]


class PaddedGradient:
    """The last block's gradient of its input, with free columns after it for the adapter of the block that reads it."""

    def __init__(self) -> None:
        self._wide: Tensor | None = None

    def hand(self, d_wide: Tensor) -> None:
        """Offer d_wide, whose first columns are about to be returned to autograd as a gradient."""
        self._wide = d_wide

    def forget(self) -> None:
        """Release what was offered, where no backward will take it."""
        self._wide = None

    def take(self, d_rows: Tensor, columns: int) -> Tensor | None:
        """Return [T, columns] that begin with d_rows [T, H]: of what was offered last if that is wide enough and its
        first columns are d_rows; d_rows themselves if they are enough. None otherwise."""
        d_wide, self._wide = self._wide, None
        if columns == d_rows.shape[1]:
            return d_rows
        if d_wide is None or d_wide.data_ptr() != d_rows.data_ptr() or d_wide.shape[0] != d_rows.shape[0]:
            return None
        alike = d_wide.shape[0] == 1 or d_wide.stride() == d_rows.stride()  # one row has any stride
        return d_wide[:, :columns] if alike and d_wide.shape[1] >= columns else None


@dataclass(frozen=True)
class Shared:
    """What all fused blocks of a rank share."""

    weights: WeightScratch
    gradient: PaddedGradient

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> "Shared":
        """Return new, empty memory for blocks that compute in `dtype`."""
        return cls(WeightScratch(dtype, device), PaddedGradient())
