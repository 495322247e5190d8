"""Where the base is while a model answers, and how many rows it answers at a time: what fits, for the most tokens.

There is no backward, so a plan of training would leave memory unused. A pass of a base that is streamed costs the same
for one row as for hundreds, so there the rows come first and blocks stay on the device in what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf

from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.shards import shard_count
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.exchange.choose import through_host
from fsdp_qlora.generation.needs import Needs, Workload, answering_bytes, needs_of
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.budget import find_budget
from fsdp_qlora.plan.plan import BlockPlan, Budget, Placed, Plan, spread
from fsdp_qlora.plan.planning import wishes_of
from fsdp_qlora.units import as_gib, count_of

__all__ = ["Fit", "Workload", "answering_bytes", "copies_bytes", "fit"]

MOST_ROWS = {"replicate": 64, "shard": 256, "shard_offload": 256, "stream": 256}  # where nobody says how many
STAGING = 3  # buffers for streamed blocks: one that is computed, one that has come, one that comes
GATHERED = 3  # blocks that are whole at a time where they are sharded
SPARE = 0.03  # of the budget: what libraries take, and the allocator's rounding
COPY_SHARE = 0.9  # of what is free behind all else, that decoded copies of weights may take


@dataclass(frozen=True)
class Fit:
    """plan: of the placement. rows: of a rank at a time. line: both, for the user."""

    plan: Plan
    rows: int
    line: str


@dataclass(frozen=True)
class _Refused:
    """Why a placement does not do: the option that limits it, and what it would need."""

    option: str
    why: str


def fit(model: CausalModel, config: Config, world: World, work: Workload) -> Fit:
    """Return what fits. A collective. Raises UserError on every rank alike where not even one row fits."""
    budget, needs = find_budget(config.memory, world), needs_of(model, work)
    tried = list[_Refused]()
    for placement in _order(config, world):
        found = _try(placement, needs, budget, work, config, world)
        if isinstance(found, Fit):
            return found
        tried.append(found)
    reasons = "; ".join(
        f"{option}: {', '.join(one.why for one in some)}" for option, some in groupby(tried, lambda one: one.option)
    )
    remedy = "lower max_new_tokens or batch_size, use more or larger cards"
    remedy += "" if any(one.why.startswith("stream") for one in tried) else ", or --use_cpu_offload true"
    raise UserError(f"{reasons}; {remedy}").on_every_rank(world.rank)


def copies_bytes(free: float, plan: Plan) -> int:
    """Return what decoded copies of weights may take of a device. free: its bytes, those that the plan has included."""
    return int(COPY_SHARE * max(0.0, free - plan.device_bytes))


def _order(config: Config, world: World) -> Sequence[Placed]:
    """Return the placements to try, the one to be taken first; the options may leave one."""
    allowed = wishes_of(config.memory, world.size).placements or ("replicate", "shard", "stream")
    if len(allowed) == 1:
        return allowed  # type: ignore[return-value]
    by_host = through_host(config.memory, world)
    order = ("replicate", "stream", "shard") if by_host else ("replicate", "shard", "stream")
    return [placement for placement in order if placement in allowed]  # type: ignore[misc]


def _try(
    placement: Placed, needs: Needs, budget: Budget, work: Workload, config: Config, world: World
) -> Fit | _Refused:
    """Return the plan, or why there is none."""
    free, count, largest = budget.device_bytes, len(needs.blocks), max(needs.blocks)
    is_limited, wanted = free != inf, config.memory.resident_blocks
    fixed, host = _fixed(placement, needs, config, world)
    kept = 0  # blocks that must stay, before rows take what is left
    if placement == "stream":
        if wanted is not None and wanted > count:
            return _Refused("resident_blocks", f"{wanted} are more than the model's {count} blocks")
        over = max(0, host - budget.host_bytes) if is_limited else 0  # that host memory has no room for
        kept = min(count, -(-int(over) // min(needs.blocks))) if wanted is None else wanted
    per_rank = -(-work.count // world.size)
    most = min(per_rank, MOST_ROWS[placement] if work.asked == -1 else work.asked)
    rows = most
    if is_limited:
        least = 1 if work.asked == -1 else most
        left = free * (1 - SPARE) - fixed - kept * largest
        rows = min(most, int(left // needs.row))
        if rows < least:
            return _too_large(placement, fixed + kept * largest + least * needs.row, least, kept, host, budget, wanted)
        if placement == "stream" and wanted is None:
            kept = min(count, kept + int((left - rows * needs.row) // largest))
    stays = spread(kept, count) if placement == "stream" else (True,) * count
    resident = 0
    if placement == "stream":
        resident = sum(nbytes for nbytes, stay in zip(needs.blocks, stays, strict=True) if stay)
    host -= resident
    if host > budget.host_bytes:
        return _Refused("host_memory_gib", f"{placement} needs {_of(host, budget.host_bytes, 'host memory')}")
    plan = Plan(
        placement, tuple(BlockPlan(stay, "input", False) for stay in stays), True,
        STAGING if placement == "stream" else 0, rows, 1, fixed + resident + rows * needs.row, host, None, {},
    )  # fmt: skip
    where = f"{placement}, {sum(stays)} of {count} blocks on the device" if placement == "stream" else placement
    return Fit(plan, rows, f"answers   {count_of(rows, 'row')} at a time on each rank, base: {where}")


def _fixed(placement: Placed, needs: Needs, config: Config, world: World) -> tuple[int, int]:
    """Return (bytes of a device for any number of rows and blocks that stay, bytes of a node's host memory with none
    that stays)."""
    base, largest, host = sum(needs.blocks) + needs.other, max(needs.blocks), needs.host
    if placement in ("shard", "shard_offload"):
        own = base // shard_count(config.memory, world)
        base = GATHERED * largest + (0 if placement == "shard_offload" else own)
        host += own * world.local_size if placement == "shard_offload" else 0
    if placement == "stream":
        base = needs.other + STAGING * largest
        host += sum(needs.blocks)
    return base + needs.work, host


def _too_large(
    placement: Placed, needed: int, rows: int, kept: int, host: int, budget: Budget, wanted: int | None
) -> _Refused:
    """Return why so many rows, and the blocks that must stay, do not fit on a device."""
    why = f"{placement} needs {_of(needed, budget.device_bytes, 'each card')} with {count_of(rows, 'row')}"
    if not kept:
        return _Refused("gpu_memory_gib", why)
    if wanted is not None:
        return _Refused("resident_blocks", f"{why} and {wanted} resident blocks")
    short = _of(host, budget.host_bytes, "host memory")
    return _Refused("host_memory_gib", f"{why} and {kept} resident blocks, or {short} without these")


def _of(needed: float, there: float, where: str) -> str:
    return f"{as_gib(needed, 2)} of {where}, which has {as_gib(there, 2)}"
