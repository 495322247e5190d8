"""The placements by name, and the one that a plan says."""

from collections.abc import Callable
from functools import partial

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.shards import shard_count
from fsdp_qlora.distributed.world import World
from fsdp_qlora.placement.base import Placement
from fsdp_qlora.placement.replicated import Replicated
from fsdp_qlora.placement.sharded import Sharded
from fsdp_qlora.placement.streamed import Streamed
from fsdp_qlora.plan.plan import Plan

Maker = Callable[[Plan, MemoryOptions, World, float | None, bool], Placement]


def choose_placement(
    plan: Plan, options: MemoryOptions, world: World, link_rate: float | None = None, trains: bool = True
) -> Placement:
    """Return the placement that `plan` says, in the form of `--sharding_strategy`.

    link_rate: bytes per second from host memory to this rank's device, if that was measured. trains: whether backwards
    follow forwards."""
    return PLACEMENTS[plan.placement](plan, options, world, link_rate, trains)


def _replicated(plan: Plan, options: MemoryOptions, world: World, link_rate: float | None, trains: bool) -> Placement:
    return Replicated()


def _sharded(
    plan: Plan, options: MemoryOptions, world: World, link_rate: float | None, trains: bool, *, offload: bool
) -> Placement:
    reshard = not options.sharding_strategy.endswith("shard_grad_op")
    return Sharded(world, reshard, shard_count(options, world), offload)


def _streamed(plan: Plan, options: MemoryOptions, world: World, link_rate: float | None, trains: bool) -> Placement:
    resident = [block.resident for block in plan.blocks]
    return Streamed(world, resident, plan.head_resident, plan.staging, link_rate, trains)


PLACEMENTS: dict[str, Maker] = {
    "replicate": _replicated,
    "shard": partial(_sharded, offload=False),
    "shard_offload": partial(_sharded, offload=True),
    "stream": _streamed,
}
