"""The plan of a run whose GPU memory has run out in the middle: the same placement, less on the GPU.

The keep levels of the blocks change, and which of them are offloaded. Where the base is streamed, resident blocks and
the head may go to host memory as well, and a staging buffer be given up. Nothing comes to the GPU that was not there.
Of all that, the fastest which takes less of the GPU than before.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

from fsdp_qlora.plan.candidate import BlockPlan, Candidate
from fsdp_qlora.plan.clock import Clock
from fsdp_qlora.plan.inputs import KEEP, Facts
from fsdp_qlora.plan.memory import Memory
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.plan.search import Budget, Search, Wishes, spread

MIB = 1 << 20
# Given up by each refit, at least: where the plan was right and memory lay in pieces, nothing that can be measured says
# how much is missing, and each further try costs a step.
GIVEN_SHARE, GIVEN_BYTES = 0.03, 256 * MIB
GIVEN_MOST = 0.1  # of all that a small model takes, of which 256 MiB may be more than there is


class LoadedMemory(Memory):
    """The bytes of candidates once all is loaded: no moment of loading counts any more."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.loading = copy(self.loading)
        self.loading.first = self.loading.block = self.loading.head = 0


class _Search(Search):
    """Over what a run that is loaded as `now` can become."""

    def __init__(
        self, memory: Memory, clock: Clock, now: Candidate, wishes: Wishes, budget: Budget, limit: int
    ) -> None:
        super().__init__(memory, clock, now.placement, wishes, budget)
        self.now, self.limit = now, min(self.limit, limit)
        self.most_resident = _residents(now)

    def _forms(self) -> list[tuple[bool, int]]:
        if not self.cost.streams:
            return [(self.now.head_resident, self.now.staging)]
        return [
            (head, staging)
            for head, staging in super()._forms()
            if staging <= self.now.staging and (self.now.head_resident or not head)
        ]

    def leanest(self) -> Candidate | None:
        """The candidate that takes least of the GPU, every block alike."""
        sizes = ((self.memory.device_bytes(c), i, c) for i, c in enumerate(self._alike()))
        fitting = [size for size in sizes if self.memory.host_bytes(size[2]) <= self.budget.host_bytes]
        return min(fitting)[2] if fitting else None

    def _alike(self) -> Iterator[Candidate]:
        given = self.cost.streams and self.wishes.resident_blocks is None
        for residents in {self.most_resident, 0} if given else {self.most_resident}:
            for head, staging in self._forms():
                for keep, offloaded in self._kinds():
                    blocks = tuple(BlockPlan(block.resident, keep, offloaded) for block in self.now.blocks)
                    loaded = replace(self.now, blocks=blocks, head_resident=head, staging=staging)
                    yield _with_some(loaded, self.now, residents)


def refit(
    now: Candidate, facts: Facts, rates: Rates | None, wishes: Wishes, budget: Budget
) -> tuple[Candidate, float | None] | None:
    """Return the fastest candidate that a run loaded as `now` can become, takes less of a GPU and is within the budget,
    and its seconds. Where none is within it: the leanest, if that takes less. None: nothing can be given.

    Without rates (no GPU) every block keeps one level less."""
    if not facts.fused:
        return None
    if rates is None:
        blocks = _one_less(now.blocks, wishes)
        return None if blocks == now.blocks else (replace(now, blocks=blocks), None)
    memory, clock = LoadedMemory(facts), Clock(facts, rates)
    taken = memory.device_bytes(now)
    search = _Search(memory, clock, now, wishes, budget, taken - least_given(taken))
    best = search.best()
    found = search.leanest() if best is None else best.candidate
    if found is None or memory.device_bytes(found) >= taken:
        return None
    stays = _residents(found)
    shifts = range(_residents(now)) if 0 < stays < _residents(now) else (0,)
    ways = [_with_some(found, now, stays, shift) for shift in shifts]
    seconds, first = min((clock.seconds(way), i) for i, way in enumerate(ways))
    return ways[first], seconds


def least_given(taken: int) -> int:
    """Bytes of a GPU that a refit gives up at least, of `taken` at the peak before."""
    return int(max(GIVEN_SHARE * taken, min(GIVEN_BYTES, GIVEN_MOST * taken)))


def _residents(candidate: Candidate) -> int:
    return sum(block.resident for block in candidate.blocks)


def _with_some(candidate: Candidate, now: Candidate, count: int, shift: int = 0) -> Candidate:
    """The candidate, with `count` of the resident blocks of `now`, spread evenly over these from the one at `shift`."""
    there = [i for i, block in enumerate(now.blocks) if block.resident]
    stay = {i for i, stays in zip(there[shift:] + there[:shift], spread(count, len(there)), strict=True) if stays}
    blocks = tuple(replace(block, resident=i in stay) for i, block in enumerate(candidate.blocks))
    return replace(candidate, blocks=blocks)


def _one_less(blocks: tuple[BlockPlan, ...], wishes: Wishes) -> tuple[BlockPlan, ...]:
    """Every block one keep level lower, where the user left that open."""
    if wishes.keep is not None:
        return blocks
    return tuple(replace(block, keep=KEEP[max(0, KEEP.index(block.keep) - 1)]) for block in blocks)
