"""Bounds of documents that lie one after the other in a row [1, T]: attention stays inside each, positions restart.

FlashAttention's backward sums d_q in float32 with 128 rows beside each document's own. Of documents of ten tokens that
is thirteen times what their numbers take. So it is called for groups of documents whose sums have at most 1,024 rows
more than there are tokens: one call where documents are long, a few where they are short.

T tokens, padding at the end included, which is a document of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

PADDED_ROWS = 128  # beside each document's, of FlashAttention's sums
SPARE_DOCUMENTS = 8  # whose padded rows a group may have beyond the tokens of all


class Group(NamedTuple):
    """Documents of one call, as a part of the tokens."""

    tokens: slice
    starts: torch.Tensor  # int32 [documents + 1], counted from the first token of the group
    longest: int  # tokens of a document


@dataclass(frozen=True)
class Segments:
    """The documents of a row. lengths: of each, in order; at least one token each."""

    lengths: tuple[int, ...]
    positions: torch.Tensor  # int64 [1, T], of each token in its document
    starts: torch.Tensor  # int32, `Group.starts` of all groups one after the other
    bounds: tuple[int, ...]  # the first document of each group, and the number of documents

    @cached_property
    def groups(self) -> list[Group]:
        """The calls that FlashAttention is to have; found once, as every layer asks."""
        found, token, place = list[Group](), 0, 0
        for first, end in pairwise(self.bounds):
            lengths = self.lengths[first:end]
            starts = self.starts[place : place + len(lengths) + 1]
            found.append(Group(slice(token, token + sum(lengths)), starts, max(lengths)))
            token, place = token + sum(lengths), place + len(lengths) + 1
        return found

    @cached_property
    def documents(self) -> list[slice]:
        """The tokens of each document."""
        edges = [0]
        for length in self.lengths:
            edges.append(edges[-1] + length)
        return [slice(*edge) for edge in pairwise(edges)]

    def pinned(self) -> "Segments":
        """Return a copy in page-locked memory."""
        return replace(self, positions=self.positions.pin_memory(), starts=self.starts.pin_memory())

    def to(self, device: torch.device) -> "Segments":
        """Return a copy on the device; from page-locked memory the host does not wait for it."""
        positions, starts = (t.to(device, non_blocking=True) for t in (self.positions, self.starts))
        return replace(self, positions=positions, starts=starts)


def segments_of(lengths: Sequence[int]) -> Segments:
    """Return the bounds of documents of these lengths, on the CPU. Raises ValueError for an empty one."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"documents have at least one token each, got lengths {tuple(lengths)}")
    bounds = _bounds(lengths)
    counts = torch.tensor(lengths, dtype=torch.int32)
    zero = counts.new_zeros(1)
    starts = torch.cat([x for a, b in pairwise(bounds) for x in (zero, counts[a:b].cumsum(0, dtype=torch.int32))])
    ends = counts.long().cumsum(0)
    positions = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
    return Segments(tuple(lengths), positions[None], starts, bounds)


def padded_rows(tokens: int, rows: int) -> int:
    """Return the most rows of d_q's sums in a call, for that many tokens in all, in documents or in so many rows."""
    return tokens + PADDED_ROWS * max(SPARE_DOCUMENTS, rows)


def _bounds(lengths: Sequence[int]) -> tuple[int, ...]:
    most, bounds, filled = padded_rows(sum(lengths), 1), [0], 0
    for i, length in enumerate(lengths):
        if filled and filled + length + PADDED_ROWS > most:
            bounds.append(i)
            filled = 0
        filled += length + PADDED_ROWS
    return (*bounds, len(lengths))
