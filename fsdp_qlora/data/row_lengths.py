"""How long a dataset's rows are, as a plan needs to know it: the most and the mean tokens of a micro-batch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fsdp_qlora.data.packing import Bins
from fsdp_qlora.data.row_set import PAD_TO, Rows

FLAT_TO = 16  # tokens of a micro-batch are a multiple of this where rows lie one after the other: as Triton likes


@dataclass(frozen=True)
class RowLengths:
    """Rows that lie one after the other. lengths: tokens of each, int64. widest: of a row, padded as in a batch; where
    rows are packed, of a bin. label_share: of the tokens, those that are learnt."""

    lengths: npt.NDArray[np.int64]
    widest: int
    label_share: float
    bins: Bins | None = None
    at_least: int = 0  # tokens that the longest micro-batch has: a row to evaluate on may be longer than all that train

    @classmethod
    def of(cls, rows: Rows, bins: Bins | None = None) -> "RowLengths":
        """Return those of a dataset, packed into bins or not."""
        widest = rows.widest if bins is None else bins.capacity
        return cls(rows.lengths, widest, float(rows.trains.mean()), bins)

    @property
    def items(self) -> int:
        """Return what counts as a row of a batch: rows, or bins."""
        return len(self.lengths) if self.bins is None else len(self.bins)

    @property
    def mean(self) -> float:
        """Return the mean tokens of what counts as a row of a batch."""
        return float(self.lengths.sum()) / self.items

    def flat(self, batch_size: int) -> bool:
        """Tell whether rows of most micro-batches lie one after the other, by what `collate` asks of the rows."""
        most, together = self._own_tokens(batch_size), min(batch_size, self.items)
        widths = np.minimum(-(-self.lengths // PAD_TO) * PAD_TO, self.widest)
        # Rows of each item, and their width where they are alike.
        counts, of_items = (np.ones_like(widths), widths) if self.bins is None else _of_bins(self.bins, widths)
        rows, share = together * counts, 1 / self.items  # of an item, in a micro-batch of such items
        batches = (of_items > 0) & ((rows == 1) | (rows * of_items <= most))
        _, alike = np.unique(of_items[batches], return_counts=True)
        return bool(((alike * share) ** together).sum() < 0.5)

    def most_tokens(self, batch_size: int) -> int:
        """Return the most tokens that a micro-batch of so many rows can have, padding at its end included."""
        return max(self._own_tokens(batch_size), self.at_least if self.bins is None else 0)

    def _own_tokens(self, batch_size: int) -> int:
        """Return the same of the rows that train, which is what `collate` is told."""
        if self.bins is not None:
            return batch_size * self.widest
        longest = int(np.partition(self.lengths, -min(batch_size, len(self.lengths)))[-batch_size:].sum())
        return min(-(-longest // FLAT_TO) * FLAT_TO, batch_size * self.widest)

    def width(self, batch_size: int) -> int:
        """Return so many tokens a row that micro-batches of such rows have no fewer than `most_tokens`."""
        return min(-(-self.most_tokens(batch_size) // (batch_size * PAD_TO)) * PAD_TO, self.widest)

    def keys(self, window: int | None) -> float:
        """Return the number of keys that a token sees in its row, itself included, the mean over all tokens."""
        inside = self.lengths if window is None else np.minimum(self.lengths, window)
        seen = inside * (inside + 1) / 2 + (self.lengths - inside) * inside
        return float(seen.sum() / self.lengths.sum())


def _of_bins(bins: Bins, widths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (rows, their width or 0 where it is not one) of each bin. widths: of each row."""
    sorted_widths = widths[np.argsort(-bins.lengths, kind="stable")]  # as `bin_of` has the rows
    most, least = np.zeros(len(bins), np.int64), np.full(len(bins), np.iinfo(np.int64).max)
    np.maximum.at(most, bins.bin_of, sorted_widths)
    np.minimum.at(least, bins.bin_of, sorted_widths)
    return np.bincount(bins.bin_of), np.where(most == least, most, 0)
