"""A micro-batch as two queues that wait for each other: what computes, and what copies from and to host memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fsdp_qlora.plan.candidate import Candidate

if TYPE_CHECKING:
    from fsdp_qlora.plan.clock import Clock


class Walk:
    """One micro-batch: blocks forward, head, blocks back, with the link's copies beside them.

    unit: seconds to bring a block. buffers: units that may be there at once. keeps: the last units of a pass are there
    for the next one, which turns round, and are not brought again."""

    def __init__(
        self,
        clock: "Clock",
        candidate: Candidate,
        crowding: float,
        buffers: int,
        unit: float,
        head: float,
        keeps: bool,
    ) -> None:
        self.clock, self.candidate, self.crowding = clock, candidate, crowding
        self.buffers, self.unit, self.head, self.keeps = buffers, unit, head, keeps
        self.blocks = candidate.blocks
        facts, rates = clock.facts, clock.rates
        self.streamed = [i for i, b in enumerate(self.blocks) if not (keeps and b.resident)]
        self.streams_head = keeps and not candidate.head_resident
        self.head_copy = facts.head_bytes / rates.h2d if self.streams_head else 0.0
        self.slower = rates.h2d / rates.h2d_both  # while the other direction is busy
        self.slower_out = rates.h2d / rates.d2h_both
        away = clock.facts.fullness / rates.h2d  # seconds for a byte of the largest micro-batch, in the usual one
        self.away = [clock.memory.of[b.keep, b.offloaded].away * away for b in self.blocks]
        self.now = self.in_free = self.out_free = 0.0

    def run(self) -> float:
        self._forward()
        self._backward()
        return self.now

    def _bring(self, seconds: float, earliest: float) -> float:
        """When a copy to the GPU is done that may start at `earliest`."""
        start = max(self.in_free, earliest)
        self.in_free = start + seconds * (self.slower if self.out_free > start else 1.0)
        return self.in_free

    def _take_out(self, seconds: float) -> float:
        start = max(self.out_free, self.now)
        self.out_free = start + seconds * (self.slower_out if self.in_free > start else 1.0)
        return self.out_free

    def _exchange(self, out: float, back: float) -> None:
        """Adapters through host memory: the link's other bytes wait for theirs, and nothing here does."""
        if back:
            self._bring(back, self._take_out(out))

    def _forward(self) -> None:
        order, there = self._arrivals([*self.streamed, *([-1] if self.streams_head else [])], self.keeps, 0.0)
        left = 0.0
        for i, block in enumerate(self.blocks):
            self.now = max(self.now, there.get(i, 0.0)) + self.clock.forward[block.keep] * self.crowding
            if i in there:
                self._next(order, there)
            self._exchange(self.clock.publish_out, self.clock.publish_in)
            if self.away[i]:
                self.now = max(
                    self.now, left
                )  # the block offloaded before is out before this one's memory is given back
                left = self._take_out(self.away[i])
        self.now = max(self.now, there.get(-1, 0.0)) + self.clock.head + self.head

    def _backward(self) -> None:
        held = self.buffers - self.streams_head if self.keeps else 0
        if not self.keeps and not self.clock.facts.reshard:
            held = len(self.streamed)
        order, there = self._arrivals(self.streamed[::-1], self.keeps, self.now, held)
        offloaded = [i for i, seconds in enumerate(self.away) if seconds]
        restored: dict[int, float] = {}
        reduced = self.now
        if (
            offloaded and not self.away[-1]
        ):  # the first block back offloaded nothing, and starts the copy of what was last
            restored[offloaded[-1]] = self._bring(self.away[offloaded[-1]], max(self.now, self.out_free))
        for i in range(len(self.blocks) - 1, -1, -1):
            if self.away[i]:
                self._restore(offloaded, restored)
            ready = max(there.get(i, 0.0), restored.get(i, 0.0))
            self.now = max(self.now, ready) + self.clock.backward[self.blocks[i].keep] * self.crowding
            if i in there:
                self._next(order, there)
            self._exchange(self.clock.reduction_out, self.clock.reduction_in)
            reduced = max(reduced, self.now) + self.clock.reduction
        self.now = max(self.now, reduced - self.clock.reduction)

    def _restore(self, offloaded: list[int], restored: dict[int, float]) -> None:
        """The block's own tensors, if they are not on their way, and those of the block offloaded before it."""
        for i in (offloaded.pop(), *offloaded[-1:]):
            if i not in restored:
                restored[i] = self._bring(self.away[i], max(self.now, self.out_free))

    def _arrivals(
        self, units: Sequence[int], keeps: bool, start: float, held: int | None = None
    ) -> tuple[list[int], dict[int, float]]:
        """(units still to bring, last first; unit -> when it is there, of those that are or may start now)."""
        held = (self.buffers if keeps else 0) if held is None else held
        there = dict.fromkeys(units[:held], 0.0)
        order = list(units[held:])[::-1]
        for _ in range(self.buffers - held):
            self._next(order, there, start)
        return order, there

    def _next(self, order: list[int], there: dict[int, float], start: float | None = None) -> None:
        """A buffer is free: bring the next unit."""
        if order:
            unit = order.pop()
            there[unit] = self._bring(self.head_copy if unit == -1 else self.unit, self.now if start is None else start)
