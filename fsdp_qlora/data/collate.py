"""A micro-batch of rows: their tokens padded to one width, and the positions that a loss is computed at."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fsdp_qlora.data.row_set import PAD_TO, Rows

IGNORE = -100  # the label of a position without loss


@dataclass(frozen=True)
class Batch:
    """The rows of one forward and backward pass on one rank, on the CPU. [B, S] is one row of tokens each."""

    input_ids: Tensor  # int64 [B, S], padded on the right to the longest row
    # int64 [L]: positions in the flattened [B x S] whose next token is a label. Only these go through the head. They
    # are found here, so that a GPU's stream never waits for a count.
    label_positions: Tensor
    labels: Tensor  # int64 [L]: the next token of each
    rows: list[int]  # their numbers in the dataset, for messages; empty for a filler
    tokens: int  # padding not counted


def collate(rows: Rows, chosen: npt.NDArray[np.int64]) -> Batch:
    """Return the batch of the chosen rows; of none a filler without labels."""
    if not len(chosen):
        filler = torch.full((1, 1), rows.pad_id)
        return Batch(filler, *shift_labels(torch.full_like(filler, IGNORE)), [], 0)
    lengths = rows.lengths[chosen]
    width = min(-(-int(lengths.max()) // PAD_TO) * PAD_TO, rows.context_length)
    input_ids = torch.full((len(chosen), width), rows.pad_id)
    labels = torch.full((len(chosen), width), IGNORE)
    for i, row in enumerate(chosen):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        ids = torch.from_numpy(rows.ids[part].astype(np.int64))
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = torch.where(torch.tensor(rows.trains[part]), ids, IGNORE)
    return Batch(input_ids, *shift_labels(labels), rows.index[chosen].tolist(), int(lengths.sum()))


def shift_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (label_positions [L], labels [L]) of labels [B, S] aligned with the tokens, `IGNORE` where no loss is."""
    following = torch.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:]
    positions = (following.flatten() != IGNORE).nonzero().squeeze(1)
    return positions, following.flatten()[positions]
