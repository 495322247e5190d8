"""The norms by rows that units bring along: what DoRA's magnitudes begin as."""

import torch
from torch import Tensor

from fsdp_qlora.models.causal_lm import Unit


class SeenNorms:
    """Norms of the units placed so far."""

    def __init__(self) -> None:
        self.by_linear: dict[str, Tensor] = {}  # path in the Hugging Face model -> norms [O] on the CPU

    def take(self, unit: Unit, piece: Tensor, start: int = 0) -> None:
        """Note a unit's norms. piece: uint8, its bytes from `start` on, those of `span_of` at least; on any device."""
        first, last = span_of(unit)
        if first == last:
            return
        piece = piece[first - start : last - start].cpu()
        for name in unit.norms:
            (part,) = unit.frozen.layout.entries[name].parts.values()
            own = piece[part.offset - first : part.offset - first + part.nbytes]
            self.by_linear[unit.linear_of(name)] = own.view(part.dtype).clone()


def span_of(unit: Unit) -> tuple[int, int]:
    """Return (first, last + 1) of a unit's bytes that hold norms; (0, 0) without."""
    parts = [part for name in unit.norms for part in unit.frozen.layout.entries[name].parts.values()]
    return min((p.offset for p in parts), default=0), max((p.offset + p.nbytes for p in parts), default=0)


def room_for(unit: Unit) -> Tensor:
    """Return uint8 memory for `span_of` on the CPU."""
    first, last = span_of(unit)
    return torch.empty(last - first, dtype=torch.uint8)
