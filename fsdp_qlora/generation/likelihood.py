"""The loss of each row: of what it is learnt to say, or of one of the answers that it is to choose from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fsdp_qlora.data.batches import Rows
from fsdp_qlora.data.evaluation_batches import EvaluationBatches
from fsdp_qlora.distributed.world import World
from fsdp_qlora.models.causal_lm import CausalModel


class RowLoss(NamedTuple):
    """Of one row: the sum of its labels' cross-entropies, and how many they are."""

    total: float
    labels: int


def row_losses(model: CausalModel, rows: Rows, most_tokens: int, world: World) -> list[RowLoss]:
    """Return each row's, in their order, on every rank. most_tokens: of a pass, padding included. A collective."""
    found = np.zeros((len(rows), 2))
    places = {int(number): i for i, number in enumerate(rows.index)}
    with model.evaluating():
        for batch in EvaluationBatches(rows, most_tokens, world.size, world.rank):
            positions, labels = batch.label_positions, batch.labels
            if not len(labels):  # a filler: ranks that bring each other the blocks need this one all the same
                positions, labels = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            inputs = [t.to(world.device) for t in (batch.input_ids, positions, labels)]
            losses = model.losses(*inputs).double().cpu()
            for label, loss in zip((positions // batch.input_ids.shape[1]).tolist(), losses.tolist(), strict=True):
                if batch.rows:
                    found[places[batch.rows[label]]] += (loss, 1)
    every = np.array(world.gather(found.flatten().tolist())).sum(0).reshape(-1, 2)
    return [RowLoss(float(total), int(labels)) for total, labels in every]


def rows_of(pieces: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Rows:
    """Return rows of (prompt, answer) ids, of which the answers are the labels."""
    lengths = [len(prompt) + len(answer) for prompt, answer in pieces]
    ids = np.array([token for piece in pieces for part in piece for token in part], np.int32)
    trains = np.array([flag for prompt, answer in pieces for flag in [False] * len(prompt) + [True] * len(answer)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    counts = (max(lengths), pad_id, len(pieces), 0, 0)
    return Rows("choices", "choices", ids, trains.astype(np.bool_), offsets, np.arange(len(pieces)), *counts)
