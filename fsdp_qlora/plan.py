"""The plan: where each block's bytes live and what it keeps for backward, for the fastest step that fits.

Facts of the model and rates of the machine in, a `Plan` and a table out. Everything is arithmetic, so every rank finds
the same plan from the same numbers, before anything is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fsdp_qlora.errors import UserError
from fsdp_qlora.plan_facts import Facts, keys_seen
from fsdp_qlora.plan_memory import RESERVED, BlockPlan, Candidate, Memory, Placed
from fsdp_qlora.plan_search import Budget, Found, Search, Wishes, spread
from fsdp_qlora.plan_table import lines
from fsdp_qlora.plan_time import Clock, Rates
from fsdp_qlora.units import GIB

__all__ = ["BlockPlan", "Budget", "Plan", "Wishes", "make_plan", "plan_record", "table"]

PLACEMENTS: tuple[Placed, ...] = ("replicate", "shard", "stream", "shard_offload")  # the first of equals is taken
CONTEXT_STEP, RANK_STEP = 64, 8  # tokens and ranks between the values that a refusal tries


@dataclass(frozen=True)
class Plan:
    """What a run does.

    device_bytes: predicted peak that PyTorch allocates on a rank's GPU, loading included; parts: of it, by name.
    host_bytes: frozen bytes and kept tensors in host memory, per node, all ranks. seconds: of an optimizer step, None
    where no rates are known."""

    placement: Placed
    blocks: tuple[BlockPlan, ...]
    head_resident: bool
    staging: int
    device_bytes: int
    host_bytes: int
    seconds: float | None
    parts: Mapping[str, int]

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.placement, self.blocks, self.head_resident, self.staging)


def make_plan(facts: Facts, rates: Rates | None, wishes: Wishes, budget: Budget) -> Plan:
    """The fastest plan within the budget; the most frugal of those within 1 % of it.

    Without rates (no GPU): everything on one rank, shards on several, or as wished, with no time and no limit.
    Raises UserError, one line, where nothing fits."""
    memory = Memory(facts)
    if rates is None:
        return _plan(memory, _simplest(facts, wishes), None)
    best = _best(memory, Clock(facts, rates), wishes, budget)
    if not best:
        raise UserError(_refusal(facts, wishes, budget))
    fastest = min(found.seconds for found in best.values())
    chosen = min((f for f in best.values() if f.seconds <= fastest * 1.01), key=lambda f: f.thrift)
    return _plan(memory, chosen.candidate, chosen.seconds)


def plan_record(plan: Plan, facts: Facts, rates: Rates | None) -> dict[str, Any]:
    """The plan beside what it was made from, as JSON has it."""
    return {"plan": asdict(plan), "facts": asdict(facts), "rates": None if rates is None else asdict(rates)}


def placements(facts: Facts, wishes: Wishes) -> list[Placed]:
    """Those that may be chosen. On one rank a shard is the whole; `stream` with every block resident is `replicate`."""
    if wishes.resident_blocks is not None:
        return ["stream"] if wishes.resident_blocks < facts.layers else ["replicate"]
    if wishes.placements is not None:
        unknown = set(wishes.placements) - set(PLACEMENTS)
        assert not unknown, f"placements {unknown}"
        alone = facts.ranks == 1 and "shard" in wishes.placements
        return [p for p in PLACEMENTS if p in wishes.placements or (alone and p == "replicate")]
    return [p for p in PLACEMENTS if facts.ranks > 1 or not p.startswith("shard")]


def _best(memory: Memory, clock: Clock, wishes: Wishes, budget: Budget) -> dict[Placed, Found]:
    searches = {p: Search(memory, clock, p, wishes, budget) for p in placements(memory.facts, wishes)}
    found = {p: search.best() for p, search in searches.items()}
    return {p: f for p, f in found.items() if f is not None}


def _plan(memory: Memory, candidate: Candidate, seconds: float | None) -> Plan:
    parts = memory.device_parts(candidate)
    return Plan(
        candidate.placement,
        candidate.blocks,
        candidate.head_resident,
        candidate.staging,
        sum(parts.values()),
        memory.host_bytes(candidate),
        seconds,
        parts,
    )


def _simplest(facts: Facts, wishes: Wishes) -> Candidate:
    """Without times: what was wished, and of the rest what needs no machine to be known."""
    natural = PLACEMENTS[0] if facts.ranks == 1 else PLACEMENTS[1]
    allowed = placements(facts, wishes)
    placement = natural if natural in allowed else allowed[0]
    resident = facts.layers if placement == "replicate" else 0
    if placement == "stream":
        resident = min(wishes.resident_blocks or 0, facts.layers)
    keep = wishes.keep or "input"
    blocks = tuple(BlockPlan(stays, keep, bool(wishes.offload)) for stays in spread(resident, facts.layers))
    return Candidate(placement, blocks, True, 3 if placement == "stream" else 0)


# ---- where nothing fits


@dataclass(frozen=True)
class Nearest:
    """What would fit, everything else as it is; None where no value does. gib: bytes a card needs, in GiB."""

    context: int | None
    batch: int | None
    rank: int | None
    gib: float


def nearest(facts: Facts, wishes: Wishes, budget: Budget) -> Nearest:
    def fits(changed: Facts) -> bool:
        memory = Memory(changed)
        return any(Search(memory, None, p, wishes, budget).fits() for p in placements(changed, wishes))

    contexts = [n for n in range(CONTEXT_STEP, facts.context, CONTEXT_STEP)]
    ranks = [n for n in range(RANK_STEP, max(facts.rank_down, facts.rank_o), RANK_STEP)]
    need = math.inf
    for placement in placements(facts, wishes):
        least, _ = Search(Memory(facts), None, placement, wishes, budget).least()
        need = min(need, least * RESERVED[placement])
    return Nearest(
        _last(contexts, lambda n: fits(with_context(facts, n))),
        _last(list(range(1, facts.batch)), lambda n: fits(replace(facts, batch=n))),
        _last(ranks, lambda n: fits(with_rank(facts, n))),
        need / GIB,
    )


def with_context(facts: Facts, context: int) -> Facts:
    share = facts.keys / keys_seen(facts.context, None)
    return replace(facts, context=context, keys=share * keys_seen(context, None))


def with_rank(facts: Facts, rank: int) -> Facts:
    """With adapters of another rank on the same linears."""
    old = max(facts.rank_down, facts.rank_o)

    def scaled(n: int) -> int:
        return n * rank // old

    return replace(
        facts,
        rank_qkv=scaled(facts.rank_qkv),
        rank_o=scaled(facts.rank_o),
        rank_gate_up=scaled(facts.rank_gate_up),
        rank_down=scaled(facts.rank_down),
        adapter_parameters=scaled(facts.adapter_parameters),
    )


def _last(values: list[int], works: Any) -> int | None:
    """The last of ascending values that works, where smaller ones do if a larger one does."""
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(values[middle]) else (low, middle)
    return values[low] if low >= 0 else None


def _refusal(facts: Facts, wishes: Wishes, budget: Budget) -> str:
    close = nearest(facts, wishes, budget)
    host = min(Search(Memory(facts), None, p, wishes, budget).least()[1] for p in placements(facts, wishes))
    ways = []
    if close.context is not None:
        ways.append(f"--context_length {close.context}")
    if close.batch is not None:
        ways.append(f"--batch_size {close.batch}")
    if close.rank is not None:
        ways.append(f"--lora_rank {close.rank}")
    have = budget.device_bytes / GIB
    if close.gib > have:
        ways.append(f"{math.ceil(close.gib * 10) / 10:.1f} GiB a card")
    need = f"at least {close.gib:.1f} GiB on each GPU, which may use {have:.1f}"
    need += f", and {host / GIB:.1f} GiB or more of host memory, of which {budget.host_bytes / GIB:.1f} are free"
    return f"the run does not fit: it needs {need}; what would fit: {', or '.join(ways) or 'a smaller model'}"


def table(plan: Plan, facts: Facts, rates: Rates | None, budget: Budget) -> list[str]:
    """Lines for the start-up table."""
    found: dict[Placed, Found | None] = {}
    if rates is not None:
        memory = Memory(facts)
        clock = Clock(facts, rates)
        found = {p: Search(memory, clock, p, Wishes(), budget).best() for p in placements(facts, Wishes())}
    return lines(plan.candidate, plan.seconds, facts, rates, (budget.device_bytes, budget.host_bytes), found)
