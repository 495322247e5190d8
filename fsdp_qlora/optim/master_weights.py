"""Master weights in float32 of the slices that a rank owns of the adapters of a few blocks.

For a working copy in bfloat16 the master copy is the 16 bits that this lacks (`kernels/masters.py`); it is float32 only
while it is updated. A few blocks are updated together, so that one launch serves several at the turn of a step, when a
GPU has nothing else to do. Not all are: a GPU full of resident blocks has little memory left then.
"""

import torch
from torch import Tensor, nn

from fsdp_qlora.kernels.masters import join, master_bytes, split_


class Masters:
    """The master weights of N blocks whose slices have equal lengths L."""

    def __init__(self, shards: Tensor) -> None:
        self.shards = shards  # slices of the working copies, compute dtype [N, L]; rows need not be adjacent
        self._low, self._whole = None, None
        if master_bytes(shards.dtype) == 2:
            self._low = torch.zeros(shards.shape, dtype=torch.int16, device=shards.device)
        else:
            self._whole = torch.zeros(shards.shape, device=shards.device)
        # float32 [L] each; where the compute dtype is bfloat16, empty except from `unfold` to `fold`
        self.parameters = [nn.Parameter(torch.empty(0, device=shards.device)) for _ in shards]
        self._assign()

    def unfold(self) -> None:
        """Give `parameters` their values, before an optimizer's step."""
        if self._low is not None:
            self._whole = join(self.shards, self._low)
            self._assign()

    def fold(self) -> None:
        """Copy the new values to the working copies, after an optimizer's step."""
        assert self._whole is not None
        if self._low is None:
            self.shards.copy_(self._whole)
        else:
            split_(self._whole, self.shards, self._low)
            self._whole = None
            self._assign()

    def values(self, index: int) -> Tensor:
        """Return the master weights of one block, float32 [L]."""
        if self._low is None:
            return self.parameters[index].detach()
        return join(self.shards[index : index + 1], self._low[index : index + 1])[0]

    def set(self, index: int, values: Tensor) -> None:
        """Set the master weights of one block, and its slice of the working copy, to values float32 [L]."""
        if self._low is None:
            self.parameters[index].data.copy_(values)
            self.shards[index].copy_(values)
        else:
            split_(values[None], self.shards[index : index + 1], self._low[index : index + 1])

    def _assign(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data = self.shards.new_empty(0, dtype=torch.float32) if self._whole is None else self._whole[i]
