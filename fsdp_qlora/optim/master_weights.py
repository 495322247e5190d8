"""Master copies in float32 of the slices that a rank owns of some blocks' adapters, together.

Beside a working copy in bfloat16 a master copy is the 16 bits that this lacks (`kernels/masters.py`), and is float32
only while it is updated. A few blocks lie together, so that a launch does for several what comes at the turn of a step,
when a GPU has nothing else to do; not all do, since there is little room then where a GPU is full of resident blocks.
"""

import torch
from torch import Tensor, nn

from fsdp_qlora.kernels.masters import join, master_bytes, split_


class Masters:
    """Of N blocks whose slices have equal lengths L.

    mine: the slices of the working copies, compute dtype [N, L], rows may lie apart. parameters: the master copies,
    float32 [L] each; where the compute dtype is bfloat16 they are empty except from `unfold` to `fold`."""

    def __init__(self, mine: Tensor) -> None:
        self.mine = mine
        self._low, self._whole = None, None
        if master_bytes(mine.dtype) == 2:
            self._low = torch.zeros(mine.shape, dtype=torch.int16, device=mine.device)
        else:
            self._whole = torch.zeros(mine.shape, device=mine.device)
        self.parameters = [nn.Parameter(torch.empty(0, device=mine.device)) for _ in mine]
        self._give()

    def unfold(self) -> None:
        """Before an optimizer's step: `parameters` have values."""
        if self._low is not None:
            self._whole = join(self.mine, self._low)
            self._give()

    def fold(self) -> None:
        """After it: the new values are in the working copies too."""
        assert self._whole is not None
        if self._low is None:
            self.mine.copy_(self._whole)
        else:
            split_(self._whole, self.mine, self._low)
            self._whole = None
            self._give()

    def values(self, index: int) -> Tensor:
        """float32 [L], of one block."""
        if self._low is None:
            return self.parameters[index].detach()
        return join(self.mine[index : index + 1], self._low[index : index + 1])[0]

    def set(self, index: int, values: Tensor) -> None:
        """values float32 [L] are one block's from now on, in the working copy too."""
        if self._low is None:
            self.parameters[index].data.copy_(values)
            self.mine[index].copy_(values)
        else:
            split_(values[None], self.mine[index : index + 1], self._low[index : index + 1])

    def _give(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data = self.mine.new_empty(0, dtype=torch.float32) if self._whole is None else self._whole[i]
