"""Tokenized rows, kept flat, and several datasets' rows as one."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fsdp_qlora.data.sources import Part
from fsdp_qlora.units import count_of

PAD_TO = 8  # widths of batches are multiples of this, which is what tensor cores like


@dataclass
class Rows:
    """Tokenized rows, flat: row i is ids[offsets[i]:offsets[i + 1]], 5 bytes a token.

    ids int32; trains bool (what is learnt); offsets int64 [len + 1]; index int64 [len]: each row's number in the
    dataset (0-based; several datasets are numbered through). n_read rows were read, n_truncated of them cut at
    context_length, n_dropped left out because no label was left. notes: what else the user is told of them.
    """

    name: str
    form: str
    ids: npt.NDArray[np.int32]
    trains: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    context_length: int
    pad_id: int
    n_read: int
    n_dropped: int
    n_truncated: int
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def widest(self) -> int:
        """Return the number of tokens of the longest row, padded as a batch of it is."""
        return min(-(-int(self.lengths.max()) // PAD_TO) * PAD_TO, self.context_length)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row, int64 [len]."""
        return np.diff(self.offsets)

    @cached_property
    def digest(self) -> str:
        """Return a checksum of all tokens, of what is learnt of them and of the rows' order: 0.5 s for 100 M tokens."""
        content = hashlib.sha256()
        for part in (self.ids, self.trains, self.offsets, self.index):
            content.update(np.ascontiguousarray(part).view(np.uint8).data)
        return content.hexdigest()

    @property
    def summary(self) -> str:
        """Return one line for the user: rows by form, numbers of tokens and labels, what was cut or left out."""
        return "; ".join(
            [
                f"{self.name}: {count_of(len(self), 'row')} ({self.form}), {len(self.ids):,} tokens, "
                f"{int(self.trains.sum()):,} of them labels, longest row {int(self.lengths.max())}",
                *self.notes,
            ]
        )

    def take(self, chosen: npt.NDArray[np.int64]) -> "Rows":
        """Return these rows alone, in the order of `chosen` (numbers of rows here)."""
        starts, ends = self.offsets[chosen].tolist(), self.offsets[chosen + 1].tolist()
        parts = [slice(0, 0), *(slice(start, end) for start, end in zip(starts, ends, strict=True))]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[chosen])]).astype(np.int64)
        ids, trains = (np.concatenate([flat[part] for part in parts]) for flat in (self.ids, self.trains))
        held = (ids, trains, offsets, self.index[chosen])
        counts = (self.context_length, self.pad_id, self.n_read, self.n_dropped, self.n_truncated)
        return Rows(self.name, self.form, *held, *counts, list(self.notes))


def merged(rows: list[Rows], parts: list[Part], samples: int | None) -> Rows:
    """Return the rows of several datasets as one: all of them, or shares by weight as large as the rows allow."""
    if len(rows) == 1:
        return rows[0]
    shares = _shares([len(part) for part in rows], [part.weight for part in parts], samples)
    taken = [part.take(np.linspace(0, len(part) - 1, n).round().astype(np.int64)) if n < len(part) else part
             for part, n in zip(rows, shares, strict=True)]  # fmt: skip
    before = np.cumsum([0, *(part.n_read for part in rows)])
    told = [f"{r.name} {n:,} of {count_of(len(r), 'row')}" for r, n in zip(rows, shares, strict=True)]
    notes = [f"{r.name}: {note}" for r in rows for note in r.notes]
    lengths = np.concatenate([part.lengths for part in taken])
    return Rows(
        name=" + ".join(told),
        form=" + ".join(dict.fromkeys(part.form for part in rows)),
        ids=np.concatenate([part.ids for part in taken]),
        trains=np.concatenate([part.trains for part in taken]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        index=np.concatenate([part.index + first for part, first in zip(taken, before, strict=False)]),
        context_length=rows[0].context_length,
        pad_id=rows[0].pad_id,
        n_read=int(before[-1]),
        n_dropped=sum(part.n_dropped for part in rows),
        n_truncated=sum(part.n_truncated for part in rows),
        notes=notes,
    )


def _shares(lengths: list[int], weights: list[float | None], samples: int | None) -> list[int]:
    """Return the rows to take of each dataset: none twice."""
    if weights[0] is None:
        left = samples if samples is not None else sum(lengths)
        shares = []
        for length in lengths:
            shares.append(min(length, left))
            left -= shares[-1]
        return shares
    given = np.array([weight or 0.0 for weight in weights])
    given /= given.sum()
    total = min(length / weight for length, weight in zip(lengths, given, strict=True))
    total = total if samples is None else min(total, samples)
    return [max(1, min(length, round(total * weight))) for length, weight in zip(lengths, given, strict=True)]
