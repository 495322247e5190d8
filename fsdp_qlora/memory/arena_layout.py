"""Places in one range of memory for tensors whose lives are known, in hardly more than is alive at once.

That is dynamic storage allocation with all requests known, which is NP-hard; greedy orders come within 0 to 2 % of the
bound on a step's tensors, but each fails by 6 to 15 % on some step that another order suits. So a few are tried in
turn, the same on every rank, and the best is taken (docs/LOG.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy
import torch

ALIGN = 512  # bytes: a tensor's place begins on a multiple, as in PyTorch's allocator
GOOD = 1.003  # of the bytes alive at once: a layout that is taken at once
HEIGHTS = (1.005, 1.01, 1.02, 1.03)  # of the bytes alive at once, in which stacks are tried
REPAIRS = 6  # tensors that found no room and are placed first in the next try
LONG = 60  # requests: a tensor that lives longer is kept by its block, for backward
Ints = numpy.ndarray
Fit = Literal["low", "high", "tight"]


class Life(NamedTuple):
    """A tensor of the step: born at request number `birth`, gone before number `death`. width: of its last axis."""

    birth: int
    death: int
    nbytes: int
    width: int
    dtype: torch.dtype

    @property
    def span(self) -> int:
        return self.death - self.birth


@dataclass(frozen=True)
class Schedule:
    """The tensors of a step in the order in which they are asked for, the offset of each, and the bytes of all."""

    lives: tuple[Life, ...]
    offsets: tuple[int, ...]
    nbytes: int


# The largest first, ties by what dies last or is born first; classes of size by powers of two, in them the longest.
ORDERS: tuple[Callable[[Life], tuple[int, ...]], ...] = (
    lambda life: (-life.nbytes, life.birth),
    lambda life: (-life.nbytes, -life.death),
    lambda life: (-life.nbytes.bit_length(), -life.span),
)


def most_alive(lives: Sequence[Life]) -> int:
    """Return the most bytes alive at once: no layout takes less."""
    change = numpy.zeros(len(lives) + 1, dtype=numpy.int64)
    for life in lives:
        change[life.birth] += aligned(life.nbytes)
        change[life.death] -= aligned(life.nbytes)
    return int(change.cumsum().max(initial=0))


def place(lives: Sequence[Life]) -> Schedule:
    """Return the best layout of a few that are tried."""
    least, best = most_alive(lives), None
    for key in ORDERS:
        order = sorted(range(len(lives)), key=lambda i: key(lives[i]))
        offsets = _Placing(lives, None).all(order, ["low"] * len(lives))
        assert isinstance(offsets, list)
        best = _smaller(best, _schedule(lives, offsets))
        if best.nbytes <= GOOD * least:
            return best
    assert best is not None
    stacked = _stacked(lives, least, best.nbytes)
    return best if stacked is None else _smaller(best, stacked)


def _smaller(one: Schedule | None, other: Schedule) -> Schedule:
    return other if one is None or other.nbytes < one.nbytes else one


def _schedule(lives: Sequence[Life], offsets: list[int]) -> Schedule:
    top = max((at + aligned(life.nbytes) for at, life in zip(offsets, lives, strict=True)), default=0)
    return Schedule(tuple(lives), tuple(offsets), top)


def _stacked(lives: Sequence[Life], least: int, known: int) -> Schedule | None:
    """Return a layout in the least height of a few that suffices, or None.

    Saved activations go from the bottom up, block by block. What lives from some backward to the step's end (gradients)
    goes from the top down. The rest goes in between, the largest first."""
    end = len(lives)
    latest = max((life.death for life in lives if life.span > LONG and life.death < end), default=end)
    fits: list[Fit] = []
    for life in lives:
        stays = life.span > LONG and life.death >= latest and life.birth > end // 3
        fits.append("high" if stays else "low" if life.span > LONG else "tight")
    rank = {"low": 0, "high": 1, "tight": 2}
    start = sorted(
        range(end), key=lambda i: (rank[fits[i]], -lives[i].nbytes if fits[i] == "tight" else 0, lives[i].birth)
    )
    for height in HEIGHTS:
        limit, order = int(least * height) // ALIGN * ALIGN, list(start)
        if limit >= known:
            return None
        for _ in range(REPAIRS):
            placed = _Placing(lives, limit).all(order, fits)
            if isinstance(placed, list):
                return _schedule(lives, placed)
            order.remove(placed)
            order.insert(0, placed)
    return None


class _Placing:
    """One layout in the making. limit: its height, None for as high as it takes."""

    def __init__(self, lives: Sequence[Life], limit: int | None) -> None:
        self.limit = limit
        self._births, self._deaths = (numpy.array([life[i] for life in lives], dtype=numpy.int64) for i in range(2))
        self._sizes = numpy.array([aligned(life.nbytes) for life in lives], dtype=numpy.int64)

    def all(self, order: Sequence[int], fits: Sequence[Fit]) -> list[int] | int:
        """Return the offset of each tensor, or the number of the first for which there is no room."""
        births, deaths, sizes = (x[list(order)] for x in (self._births, self._deaths, self._sizes))
        starts = numpy.zeros(len(order), dtype=numpy.int64)
        for i, number in enumerate(order):
            beside = (births[:i] < deaths[i]) & (deaths[:i] > births[i])
            start = self._one(starts[:i][beside], sizes[:i][beside], int(sizes[i]), fits[number])
            if start is None:
                return number
            starts[i] = start
        offsets = numpy.empty(len(order), dtype=numpy.int64)
        offsets[list(order)] = starts
        return [int(offset) for offset in offsets]

    def _one(self, starts: Ints, sizes: Ints, size: int, fit: Fit) -> int | None:
        """Return the start of the lowest gap of `size` between pieces, of the smallest, or the highest start; None
        where there is none below the limit."""
        order = starts.argsort()
        starts, ends = starts[order], numpy.maximum.accumulate((starts + sizes)[order])
        bottoms = numpy.concatenate(([0], ends))
        top = self.limit if self.limit is not None else int(bottoms[-1]) + size
        gaps = numpy.concatenate((starts, [top])) - bottoms
        enough = gaps >= size
        if not enough.any():
            return None
        if fit == "low":
            return int(bottoms[int(enough.argmax())])
        if fit == "high":
            last = len(gaps) - 1 - int(enough[::-1].argmax())
            return int(bottoms[last] + gaps[last]) - size
        gaps[~enough] = numpy.iinfo(numpy.int64).max
        return int(bottoms[int(gaps.argmin())])


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
