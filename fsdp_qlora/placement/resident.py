"""Frozen bytes that stay whole on a rank, for placements that keep some or all units so."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fsdp_qlora.memory.pinned import page_lock
from fsdp_qlora.models.causal_lm import Unit


class Residents:
    """The bytes of blocks that stay on the device, all allocated when the first is stored.

    Allocated one by one, between the memory that loading takes and releases, they would leave holes. Each block has a
    tensor of its own, so that it can be released (`Streamed.shrink`)."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.names = {unit.name for unit in units}
        self._nbytes = {unit.name: unit.frozen.layout.nbytes for unit in units}
        self._pieces: dict[str, Tensor] | None = None  # of blocks that are not stored yet

    def store(self, unit: Unit, whole: Tensor) -> None:
        if self._pieces is None:
            made = {name: torch.empty(n, dtype=torch.uint8, device=whole.device) for name, n in self._nbytes.items()}
            self._pieces = made
        piece = self._pieces.pop(unit.name, None)
        piece = whole if piece is None else piece.copy_(whole)  # None: stored a second time
        keep_at(unit, piece)


def keep_whole(unit: Unit, whole: Tensor) -> None:
    """Give a unit all of its bytes on this rank, on the device or in pinned host memory as its `home` says."""
    if unit.home == "host" and whole.is_cuda:
        whole = page_lock(torch.empty_like(whole, device="cpu"), "the embedding").copy_(whole)
    keep_at(unit, whole)


def keep_at(unit: Unit, whole: Tensor) -> None:
    """Give a unit the memory that all of its bytes are in."""
    unit.frozen.flat = nn.Parameter(whole.view(torch.float32), requires_grad=False)
