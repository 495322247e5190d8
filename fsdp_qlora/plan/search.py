"""Every candidate worth looking at for one placement, and the fastest of them that fits.

A candidate is at most two kinds of block (keep level, offloaded or not), of few blocks three, blended evenly as the
resident blocks are; from the best of them `mixes.py` goes on to more. Given the kinds, as many blocks stay resident as
fit: that is never slower and takes host memory away from nobody. What remains is small enough to bound all of it and
walk through the few that may be the fastest.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, combinations
from typing import NamedTuple

from fsdp_qlora.plan.candidate import BlockPlan, Candidate, Homes, Kind, Kinds, Placed
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import KEEP, Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.mixes import Cost, blend, climb, corners, edges
from fsdp_qlora.plan.placements import PLACEMENT_COSTS
from fsdp_qlora.plan.simulate import NEVER

COARSE = 16  # counts of blocks of the second kind that are tried first, before those beside the best one
TIE = 1.0005  # plans within 0.05 % of the fastest count as equally fast: the most frugal of them is taken
CORNERS = 15  # mixes of three kinds, and as many of two, that are tried for each amount of host memory
STARTS = 3  # mixes, of unlike kinds each, from which single moves lead on
NEAR = 1.02  # times the seconds of the best mix of three kinds that such a mix may have
FEW = 16  # blocks: of so many or fewer mixes of three kinds are tried, in steps of an eighth
WALKS = 1500  # candidates walked through at most, best bounds first: some 0.3 s

SIMPLER = 1.0005  # of placements whose plans' times are within this ratio the first of `PLACEMENT_COSTS` is taken


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
    """device_bytes: that PyTorch may allocate on a rank's GPU. host_bytes: that a node may still take.

    outside_bytes: of that GPU, for all else than training; told where nothing fits, and no part of a plan."""

    device_bytes: int
    host_bytes: int
    outside_bytes: int = field(default=0, compare=False)


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


class _Mix(NamedTuple):
    """What blocks keep, and the bytes of that: on a GPU at the worst moment, in a node's host memory."""

    kinds: Kinds
    peak: int
    host: int


class _Timed(NamedTuple):
    """What fits, and the seconds of its step."""

    kinds: Kinds
    homes: Homes
    seconds: float
    device_bytes: int
    host_bytes: int

    @property
    def thrift(self) -> tuple[int, int, float]:
        return self.host_bytes, self.device_bytes, self.seconds

    @property
    def speed(self) -> tuple[float, tuple[int, int, float]]:
        return self.seconds, self.thrift


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
        first = min(found, key=lambda f: f.speed)
        kinds = _kinds_of(first.kinds)
        if len(kinds) == 2:
            near = first.kinds.count(kinds[1])
            step = -(-self.facts.layers // COARSE)
            counts = list(range(max(1, near - step), min(self.facts.layers, near + step + 1)))
            found += self._walk(self._fitting(counts, [kinds]))
        like = min(found, key=lambda f: f.speed)
        # With its own head and buffers; from where that leads, with others.
        for head, staging in dict.fromkeys([(like.homes.head_resident, like.homes.staging), *self._forms()]):
            better = self._climbed(like.kinds, self._homes(head, staging))
            if better is not None:
                found.append(better)
                like = min(found, key=lambda f: f.speed)
        limit = min(f.seconds for f in found) * TIE
        best = min((f for f in found if f.seconds <= limit), key=lambda f: f.thrift)
        return Found(self._candidate(best.kinds, best.homes), best.seconds, best.device_bytes, best.host_bytes)

    def _climbed(self, like: Kinds, homes: Homes) -> _Timed | None:
        """The best that moves of single blocks lead to, with the head and as many buffers as given."""

        def seconds(kinds: Kinds, limit: float) -> float:
            found = self._evaluate(kinds, homes, limit)
            return NEVER if found is None else found.seconds

        starts: dict[frozenset[Kind], _Timed] = {}  # of the same kinds the fastest
        least = NEVER
        for kinds in dict.fromkeys((like, *self._of_three(homes))):
            one, before = self._evaluate(kinds, homes, NEAR * least), starts.get(frozenset(kinds))
            if one is not None and (before is None or one.speed < before.speed):
                starts[frozenset(kinds)] = one
                least = min(least, one.seconds)
        near = sorted((f for f in starts.values() if f.seconds <= NEAR * least), key=lambda f: f.speed)
        ends = (self._evaluate(climb(f.kinds, f.seconds, self._kinds(), seconds), homes) for f in near[:STARTS])
        return min((end for end in ends if end is not None), key=lambda f: f.speed, default=None)

    def _of_three(self, homes: Homes) -> Iterator[Kinds]:
        """The most promising mixes of three kinds that use up both memories, or of the host's as much as one kind can:
        what is good with less of it is good with more."""
        assert self.clock is not None
        facts, of, kinds = self.facts, self.memory.of, self._kinds()
        costs = {
            (keep, away): Cost(self.clock.passes(keep), of[keep, away].kept, of[keep, away].away * facts.local_ranks)
            for keep, away in kinds
        }
        nothing = self._mix((kinds[0],) * facts.layers)
        homes = homes._replace(residents=0, streamed=facts.layers)
        if self.cost.streams and self.wishes.resident_blocks is not None:  # theirs is not to be had
            homes = self._with_resident(homes, min(self.wishes.resident_blocks, facts.layers - 1))
        standing = self.memory.standing(self.placement, homes)
        gpu = self.limit - standing.device_bytes(nothing.peak) + facts.layers * costs[kinds[0]].gpu
        host = self.budget.host_bytes - standing.host
        useful = {facts.layers * cost.host for cost in costs.values()}
        for used in sorted({min(host, most) for most in useful}):
            for counts in chain(*(found(costs, facts.layers, gpu, used)[:CORNERS] for found in (corners, edges))):
                yield blend(counts, kinds)

    def _evaluate(self, kinds: Kinds, homes: Homes, limit: float = NEVER) -> _Timed | None:
        """With as many resident blocks as fit, or as were asked for; None where it does not fit, or takes longer than
        `limit`. homes: with no resident block under `stream`."""
        assert self.clock is not None
        if self.clock.unhindered(kinds) > limit:
            return None
        mix = self._mix(kinds)
        if self.cost.streams:
            standing = self.memory.standing(self.placement, homes)
            homes = self._with_resident(homes, self._residents(standing.with_residents(mix.peak), homes))
        device, host = self._bytes(mix, homes)
        if device > self.limit or host > self.budget.host_bytes:
            return None
        return self._timed(mix, homes, limit)

    def _timed(self, mix: _Mix, homes: Homes, limit: float) -> _Timed | None:
        assert self.clock is not None
        stays = spread(homes.residents, self.facts.layers)
        seconds = self.clock.step(self.placement, mix.kinds, stays, homes, limit)
        return None if seconds == NEVER else _Timed(mix.kinds, homes, seconds, *self._bytes(mix, homes))

    def _bytes(self, mix: _Mix, homes: Homes) -> tuple[int, int]:
        """Return the bytes on a GPU and in host memory."""
        standing = self.memory.standing(self.placement, homes)
        return standing.device_bytes(mix.peak), standing.host + mix.host

    def fits(self) -> bool:
        """Whether `best` would find any."""
        return next(self._fitting(self._counts()), None) is not None

    def least_device(self) -> int | None:
        """The least bytes of a GPU, with what the allocator sets aside, with the host memory there is; None where that
        is too little for any."""
        needs = [self._bytes(mix, homes)[0] for mix, homes in self._at_least_resident()]
        return min((self.memory.reserved(self.placement, n) for n in needs), default=None)

    def least_host(self) -> int | None:
        """The least bytes of host memory with the GPUs there are; None where these are too small for any."""
        whatever = replace(self.budget, host_bytes=sys.maxsize)
        search = Search(self.memory, None, self.placement, self.wishes, whatever)
        return min((search._bytes(mix, homes)[1] for mix, homes in search._fitting(self._counts())), default=None)

    def _counts(self) -> list[int]:
        """Of blocks of the second kind."""
        return sorted({round(i * self.facts.layers / COARSE) for i in range(COARSE + 1)})

    def _walk(self, fitting: Iterator[tuple[_Mix, Homes]]) -> list[_Timed]:
        """Those that may be the fastest."""
        assert self.clock is not None
        least = self.clock.least
        bounds = [(least(self.placement, mix.kinds, homes), i, mix, homes) for i, (mix, homes) in enumerate(fitting)]
        found: list[_Timed] = []
        fastest = NEVER
        for bound, _, mix, homes in sorted(bounds)[:WALKS]:
            if bound > fastest * TIE:
                break
            timed = self._timed(mix, homes, fastest * TIE)
            if timed is not None:
                fastest = min(fastest, timed.seconds)
                found.append(timed)
        return found

    def _fitting(self, counts: list[int], pairs: list[tuple[Kind, ...]] | None = None) -> Iterator[tuple[_Mix, Homes]]:
        """With as many resident blocks as fit, or as were asked for."""
        for mix, homes in self._candidates(counts, pairs):
            standing = self.memory.standing(self.placement, homes)
            if standing.device_bytes(mix.peak) > self.limit:
                continue
            if self.cost.streams:
                homes = self._with_resident(homes, self._residents(standing.with_residents(mix.peak), homes))
            device, host = self._bytes(mix, homes)
            if device <= self.limit and host <= self.budget.host_bytes:
                yield mix, homes

    def _residents(self, taken: int, homes: Homes) -> int:
        """How many blocks stay on the GPU beside all else, which takes so much, staging buffers included."""
        if self.wishes.resident_blocks is not None:
            return min(self.wishes.resident_blocks, self.most_resident)
        found = (self.limit - taken) // self.facts.block_bytes
        if self.facts.layers - found + (not homes.head_resident) <= homes.staging:
            return self.most_resident  # each further block takes the memory of a buffer that nothing needs then
        return min(self.most_resident, found)

    def _at_least_resident(self) -> Iterator[tuple[_Mix, Homes]]:
        """With so few resident blocks that the rest just has room in host memory."""
        for mix, homes in self._candidates(self._counts(), None):
            over = self._bytes(mix, homes)[1] - self.budget.host_bytes
            if self.cost.streams:
                wanted = self.wishes.resident_blocks
                resident = max(0, -(-over // self.facts.block_bytes)) if wanted is None else wanted
                homes = self._with_resident(homes, min(resident, self.facts.layers - 1))
                over = self._bytes(mix, homes)[1] - self.budget.host_bytes
            if over <= 0:
                yield mix, homes

    def _candidates(self, counts: list[int], pairs: list[tuple[Kind, ...]] | None) -> Iterator[tuple[_Mix, Homes]]:
        """Every mix of kinds with every form, with no resident block under `stream`."""
        homes = [self._homes(head, staging) for head, staging in self._forms()]
        kinds = self._kinds()
        for counted in _mixes(kinds, counts, self.facts.layers, pairs):
            mix = self._mix(blend(counted, kinds))
            for one in homes:
                yield mix, one

    def _mix(self, kinds: Kinds) -> _Mix:
        return _Mix(kinds, self.memory.peak(self.placement, kinds), self.memory.offloaded(kinds))

    def _homes(self, head_resident: bool, staging: int) -> Homes:
        """With no resident block under `stream`."""
        layers = self.facts.layers
        return Homes(*((layers, 0) if self.is_whole else (0, layers)), head_resident, staging)

    def _with_resident(self, homes: Homes, count: int) -> Homes:
        return homes if count <= 0 else homes._replace(residents=count, streamed=self.facts.layers - count)

    def _candidate(self, kinds: Kinds, homes: Homes) -> Candidate:
        stays = spread(homes.residents, self.facts.layers)
        blocks = tuple(BlockPlan(stay, *kind) for stay, kind in zip(stays, kinds, strict=True))
        return Candidate(self.placement, blocks, homes.head_resident, homes.staging)

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
) -> Iterator[dict[Kind, int]]:
    """Blocks of each kind: of two; where no pairs are given of every kind alone too, and of few blocks of three."""
    if pairs is None:
        for kind in kinds:
            yield {kind: layers}
        for three in combinations(kinds, 3) if layers <= FEW else ():
            for i, j in combinations(range(1, layers, -(-layers // 8)), 2):
                yield dict(zip(three, (i, j - i, layers - j), strict=True))
    for first, second in pairs or combinations(kinds, 2):
        for count in counts:
            if 0 < count < layers:
                yield {first: layers - count, second: count}


@cache
def spread(count: int, places: int) -> tuple[bool, ...]:
    """`count` of `places`, as evenly as can be."""
    return tuple((i + 1) * count // places > i * count // places for i in range(places))


def _kinds_of(kinds: Kinds) -> tuple[Kind, ...]:
    """In the order in which `_mixes` has them."""
    order = {(keep, away): (away, KEEP.index(keep)) for keep in KEEP for away in (False, True)}
    return tuple(sorted(set(kinds), key=order.__getitem__))
