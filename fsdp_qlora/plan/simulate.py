"""A micro-batch as two queues that wait for each other: what computes, and what copies from and to host memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NEVER = float("inf")
EXACT = 1 + 1e-9  # of a limit: sums in another order may differ by less
Crossing = tuple[float, float]  # seconds out to host memory, and back in


class Link(NamedTuple):
    """Seconds of copies, and how many times longer they take while the other direction is busy.

    unit, head: to bring a block, and the head. gather: of a head that ranks gather. publish, reduction: of a block's
    adapters; 0.0 where they cross elsewhere."""

    unit: float
    head: float
    gather: float
    slower: float
    slower_out: float
    publish: Crossing
    reduction: Crossing


class Passes(NamedTuple):
    """Seconds of computing, block by block, and of each block's copy to host memory; of the head, and of summing a
    block's gradients over the ranks."""

    forward: Sequence[float]
    backward: Sequence[float]
    away: Sequence[float]
    head: float
    reduction: float


@dataclass(frozen=True)
class Units:
    """What is brought for each pass, through a few buffers. holds: blocks stay from forward to backward; turns: only
    those that were last do, as the passes turn round."""

    blocks: Sequence[int]
    buffers: int
    has_head: bool
    turns: bool
    holds: bool


class Walk:
    """One micro-batch: blocks forward, head, blocks back, with the link's copies beside them."""

    def __init__(self, passes: Passes, link: Link, units: Units) -> None:
        self.passes, self.link, self.units = passes, link, units
        self.in_free = self.out_free = 0.0

    def run(self, limit: float = NEVER) -> float:
        """Return its seconds; `NEVER` once these are known to be more than `limit`."""
        passes, limit = self.passes, limit * EXACT
        backward = sum(passes.backward)
        now = self._forward(limit, sum(passes.forward) + passes.head + backward)
        return NEVER if now + backward > limit else self._backward(now, limit, backward)

    def _forward(self, limit: float, rest: float) -> float:
        """Return when it is done. rest: seconds of computing, all passes together."""
        units, publish, passes = self.units, self.link.publish, self.passes
        bring = [*units.blocks, -1] if units.has_head else units.blocks
        order, ready = self._arrivals(bring, units.buffers if units.turns else 0, 0.0)
        brought, out, now = set(units.blocks), 0.0, 0.0
        for i, seconds in enumerate(passes.forward):
            if now < ready[i]:
                now = ready[i]
                if now + rest > limit:
                    return NEVER
            now += seconds
            rest -= seconds
            if i in brought:
                self._next(order, ready, now)
            if publish[1]:
                self._exchange(publish, now)
            if passes.away[i]:
                now = max(now, out)  # the block offloaded before is out before this one's memory is given back
                out = self._take_out(passes.away[i], now)
        return max(now, ready[-1]) + passes.head + self.link.gather

    def _backward(self, now: float, limit: float, rest: float) -> float:
        """Return when it is done. now: when it begins; rest: its seconds of computing."""
        units, reduction, passes = self.units, self.link.reduction, self.passes
        held = units.buffers - units.has_head if units.turns else len(units.blocks) if units.holds else 0
        order, ready = self._arrivals(units.blocks[::-1], held, now)
        brought, away = set(units.blocks), passes.away
        offloaded = [i for i, seconds in enumerate(away) if seconds]
        restored: dict[int, float] = {}
        reduced = now
        if offloaded and not away[-1]:  # the first block back offloaded nothing, and starts the copy of what was last
            self._restore(offloaded[-1:], restored, now)
        for i in range(len(away) - 1, -1, -1):
            start = ready[i]
            if away[i]:
                self._restore(offloaded[-2:][::-1], restored, now)
                offloaded.pop()
                start = max(start, restored[i])
            if now < start:
                now = start
                if now + rest > limit:
                    return NEVER
            seconds = passes.backward[i]
            now += seconds
            rest -= seconds
            if i in brought:
                self._next(order, ready, now)
            if reduction[1]:
                self._exchange(reduction, now)
            reduced = (reduced if reduced > now else now) + passes.reduction
        return max(now, reduced - passes.reduction)

    def _bring(self, seconds: float, earliest: float) -> float:
        """Return when a copy to the GPU is done that may start at `earliest`."""
        start = self.in_free if self.in_free > earliest else earliest
        self.in_free = start + seconds * (self.link.slower if self.out_free > start else 1.0)
        return self.in_free

    def _take_out(self, seconds: float, now: float) -> float:
        start = self.out_free if self.out_free > now else now
        self.out_free = start + seconds * (self.link.slower_out if self.in_free > start else 1.0)
        return self.out_free

    def _exchange(self, crossing: Crossing, now: float) -> None:
        """Adapters through host memory: the link's other bytes wait for theirs, and nothing here does."""
        self._bring(crossing[1], self._take_out(crossing[0], now))

    def _restore(self, blocks: Sequence[int], restored: dict[int, float], now: float) -> None:
        """Bring what blocks have offloaded, if it is not on its way: a block's own and that of the one before it."""
        for i in blocks:
            if i not in restored:
                restored[i] = self._bring(self.passes.away[i], max(now, self.out_free))

    def _arrivals(self, units: Sequence[int], held: int, start: float) -> tuple[Iterator[int], list[float]]:
        """Return the units still to bring, last those for which no buffer is free, and when each of the others is there
        (the head last). held: of the first, which are there."""
        ready = [0.0] * (len(self.passes.forward) + 1)
        order = iter(units[held:])
        for _ in range(self.units.buffers - held):
            self._next(order, ready, start)
        return order, ready

    def _next(self, order: Iterator[int], ready: list[float], start: float) -> None:
        """A buffer is free: bring the next unit."""
        unit = next(order, None)
        if unit is not None:
            ready[unit] = self._bring(self.link.head if unit == -1 else self.link.unit, start)
