"""An evaluation between two optimizer steps: the loss over rows that are not trained on.

Training goes on to the same bits as without. A forward alone runs, without gradients and with dropout off, so no random
number is drawn; the frozen bytes and the new adapter values come as for a step's forward.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fsdp_qlora.data.batches import Rows
from fsdp_qlora.data.evaluation_batches import EvaluationBatches
from fsdp_qlora.distributed.world import World
from fsdp_qlora.memory.arena import Arena
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.training.async_numbers import AsyncNumbers
from fsdp_qlora.training.step import Inputs


@dataclass(frozen=True)
class Evaluated:
    """What one pass over all rows came to, on all ranks alike."""

    loss: float  # mean over the label tokens of all rows
    label_tokens: int
    tokens: int  # padding excluded
    rows: int
    seconds: float


class Evaluator:
    """Evaluates the model on rows, which all ranks share. most_tokens: of a micro-batch, padding included.

    borrow: memory for a forward's tensors, which a step has between two of its own; None: PyTorch's allocator's."""

    def __init__(
        self,
        model: CausalModel,
        rows: Rows,
        most_tokens: int,
        world: World,
        borrow: Callable[[], Arena | None] = lambda: None,
    ) -> None:
        self.model, self.rows, self.world, self.borrow = model, rows, world, borrow
        self.batches = EvaluationBatches(rows, most_tokens, world.size, world.rank)

    def __call__(self, stop: Callable[[], bool]) -> Evaluated | None:
        """Return the loss; None where `stop`, asked after each micro-batch and alike on all ranks, is true.

        A collective. The loss is the same to the last bit for any number of ranks that compute a row to the same bits:
        each micro-batch is summed up as it is, and these sums exactly."""
        start, device = time.perf_counter(), self.world.device
        sums = torch.zeros(len(self.batches), device=device)
        n_labels = n_tokens = 0
        with self.model.evaluating(), _placed(self.borrow()) as begin:
            for i, batch in enumerate(self.batches):
                begin()
                # Divided by 1: what is summed up are the losses themselves, without a loss scale.
                sums[i] = Inputs.of(batch, device).loss(self.model, 1.0, device)
                n_labels, n_tokens = n_labels + batch.labels.numel(), n_tokens + batch.tokens
                if stop():
                    return None
            (own,) = AsyncNumbers(sums[None]).wait()
        every = self.world.gather([n_labels, n_tokens, *own])
        labels, tokens = (int(sum(row[column] for row in every)) for column in (0, 1))
        loss = math.fsum(number for row in every for number in row[2:]) / labels
        return Evaluated(loss, labels, tokens, len(self.rows), time.perf_counter() - start)


@contextmanager
def _placed(arena: Arena | None) -> Iterator[Callable[[], None]]:
    """Yield what is called before each forward inside, whose tensors then lie in the arena."""
    if arena is None:
        yield lambda: None
        return
    try:
        yield arena.start
    finally:
        arena.stop()
