"""Packing: short rows put together into bins of the context's length, so that no micro-batch is mostly padding.

Best fit, longest rows first: each row goes where the least space is left over. Which lengths share a bin depends on the
dataset's lengths alone, so every epoch has as many bins. Which rows of these lengths, and the order of the bins, depend
on the seed and the epoch. Rows of a length that no other row has keep their company from epoch to epoch.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bins:
    """The bins of a dataset. capacity: tokens that a bin takes. lengths: int64 [rows], of each row."""

    capacity: int
    lengths: Numbers

    @cached_property
    def bin_of(self) -> Numbers:
        """Return int64 [rows]: the bin of each row where rows are ordered by length, longest first."""
        return best_fit(np.sort(self.lengths)[::-1], self.capacity)

    def __len__(self) -> int:
        return int(self.bin_of.max()) + 1

    @property
    def fill(self) -> float:
        """Return the share of all bins' tokens that rows take."""
        return float(self.lengths.sum()) / (len(self) * self.capacity)

    def rows(self, generator: np.random.Generator) -> list[Numbers]:
        """Return the rows of each bin: every row once, in an order that the generator decides."""
        order = generator.permutation(len(self.lengths))
        order = order[np.argsort(-self.lengths[order], kind="stable")]  # of rows as long as each other a random order
        by_bin = order[np.argsort(self.bin_of, kind="stable")]
        bins = np.split(by_bin, np.cumsum(np.bincount(self.bin_of))[:-1])
        return [bins[i] for i in generator.permutation(len(bins))]


def best_fit(lengths: Numbers, capacity: int) -> Numbers:
    """Return the bin of each row, of rows in this order. Each is put into the fullest bin that has space for it.

    lengths: at most `capacity` each."""
    found = np.empty(len(lengths), np.int64)
    with_space = defaultdict[int, list[int]](list)  # free tokens -> bins
    spaces: list[int] = []  # keys of it that have a bin, ascending
    bins = 0
    for row, length in enumerate(lengths.tolist()):
        place = bisect_left(spaces, length)
        if place == len(spaces):
            chosen, space, bins = bins, capacity, bins + 1
        else:
            space = spaces[place]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del spaces[place]
        left = space - length
        if left:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(chosen)
        found[row] = chosen
    return found
