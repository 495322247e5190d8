"""What a plan chooses between: a placement, and for each block where its bytes are and what it keeps."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Placed = Literal["replicate", "shard", "shard_offload", "stream"]
Kind = tuple[str, bool]  # keep level, offloaded
Kinds = tuple[Kind, ...]  # of all blocks, in order


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block. resident: its frozen bytes stay on the GPU. keep: one of `fused.KEEP`. offloaded: what it
    keeps waits in host memory."""

    resident: bool
    keep: str
    offloaded: bool


class Homes(NamedTuple):
    """Where frozen bytes are, in numbers: all that bytes and seconds of a placement depend on, whatever blocks keep.

    residents, streamed: blocks. staging: as `Candidate` has it."""

    residents: int
    streamed: int
    head_resident: bool
    staging: int


@dataclass(frozen=True)
class Candidate:
    """What a plan chooses. staging: GPU buffers that streamed units are copied into, 0 where nothing is streamed."""

    placement: Placed
    blocks: tuple[BlockPlan, ...]
    head_resident: bool
    staging: int

    @cached_property
    def kinds(self) -> Kinds:
        return tuple((block.keep, block.offloaded) for block in self.blocks)

    @cached_property
    def stays(self) -> tuple[bool, ...]:
        """For each block whether it is resident."""
        return tuple(block.resident for block in self.blocks)

    @cached_property
    def homes(self) -> Homes:
        residents = sum(self.stays)
        return Homes(residents, len(self.stays) - residents, self.head_resident, self.staging)
