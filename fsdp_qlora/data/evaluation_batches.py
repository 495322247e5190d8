"""The micro-batches of an evaluation: rows by length, as many as fit into a number of tokens, dealt to the ranks.

Which rows go together depends on the rows and that number alone, never on how many ranks share them.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fsdp_qlora.data.collate import Batch, collate
from fsdp_qlora.data.row_set import PAD_TO, Rows


class EvaluationBatches:
    """One rank's micro-batches of all rows, as many as every rank's, the longest first. most_tokens: padding counts."""

    def __init__(self, rows: Rows, most_tokens: int, world_size: int, rank: int) -> None:
        self.rows, self.world_size, self.rank = rows, world_size, rank
        order = np.argsort(-rows.lengths, kind="stable")
        self._pieces: list[npt.NDArray[np.int64]] = []
        while len(order):
            width = min(-(-int(rows.lengths[order[0]]) // PAD_TO) * PAD_TO, rows.context_length)
            count = max(1, most_tokens // width)
            self._pieces.append(order[:count])
            order = order[count:]

    def __len__(self) -> int:
        """Return the micro-batches of each rank."""
        return -(-len(self._pieces) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield number rank, rank + world_size and so on of all; a filler without labels where none is left."""
        for number in range(self.rank, len(self) * self.world_size, self.world_size):
            yield collate(self.rows, self._pieces[number] if number < len(self._pieces) else np.empty(0, np.int64))
