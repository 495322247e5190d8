"""The protocol of placements: where a block's frozen bytes live, and the check that a rank holds what it promises.

Adapters are no concern of a placement: they are small, and every rank has them (see optim/sharded_adapters.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.plan.plan import Plan


@dataclass(frozen=True)
class Slot:
    """Where a rank holds its part of a unit's bytes, for a reader that can fill it without the other parts."""

    memory: Tensor  # uint8 [n], contiguous, on the host or the rank's device
    start: int  # the byte of the unit that comes first there
    filled: Callable[[], object] = lambda: None  # to be called once it is filled


class Placement(Protocol):
    """The home of the frozen bytes: `prepare` before loading, `store` or `slot` for each unit, `finish` at the end."""

    def prepare(self, model: CausalModel) -> None: ...

    def store(self, unit: Unit, whole: Tensor) -> None:
        """Place a unit's bytes. whole: uint8 [nbytes] on the device; the placement may keep it."""
        ...

    def slot(self, unit: Unit) -> Slot | None:
        """Return where this rank's part of a unit goes; None where it needs all of it, by `store`.

        `store` may follow in spite of it, if the part could not be read."""
        ...

    def finish(self) -> None:
        """Make all stored units ready for training. A collective."""
        ...

    def promised_bytes(self, unit: Unit) -> int:
        """Return the bytes of `unit` that this rank must hold, by the placement's promise."""
        ...

    def shrink(self, plan: Plan) -> None:
        """Hold no more of the base on the device than `plan` says, which is less. Called between steps, a collective.

        Raises UserError on every rank if host memory for it cannot be allocated; the placement is then unchanged."""
        ...


def held_bytes(unit: Unit) -> int:
    """Return the bytes of `unit` that this rank really holds now, outside a pass."""
    flat = unit.frozen.flat
    local = flat.to_local() if isinstance(flat, DTensor) else flat
    return 0 if local.is_meta else local.nbytes


def check_bytes(model: CausalModel, placement: Placement) -> None:
    """Assert that each unit takes the bytes that the placement promises on this rank."""
    for unit in model.units:
        held, promised = held_bytes(unit), placement.promised_bytes(unit)
        assert held == promised, f"{unit.name}: {held} bytes on rank {dist.get_rank()}, {promised} promised"
