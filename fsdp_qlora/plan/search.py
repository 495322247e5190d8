"""Every candidate worth looking at for one placement, and the fastest of them that fits.

A candidate is at most two kinds of block (keep level, offloaded or not), the second kind and the resident blocks each
spread evenly; from the best of them `climb.py` goes on to more. Given the kinds, as many blocks stay resident as
fit: that is never slower and takes host memory away from nobody. What remains is small enough to bound all of it and
walk through the few that may be the fastest.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Placed
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import KEEP, Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.mixes import Cost, Kind, blend, climb, corners, edges
from fsdp_qlora.plan.placements import PLACEMENT_COSTS

COARSE = 16  # counts of blocks of the second kind that are tried first, before those beside the best one
TIE = 1.0005  # plans within 0.05 % of the fastest count as equally fast: the most frugal of them is taken
CORNERS = 30  # mixes of three kinds that are tried
WALKS = 1500  # candidates walked through at most, best bounds first: some 0.3 s

SIMPLER = 1.01  # of placements whose plans' times are within this ratio the first of `PLACEMENT_COSTS` is taken


@dataclass(frozen=True)
class Wishes:
    """What the user fixed; None: free.

    placements: those allowed. resident_blocks: of `stream`; all is `replicate`. keep, offload: of every block."""

    placements: tuple[str, ...] | None = None
    resident_blocks: int | None = None
    keep: str | None = None
    offload: bool | None = None


@dataclass(frozen=True)
class Budget:
    """device_bytes: that PyTorch may allocate on a rank's GPU. host_bytes: that a node may still take."""

    device_bytes: int
    host_bytes: int


def placements(facts: Facts, wishes: Wishes) -> list[Placed]:
    """Those that may be chosen. On one rank a shard is the whole; `stream` with every block resident is `replicate`."""
    if wishes.resident_blocks is not None:
        return ["stream"] if wishes.resident_blocks < facts.layers else ["replicate"]
    if wishes.placements is not None:
        unknown = set(wishes.placements) - set(PLACEMENT_COSTS)
        assert not unknown, f"placements {unknown}"
        alone = facts.ranks == 1 and "shard" in wishes.placements
        return [p for p in PLACEMENT_COSTS if p in wishes.placements or (alone and p == "replicate")]
    return [p for p, cost in PLACEMENT_COSTS.items() if facts.ranks > 1 or not cost.shards]


@dataclass(frozen=True)
class Found:
    candidate: Candidate
    seconds: float
    device_bytes: int
    host_bytes: int

    @property
    def thrift(self) -> tuple[int, int, float]:
        return self.host_bytes, self.device_bytes, self.seconds


class Search:
    """Over one placement. Deterministic: every rank finds the same from the same numbers."""

    def __init__(self, memory: Memory, clock: Clock | None, placement: Placed, wishes: Wishes, budget: Budget) -> None:
        self.facts: Facts = memory.facts
        self.memory, self.clock, self.placement, self.wishes, self.budget = memory, clock, placement, wishes, budget
        self.cost = PLACEMENT_COSTS[placement]
        self.is_whole = not (self.cost.shards or self.cost.streams)  # every block is resident
        self.limit = memory.limit(placement, budget.device_bytes)
        self.most_resident = self.facts.layers - 1  # of `stream`: all of them would be `replicate`

    def best(self) -> Found | None:
        """The fastest that fits, the most frugal within `TIE` of it; None where nothing fits."""
        found = self._walk(self._fitting(self._counts()))
        if not found:
            return None
        first = min(found, key=lambda f: (f.seconds, f.thrift))
        kinds = _kinds_of(first.candidate)
        if len(kinds) == 2:
            near = sum((b.keep, b.offloaded) == kinds[1] for b in first.candidate.blocks)
            step = -(-self.facts.layers // COARSE)
            counts = list(range(max(1, near - step), min(self.facts.layers, near + step + 1)))
            found += self._walk(self._fitting(counts, [kinds]))
        like = min(found, key=lambda f: (f.seconds, f.thrift)).candidate
        # With its own head and buffers; from where that leads, with others.
        for head, staging in dict.fromkeys([(like.head_resident, like.staging), *self._forms()]):
            better = self._climbed(like, head, staging)
            if better is not None:
                found.append(better)
                like = min(found, key=lambda f: (f.seconds, f.thrift)).candidate
        limit = min(f.seconds for f in found) * TIE
        return min((f for f in found if f.seconds <= limit), key=lambda f: f.thrift)

    def _climbed(self, like: Candidate, head: bool, staging: int) -> Found | None:
        """The best that moves of single blocks lead to, with the head and as many buffers as given."""
        like = replace(like, head_resident=head, staging=staging)
        starts = [one for c in (like, *self._of_three(like)) if (one := self._evaluate(c)) is not None]
        if not starts:
            return None
        first = min(starts, key=lambda f: (f.seconds, f.thrift))
        return self._evaluate(climb(first.candidate, first.seconds, self._kinds(), self._timed))

    def _of_three(self, like: Candidate) -> Iterator[Candidate]:
        """The most promising mixes of three kinds that use up both memories, with the head and buffers of `like`."""
        assert self.clock is not None
        facts, of, kinds = self.facts, self.memory.of, self._kinds()
        costs = {
            (keep, away): Cost(self.clock.passes(keep), of[keep, away].kept, of[keep, away].away * facts.local_ranks)
            for keep, away in kinds
        }
        nothing = replace(like, blocks=blend({kinds[0]: facts.layers}, kinds))
        if self.cost.streams and self.wishes.resident_blocks is not None:  # theirs is not to be had
            nothing = _with_resident(nothing, min(self.wishes.resident_blocks, facts.layers - 1))
        away = facts.layers * costs[kinds[0]].host
        gpu = self.limit - self.memory.device_bytes(nothing) + facts.layers * costs[kinds[0]].gpu
        host = self.budget.host_bytes - self.memory.host_bytes(nothing) + away
        for counts in (
            *corners(costs, facts.layers, gpu, host)[:CORNERS],
            *edges(costs, facts.layers, gpu, host)[:CORNERS],
        ):
            yield replace(like, blocks=blend(counts, kinds))

    def _timed(self, candidate: Candidate) -> tuple[Candidate, float] | None:
        found = self._evaluate(candidate)
        return None if found is None else (found.candidate, found.seconds)

    def _evaluate(self, candidate: Candidate) -> Found | None:
        """With as many resident blocks as fit, or as were asked for; None where it does not fit."""
        candidate = replace(candidate, blocks=tuple(replace(b, resident=False) for b in candidate.blocks))
        if self.is_whole:
            candidate = replace(candidate, blocks=tuple(replace(b, resident=True) for b in candidate.blocks))
        peak = self.memory.peak(candidate)
        if self.cost.streams:
            spare = self.limit - self.memory.device_bytes(candidate, peak)
            wanted = self.wishes.resident_blocks
            resident = spare // self.facts.block_bytes if wanted is None else wanted
            candidate = _with_resident(candidate, min(resident, self.most_resident))
        device, host = self.memory.device_bytes(candidate, peak), self.memory.host_bytes(candidate)
        if device > self.limit or host > self.budget.host_bytes:
            return None
        assert self.clock is not None
        return Found(candidate, self.clock.seconds(candidate), device, host)

    def fits(self) -> bool:
        """Whether `best` would find any."""
        return next(self._fitting(self._counts()), None) is not None

    def least_device(self) -> int | None:
        """The least bytes of a GPU, with what the allocator sets aside, with the host memory there is; None where that
        is too little for any."""
        needs = [self.memory.device_bytes(c) for c in self._at_least_resident()]
        return min((self.memory.reserved(self.placement, n) for n in needs), default=None)

    def least_host(self) -> int | None:
        """The least bytes of host memory with the GPUs there are; None where these are too small for any."""
        whatever = replace(self.budget, host_bytes=sys.maxsize)
        search = Search(self.memory, None, self.placement, self.wishes, whatever)
        return min((self.memory.host_bytes(c) for c, _ in search._fitting(self._counts())), default=None)

    def _counts(self) -> list[int]:
        """Of blocks of the second kind."""
        return sorted({round(i * self.facts.layers / COARSE) for i in range(COARSE + 1)})

    def _walk(self, fitting: Iterator[tuple[Candidate, int]]) -> list[Found]:
        assert self.clock is not None
        bounds = [(self.clock.bound(c), i, c, device) for i, (c, device) in enumerate(fitting)]
        found: list[Found] = []
        fastest = float("inf")
        for bound, _, candidate, device in sorted(bounds)[:WALKS]:
            if bound > fastest * TIE:
                break
            seconds = self.clock.seconds(candidate)
            fastest = min(fastest, seconds)
            found.append(Found(candidate, seconds, device, self.memory.host_bytes(candidate)))
        return found

    def _fitting(
        self, counts: list[int], pairs: list[tuple[Kind, ...]] | None = None
    ) -> Iterator[tuple[Candidate, int]]:
        """(candidate, its bytes on a GPU), with as many resident blocks as fit, or as were asked for."""
        for candidate, peak in self._candidates(counts, pairs):
            if self.memory.device_bytes(candidate, peak) > self.limit:
                continue
            if self.cost.streams:
                candidate = _with_resident(candidate, self._residents(candidate, peak))
            device = self.memory.device_bytes(candidate, peak)
            if device <= self.limit and self.memory.host_bytes(candidate) <= self.budget.host_bytes:
                yield candidate, device

    def _residents(self, candidate: Candidate, peak: int) -> int:
        """How many blocks stay on the GPU beside all else."""
        if self.wishes.resident_blocks is not None:
            return min(self.wishes.resident_blocks, self.facts.layers)
        spare = self.limit - self.memory.with_residents(candidate, peak)
        return min(self.most_resident, spare // self.facts.block_bytes)

    def _at_least_resident(self) -> Iterator[Candidate]:
        """With so few resident blocks that the rest just has room in host memory."""
        for candidate, _ in self._candidates(self._counts(), None):
            over = self.memory.host_bytes(candidate) - self.budget.host_bytes
            if self.cost.streams:
                wanted = self.wishes.resident_blocks
                resident = max(0, -(-over // self.facts.block_bytes)) if wanted is None else wanted
                candidate = _with_resident(candidate, min(resident, self.facts.layers - 1))
                over = self.memory.host_bytes(candidate) - self.budget.host_bytes
            if over <= 0:
                yield candidate

    def _candidates(self, counts: list[int], pairs: list[tuple[Kind, ...]] | None) -> Iterator[tuple[Candidate, int]]:
        """(every mix of kinds, with no resident block under `stream`; its peak)."""
        resident, forms = self.is_whole, self._forms()
        for first, second, count in _mixes(self._kinds(), counts, self.facts.layers, pairs):
            blocks = _blocks(first, second, count, self.facts.layers, resident)
            peak = self.memory.peak(Candidate(self.placement, blocks, True, 0))
            for head, staging in forms:
                yield Candidate(self.placement, blocks, head, staging), peak

    def _forms(self) -> list[tuple[bool, int]]:
        """(whether the head is resident, buffers)."""
        return self.cost.forms(self.facts)

    def _kinds(self) -> list[Kind]:
        wishes = self.wishes
        if not self.facts.fused:
            return [("input", False)]
        levels = KEEP if wishes.keep is None else (wishes.keep,)
        away = (False, True) if wishes.offload is None else (wishes.offload,)
        return [(keep, offloaded) for offloaded in away for keep in levels]


def _mixes(
    kinds: list[Kind], counts: list[int], layers: int, pairs: list[tuple[Kind, ...]] | None
) -> Iterator[tuple[Kind, Kind, int]]:
    if pairs is None:
        for kind in kinds:
            yield kind, kind, 0
    for first, second in pairs or combinations(kinds, 2):
        for count in counts:
            if 0 < count < layers:
                yield first, second, count


@cache
def spread(count: int, places: int) -> tuple[bool, ...]:
    """`count` of `places`, as evenly as can be."""
    return tuple((i + 1) * count // places > i * count // places for i in range(places))


@cache
def _block(resident: bool, kind: Kind) -> BlockPlan:
    return BlockPlan(resident, *kind)


def _blocks(first: Kind, second: Kind, count: int, layers: int, resident: bool) -> tuple[BlockPlan, ...]:
    kinds = (_block(resident, first), _block(resident, second))
    return tuple(kinds[seconds] for seconds in spread(count, layers))


def _with_resident(candidate: Candidate, count: int) -> Candidate:
    if count <= 0:
        return candidate
    blocks = tuple(
        _block(stays, (b.keep, b.offloaded))
        for b, stays in zip(candidate.blocks, spread(count, len(candidate.blocks)), strict=True)
    )
    return Candidate(candidate.placement, blocks, candidate.head_resident, candidate.staging)


def _kinds_of(candidate: Candidate) -> tuple[Kind, ...]:
    """In the order in which `_mixes` has them."""
    order = {(keep, away): (away, KEEP.index(keep)) for keep in KEEP for away in (False, True)}
    return tuple(sorted({(b.keep, b.offloaded) for b in candidate.blocks}, key=order.__getitem__))
