"""The plan of a run whose GPU memory has run out in the middle: the same placement, less saved for backward.

What is loaded stays where it is: resident blocks, head, staging buffers. Only the keep levels of the blocks change, and
which of them are offloaded, to the fastest that takes less of the GPU than before.
"""

from copy import copy
from dataclasses import replace

from fsdp_qlora.plan.climb import Kind
from fsdp_qlora.plan.clock import Clock, Rates
from fsdp_qlora.plan.facts import Facts
from fsdp_qlora.plan.memory import BlockPlan, Candidate, Memory
from fsdp_qlora.plan.moments import KEEP
from fsdp_qlora.plan.search import Budget, Found, Search, Wishes

MIB = 1 << 20
# Given up by each refit, at least. It is worth more than the repeated step costs: where the plan was right and memory
# lay in pieces, nothing that can be measured says how much is missing.
GIVEN_SHARE, GIVEN_BYTES = 0.03, 256 * MIB
GIVEN_MOST = 0.1  # of all that a small model takes, of which 256 MiB may be more than there is


class LoadedMemory(Memory):
    """The bytes of candidates once all is loaded: no moment of loading counts any more."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.loading = copy(self.loading)
        self.loading.first = self.loading.block = self.loading.head = 0


class _Search(Search):
    """Over what blocks keep, with all else as it is."""

    def __init__(
        self, memory: Memory, clock: Clock, now: Candidate, wishes: Wishes, budget: Budget, limit: int
    ) -> None:
        residents = sum(block.resident for block in now.blocks)
        super().__init__(memory, clock, now.placement, replace(wishes, resident_blocks=residents), budget)
        self.now, self.limit = now, min(self.limit, limit)

    def _forms(self) -> list[tuple[bool, int]]:
        return [(self.now.head_resident, self.now.staging)]

    def leanest(self) -> Found | None:
        """The candidate that takes least of the GPU, every block alike."""
        assert self.clock is not None
        alike = [replace(self.now, blocks=_kept_as(self.now.blocks, kind)) for kind in self._kinds()]
        sizes = [(self.memory.device_bytes(c), self.memory.host_bytes(c), i) for i, c in enumerate(alike)]
        fitting = [size for size in sizes if size[1] <= self.budget.host_bytes]
        if not fitting:
            return None
        device, host, i = min(fitting)
        return Found(alike[i], self.clock.seconds(alike[i]), device, host)


def refit(
    now: Candidate, facts: Facts, rates: Rates | None, wishes: Wishes, budget: Budget
) -> tuple[Candidate, float | None] | None:
    """Return the fastest candidate that differs from `now` in what its blocks keep, takes less of a GPU and is within
    the budget, and its seconds. Where none is within it: the leanest, if that takes less. None: nothing can be given.

    Without rates (no GPU) every block keeps one level less."""
    if not facts.fused:
        return None
    if rates is None:
        blocks = _one_less(now.blocks, wishes)
        return None if blocks == now.blocks else (replace(now, blocks=blocks), None)
    memory = LoadedMemory(facts)
    taken = memory.device_bytes(now)
    search = _Search(memory, Clock(facts, rates), now, wishes, budget, taken - least_given(taken))
    found = search.best() or search.leanest()
    if found is None or found.device_bytes >= taken:
        return None
    return _as_loaded(found.candidate, now), found.seconds


def least_given(taken: int) -> int:
    """Bytes of a GPU that a refit gives up at least, of `taken` at the peak before."""
    return int(max(GIVEN_SHARE * taken, min(GIVEN_BYTES, GIVEN_MOST * taken)))


def _as_loaded(found: Candidate, now: Candidate) -> Candidate:
    """`found`, its resident blocks those of `now`."""
    pairs = zip(found.blocks, now.blocks, strict=True)
    return replace(found, blocks=tuple(replace(block, resident=loaded.resident) for block, loaded in pairs))


def _kept_as(blocks: tuple[BlockPlan, ...], kind: Kind) -> tuple[BlockPlan, ...]:
    keep, offloaded = kind
    return tuple(replace(block, keep=keep, offloaded=offloaded) for block in blocks)


def _one_less(blocks: tuple[BlockPlan, ...], wishes: Wishes) -> tuple[BlockPlan, ...]:
    """Every block one keep level lower, where the user left that open."""
    if wishes.keep is not None:
        return blocks
    return tuple(replace(block, keep=KEEP[max(0, KEEP.index(block.keep) - 1)]) for block in blocks)
