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
        together = min(batch_size, self.items) * len(self.lengths) / self.items
        widths = np.minimum(-(-self.lengths // PAD_TO) * PAD_TO, self.widest)
        alike = bool((widths == widths[0]).all()) and together * widths[0] <= self.most_tokens(batch_size)
        return together > 1 and not alike

    def most_tokens(self, batch_size: int) -> int:
        """Return the most tokens that a micro-batch of so many rows can have, padding at its end included."""
        if self.bins is not None:
            return batch_size * self.widest
        longest = int(np.partition(self.lengths, -min(batch_size, len(self.lengths)))[-batch_size:].sum())
        return max(min(-(-longest // FLAT_TO) * FLAT_TO, batch_size * self.widest), self.at_least)

    def width(self, batch_size: int) -> int:
        """Return so many tokens a row that micro-batches of such rows have no fewer than `most_tokens`."""
        return min(-(-self.most_tokens(batch_size) // (batch_size * PAD_TO)) * PAD_TO, self.widest)

    def keys(self, window: int | None) -> float:
        """Return the number of keys that a token sees in its row, itself included, the mean over all tokens."""
        inside = self.lengths if window is None else np.minimum(self.lengths, window)
        seen = inside * (inside + 1) / 2 + (self.lengths - inside) * inside
        return float(seen.sum() / self.lengths.sum())
