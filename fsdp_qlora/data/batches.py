"""The order of a dataset's rows, and the micro-batches that each rank takes of them.

The order of rows, and the rows of each optimizer step, depend on the seed, the epoch and the global batch alone, never
on how many ranks share them. Within a step rows are dealt by length: those of one micro-batch are about equally long,
so little is padding, and ranks working at the same time have about the same work. The loss is a sum over the step's
labels, so it does not notice.
"""

import numpy as np
import numpy.typing as npt

from fsdp_qlora.data.collate import Batch, collate
from fsdp_qlora.data.row_set import Rows
from fsdp_qlora.data.rows import load_rows
from fsdp_qlora.data.tokens import load_tokenizer

__all__ = ["Batches", "Rows", "load_rows", "load_tokenizer"]


class Batches:
    """The micro-batches of one rank. A step is found by (epoch, index) alone, so a run can go on from any."""

    def __init__(self, rows: Rows, batch_size: int, accumulation: int, world_size: int, rank: int, seed: int):
        self.rows, self.batch_size, self.accumulation = rows, batch_size, accumulation
        self.world_size, self.rank, self.seed = world_size, rank, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def rows_per_step(self) -> int:
        """Return the rows of a full optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    def completed(self, steps: int) -> float:
        """Return the epochs that the rows of the run's first `steps` steps come to: whole after an epoch's last."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs + rest * self.rows_per_step / len(self.rows)

    def step(self, epoch: int, index: int) -> list[Batch]:
        """Return this rank's micro-batches of step `index` (0-based) of `epoch` (0-based), as many as every rank's.

        The epoch's last step may have fewer rows: they are spread evenly, and a rank left without gets a filler
        without labels. Raises IndexError beyond the epoch.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"step {index} of an epoch of {self.steps_per_epoch} steps")
        chosen = self._permutation(epoch)[index * self.rows_per_step : (index + 1) * self.rows_per_step]
        chosen = chosen[np.argsort(-self.rows.lengths[chosen], kind="stable")]  # longest first: memory peaks at once
        slots = self.world_size * -(-len(chosen) // (self.batch_size * self.world_size))
        # array_split gives the first pieces one more; reversed, so that the long rows are in the smaller micro-batches
        sizes = [len(piece) for piece in np.array_split(chosen, slots)][::-1]
        edges = np.cumsum([0, *sizes])
        return [
            collate(self.rows, chosen[edges[slot] : edges[slot + 1]])
            for slot in range(self.rank, slots, self.world_size)
        ]

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._order
