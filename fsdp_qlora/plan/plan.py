"""The plan: where each block's bytes live and what it keeps for backward, for the fastest step that fits.

Facts of the model and rates of the machine in, a `Plan` and a table out. Everything is arithmetic, so every rank finds
the same plan from the same numbers, before anything is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any

from fsdp_qlora.errors import UserError
from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Placed
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.infeasible import refusal
from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.placements import PLACEMENT_COSTS
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.refit import LoadedMemory, refit
from fsdp_qlora.plan.remembered import remembered
from fsdp_qlora.plan.report import kept_text, lines
from fsdp_qlora.plan.search import SIMPLER, Budget, Found, Search, Wishes, placements, spread

__all__ = [
    "BlockPlan",
    "Budget",
    "Placed",
    "Plan",
    "Wishes",
    "kept_text",
    "make_plan",
    "plan_record",
    "refit_plan",
    "spread",
    "table",
]


@dataclass(frozen=True)
class Plan:
    """What a run does.

    micro_batch: rows of a rank at a time; accumulation: of which so many make an optimizer step.
    device_bytes: predicted peak that PyTorch allocates on a rank's GPU while it trains; parts: of it, by name.
    loading_bytes: while it loads.
    host_bytes: frozen bytes and kept tensors in host memory, per node, all ranks. seconds: of an optimizer step, None
    where no rates are known. arena_bytes: of device_bytes, those of the tensors that are placed ahead."""

    placement: Placed
    blocks: tuple[BlockPlan, ...]
    head_resident: bool
    staging: int
    micro_batch: int
    accumulation: int
    device_bytes: int
    host_bytes: int
    seconds: float | None
    parts: Mapping[str, int]
    arena_bytes: int = 0
    loading_bytes: int = 0

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.placement, self.blocks, self.head_resident, self.staging)


Blocks = tuple[BlockPlan, ...]
SPARE = 0.002  # of a GPU's memory, where 14 GiB of tensors are laid out in 0.3 % more than is alive at once
TRIES = 6  # layouts that may turn out larger than the space they were planned for
AGAIN = 32 << 20  # bytes that a plan gives up beyond what its layout was too large by


def make_plan(
    facts: Facts,
    rates: Rates | None,
    wishes: Wishes,
    budget: Budget,
    arena: Callable[[Blocks], int] | None = None,
) -> Plan:
    """The fastest plan within the budget, of the first placement of `PLACEMENT_COSTS` that is within `SIMPLER` of it.

    arena: bytes that the placed tensors of a step of such blocks take; if not given, the most that is alive at once.
    Without rates (no GPU): everything on one rank, shards on several, or as wished, with no time and no limit.
    Raises UserError, one line, where nothing fits."""
    memory = Memory(facts)
    if rates is None:
        return _plan(memory, _simplest(facts, wishes), None, arena)
    free = replace(wishes, placements=None)
    found = {p: _best(facts, rates, p, free, budget) for p in placements(facts, wishes)}
    best = {p: f for p, f in found.items() if f is not None}
    if not best:
        raise UserError(refusal(facts, wishes, budget))
    fastest = min(found.seconds for found in best.values())
    chosen = next(best[p] for p in PLACEMENT_COSTS if p in best and best[p].seconds <= fastest * SIMPLER)
    left = budget
    if arena is not None:  # room for what a layout usually takes beyond what is alive at once
        left = replace(budget, device_bytes=int(budget.device_bytes * (1 - SPARE)))
        chosen = _best(facts, rates, chosen.candidate.placement, free, left) or chosen
    for _ in range(TRIES):
        plan = _plan(memory, chosen.candidate, chosen.seconds, arena)
        over = max(plan.device_bytes, plan.loading_bytes) - memory.limit(plan.placement, budget.device_bytes)
        if over <= 0:
            return plan
        left = replace(left, device_bytes=left.device_bytes - over - AGAIN)
        smaller = _best(facts, rates, plan.placement, free, left)
        if smaller is None:
            break
        chosen = smaller
    raise UserError(refusal(facts, wishes, budget, budget.device_bytes - left.device_bytes))


def refit_plan(
    plan: Plan,
    facts: Facts,
    rates: Rates | None,
    wishes: Wishes,
    budget: Budget,
    arena: Callable[[Blocks], int] | None = None,
) -> Plan | None:
    """Return the plan for a run that is loaded as `plan` says and has run out of GPU memory; None where it has nothing
    to give.

    budget: what there is now. arena: as for `make_plan`. Its device_bytes and parts are those of a step."""
    memory, left = LoadedMemory(facts), budget
    again = None
    for _ in range(TRIES):
        found = refit(plan.candidate, facts, rates, wishes, left)
        if found is None:
            break
        again = _plan(memory, *found, arena)
        over = again.device_bytes - memory.limit(plan.placement, budget.device_bytes) if rates is not None else 0
        if over <= 0:
            break
        left = replace(left, device_bytes=left.device_bytes - over - AGAIN)
    return again


def plan_record(plan: Plan, facts: Facts, rates: Rates | None) -> dict[str, Any]:
    """The plan beside what it was made from, as JSON has it."""
    return {"plan": asdict(plan), "facts": asdict(facts), "rates": None if rates is None else asdict(rates)}


@cache
def _best(facts: Facts, rates: Rates, placement: Placed, wishes: Wishes, budget: Budget) -> Found | None:
    """Searched once, for the plan and for the table beside it; of `remembered`."""

    def searched() -> dict[str, Any] | None:
        clock = _clock(facts, rates)
        found = Search(clock.memory, clock, placement, wishes, budget).best()
        return None if found is None else asdict(found)

    def key() -> list[Any]:
        return [placement, asdict(facts), asdict(rates), asdict(wishes), budget.device_bytes, budget.host_bytes]

    kept = remembered("search", key, searched)
    return None if kept is None else _found(**kept)


def _found(candidate: dict[str, Any], **numbers: Any) -> Found:
    blocks = tuple(BlockPlan(**block) for block in candidate.pop("blocks"))
    return Found(Candidate(blocks=blocks, **candidate), **numbers)


_clock = lru_cache(8)(Clock)  # what it has summed up for a mix of blocks holds for every placement and budget


def _plan(memory: Memory, candidate: Candidate, seconds: float | None, arena: Callable[[Blocks], int] | None) -> Plan:
    placed = arena(candidate.blocks) if arena is not None and memory.facts.fused else None
    parts = memory.step_parts(candidate, placed)
    return Plan(
        candidate.placement,
        candidate.blocks,
        candidate.head_resident,
        candidate.staging,
        memory.facts.batch,
        memory.facts.accumulation,
        sum(parts.values()),
        memory.host_bytes(candidate),
        seconds,
        parts,
        placed or 0,
        sum(memory.loading_parts(candidate).values()),
    )


def _simplest(facts: Facts, wishes: Wishes) -> Candidate:
    """Without times: what was wished, and of the rest what needs no machine to be known."""
    natural: Placed = "replicate" if facts.ranks == 1 else "shard"
    allowed = placements(facts, wishes)
    placement = natural if natural in allowed else allowed[0]
    cost = PLACEMENT_COSTS[placement]
    resident = 0 if cost.shards else facts.layers
    if cost.streams:
        resident = min(wishes.resident_blocks or 0, facts.layers)
    head_resident, staging = cost.forms(facts)[0]
    keep = wishes.keep or "input"
    blocks = tuple(BlockPlan(stays, keep, bool(wishes.offload)) for stays in spread(resident, facts.layers))
    return Candidate(placement, blocks, head_resident, staging)


def table(plan: Plan, facts: Facts, rates: Rates | None, budget: Budget) -> list[str]:
    """Lines for the start-up table."""
    found: dict[Placed, Found | None] = {}
    if rates is not None:
        found = {p: _best(facts, rates, p, Wishes(), budget) for p in placements(facts, Wishes())}
    limits = budget.device_bytes, budget.host_bytes
    return lines(plan.candidate, plan.parts, plan.loading_bytes, plan.seconds, facts, rates, limits, found)
