"""What a plan chooses between: a placement, and for each block where its bytes are and what it keeps."""

from dataclasses import dataclass
from typing import Literal

Placed = Literal["replicate", "shard", "shard_offload", "stream"]


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block. resident: its frozen bytes stay on the GPU. keep: one of `fused.KEEP`. offloaded: what it
    keeps waits in host memory."""

    resident: bool
    keep: str
    offloaded: bool


@dataclass(frozen=True)
class Candidate:
    """What a plan chooses. staging: GPU buffers that streamed units are copied into, 0 where nothing is streamed."""

    placement: Placed
    blocks: tuple[BlockPlan, ...]
    head_resident: bool
    staging: int
