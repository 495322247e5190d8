"""A micro-batch of rows: their tokens, padded to one width or one after the other, and the positions with a loss."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fsdp_qlora.data.row_lengths import FLAT_TO
from fsdp_qlora.data.row_set import PAD_TO, Rows
from fsdp_qlora.kernels.segments import Segments, segments_of

IGNORE = -100  # the label of a position without loss


@dataclass(frozen=True)
class Batch:
    """The rows of one forward and backward pass on one rank, on the CPU.

    Either a row of `input_ids` [B, S] is one of the dataset's, or they lie one after the other [1, T] and `segments`
    has their bounds."""

    input_ids: Tensor  # int64 [B, S], padded on the right; or [1, T], with padding at the end, a document of its own
    # int64 [L]: positions in the flattened [B x S] whose next token is a label. Only these go through the head. They
    # are found here, so that a GPU's stream never waits for a count.
    label_positions: Tensor
    labels: Tensor  # int64 [L]: the next token of each
    rows: list[int]  # their numbers in the dataset, for messages; empty for a filler
    tokens: int  # padding not counted
    segments: Segments | None = None


def collate(rows: Rows, chosen: npt.NDArray[np.int64], most_tokens: int | None = None) -> Batch:
    """Return the batch of the chosen rows; of none a filler without labels.

    most_tokens: of a micro-batch, padding included, if rows may lie one after the other. They do, unless they are
    about equally long: attention is faster over a batch. None: each is padded to the longest."""
    if not len(chosen):
        filler = torch.full((1, 1), rows.pad_id)
        return Batch(filler, *shift_labels(torch.full_like(filler, IGNORE)), [], 0)
    widths = np.minimum(-(-rows.lengths[chosen] // PAD_TO) * PAD_TO, rows.context_length)
    alike = len(set(widths.tolist())) == 1
    if most_tokens is None or (alike and widths.sum() <= most_tokens):
        return _padded(rows, chosen, int(widths.max()))
    return _flat(rows, chosen, most_tokens)


def _padded(rows: Rows, chosen: npt.NDArray[np.int64], width: int) -> Batch:
    input_ids = torch.full((len(chosen), width), rows.pad_id)
    labels = torch.full((len(chosen), width), IGNORE)
    for i, row in enumerate(chosen):
        ids, learnt = _tokens(rows, row)
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = learnt
    return Batch(input_ids, *shift_labels(labels), rows.index[chosen].tolist(), int(rows.lengths[chosen].sum()))


def _flat(rows: Rows, chosen: npt.NDArray[np.int64], most_tokens: int) -> Batch:
    tokens = int(rows.lengths[chosen].sum())
    padding = max(0, min(-tokens % FLAT_TO, most_tokens - tokens))
    ids, labels = list[Tensor](), list[Tensor]()
    for row in chosen:
        here, learnt = _tokens(rows, row)
        learnt[0] = IGNORE  # nothing of its own row comes before it
        ids.append(here)
        labels.append(learnt)
    ids.append(torch.full((padding,), rows.pad_id))
    labels.append(torch.full((padding,), IGNORE))
    segments = segments_of([*rows.lengths[chosen].tolist(), *([padding] if padding else [])])
    shifted = shift_labels(torch.cat(labels)[None])
    return Batch(torch.cat(ids)[None], *shifted, rows.index[chosen].tolist(), tokens, segments)


def _tokens(rows: Rows, row: int) -> tuple[Tensor, Tensor]:
    """Return (ids, labels aligned with them) of a row, int64."""
    part = slice(rows.offsets[row], rows.offsets[row + 1])
    ids = torch.from_numpy(rows.ids[part].astype(np.int64))
    return ids, torch.where(torch.tensor(rows.trains[part]), ids, IGNORE)


def shift_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (label_positions [L], labels [L]) of labels [B, S] aligned with the tokens, `IGNORE` where no loss is."""
    following = torch.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:]
    positions = (following.flatten() != IGNORE).nonzero().squeeze(1)
    return positions, following.flatten()[positions]
