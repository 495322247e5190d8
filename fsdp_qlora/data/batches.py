"""The order of a dataset's rows, and the micro-batches that each rank takes of them.

The order of rows, and the rows of each optimizer step, depend on the seed, the epoch and the global batch alone, never
on how many ranks share them. Within a step they are dealt by length. Where micro-batches are padded, those of one are
about equally long, so that little is padding. Where rows lie one after the other, each micro-batch has about as many
tokens. Ranks working at the same time have about the same work. The loss is a sum over the step's labels, so it does
not notice.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fsdp_qlora.data.collate import Batch, collate
from fsdp_qlora.data.row_lengths import RowLengths
from fsdp_qlora.data.row_set import Rows
from fsdp_qlora.data.rows import load_rows
from fsdp_qlora.data.tokens import load_tokenizer

__all__ = ["Batch", "Batches", "Rows", "load_rows", "load_tokenizer"]

Numbers = npt.NDArray[np.int64]


class Batches:
    """The micro-batches of one rank. A step is found by (epoch, index) alone, so a run can go on from any.

    flat: the lengths of the rows where they lie one after the other; None: they are padded. A bin of a packed dataset
    counts as a row of the batch."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        flat: RowLengths | None = None,
    ) -> None:
        self.rows, self.batch_size, self.accumulation = rows, batch_size, accumulation
        self.world_size, self.rank, self.seed = world_size, rank, seed
        self.bins = None if flat is None else flat.bins
        self._most_tokens = None if flat is None else flat.most_tokens(batch_size)
        self._epoch, self._order = -1, list[Numbers]()

    @property
    def rows_per_step(self) -> int:
        """Return the rows of a full optimizer step, over all ranks; bins where the dataset is packed."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def items(self) -> int:
        """Return the number of what counts as a row of the batch: rows, or bins where the dataset is packed."""
        return len(self.rows) if self.bins is None else len(self.bins)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.items // self.rows_per_step)

    def completed(self, steps: int) -> float:
        """Return the epochs that the rows or bins of the run's first `steps` steps come to: whole after an epoch's
        last."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs + rest * self.rows_per_step / self.items

    def step(self, epoch: int, index: int) -> list[Batch]:
        """Return this rank's micro-batches of step `index` (0-based) of `epoch` (0-based), as many as every rank's.

        The epoch's last step may have fewer rows: they are spread evenly, and a rank left without gets a filler
        without labels. Raises IndexError beyond the epoch.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"step {index} of an epoch of {self.steps_per_epoch} steps")
        items = self._items(epoch, slice(index * self.rows_per_step, (index + 1) * self.rows_per_step))
        tokens = [int(self.rows.lengths[item].sum()) for item in items]
        longest_first = sorted(range(len(items)), key=lambda i: -tokens[i])  # memory peaks at once
        items, tokens = [items[i] for i in longest_first], [tokens[i] for i in longest_first]
        slots = self.world_size * -(-len(items) // (self.batch_size * self.world_size))
        dealt = _by_length(len(items), slots) if self._most_tokens is None else _by_weight(tokens, slots)
        nothing = np.empty(0, np.int64)
        return [
            collate(self.rows, np.concatenate([nothing, *(items[i] for i in dealt[slot])]), self._most_tokens)
            for slot in range(self.rank, slots, self.world_size)
        ]

    def _items(self, epoch: int, part: slice) -> list[Numbers]:
        """Return, of a part of the epoch, what counts as a row of the batch: the rows of a bin, or one."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            if self.bins is None:
                self._order = [generator.permutation(len(self.rows))]
            else:
                self._order = self.bins.rows(generator)
            self._epoch = epoch
        return list(self._order[0][part, None]) if self.bins is None else self._order[part]


def _by_length(count: int, slots: int) -> list[range]:
    """Deal sorted rows so that those of a slot follow each other."""
    # array_split gives the first pieces one more; reversed, so that the long rows are in the smaller micro-batches
    sizes = [len(piece) for piece in np.array_split(np.empty(count), slots)][::-1]
    edges = np.cumsum([0, *sizes]).tolist()
    return [range(edges[slot], edges[slot + 1]) for slot in range(slots)]


def _by_weight(tokens: Sequence[int], slots: int) -> list[list[int]]:
    """Deal sorted rows so that slots have about as many tokens, the fullest slot first: each to the emptiest so far."""
    most = -(-len(tokens) // slots)
    dealt: list[list[int]] = [[] for _ in range(slots)]
    free = [(0, slot) for slot in range(slots)]
    for i, count in enumerate(tokens):
        filled, slot = heapq.heappop(free)
        dealt[slot].append(i)
        if len(dealt[slot]) < most:
            heapq.heappush(free, (filled + count, slot))
    return sorted(dealt, key=lambda slot: -sum(tokens[i] for i in slot))
