"""The tokenized rows of a dataset: read, recognised, tokenized in chunks, cut at the context length, kept flat."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.chat import chat_template
from fsdp_qlora.config import DataOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.sources import Source, open_source
from fsdp_qlora.templates import TEMPLATES, form_of
from fsdp_qlora.tokens import Encoder, Tokens

T = TypeVar("T")

CHUNK = 2048  # rows tokenized in one call: enough to occupy every core, few enough to hold as Python objects
DUMMY_SAMPLES = 512
PAD_TO = 8  # widths of batches are multiples of this, which is what tensor cores like


@dataclass
class Rows:
    """Tokenized rows, flat: row i is ids[offsets[i]:offsets[i + 1]], 5 bytes a token.

    ids int32; trains bool (what is learnt); offsets int64 [len + 1]; index int64 [len]: each row's number in the
    dataset (0-based). n_read rows were read, n_truncated of them cut at context_length, n_dropped left out because no
    label was left.
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

    def __len__(self) -> int:
        return len(self.index)

    @property
    def widest(self) -> int:
        """Tokens of the longest row, padded as a batch of it is."""
        return min(-(-int(self.lengths.max()) // PAD_TO) * PAD_TO, self.context_length)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, int64 [len]."""
        return np.diff(self.offsets)

    @property
    def summary(self) -> str:
        """One line for the user: how many rows of which form, how many tokens and labels, what was cut or left out."""
        parts = [
            f"{self.name}: {len(self):,} rows ({self.form}), {len(self.ids):,} tokens, "
            f"{int(self.trains.sum()):,} of them labels, longest row {int(self.lengths.max())}"
        ]
        if self.n_truncated:
            parts.append(f"{self.n_truncated:,} rows cut at context_length {self.context_length}")
        if self.n_dropped:
            parts.append(
                f"{self.n_dropped:,} rows left out: no answer token within context_length {self.context_length}"
            )
        return "; ".join(parts)


def load_rows(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase | None, max_positions: int | None, vocab_size: int
) -> Rows:
    """Reads, recognises, tokenizes and truncates the dataset of `options`. `dummy` needs no tokenizer.

    max_positions: the longest sequence the model was made for, None if it has no limit. vocab_size: rows of its
    embedding. Raises UserError: context_length beyond the model, missing or malformed file (with the line), columns
    that fit no form, no rows at all, no row with a label left, a token the model has no embedding for.
    """
    context = options.context_length
    if max_positions is not None and context > max_positions:
        raise UserError(f"context_length {context}: the model takes at most {max_positions} tokens")
    if options.dataset == "dummy":
        return _dummy(options.dataset_samples or DUMMY_SAMPLES, context, vocab_size)
    assert tokenizer is not None, "only the dummy dataset needs no tokenizer"
    source = open_source(options.dataset, options.dataset_samples)
    collected = _Collector(context)
    form = ""
    for chunk in _chunks(source.rows, CHUNK):
        if not form:
            form = _form(source, options.dataset_format, chunk[0][1])
            template = chat_template(tokenizer, source.name) if form == "messages" else TEMPLATES[form]
            encoder = Encoder(tokenizer, options.train_on_prompt)
        examples = [template(row, f"dataset {source.name!r}: {place}") for place, row in chunk]
        collected.add(encoder.encode(examples))
    if not collected.n_read:
        raise UserError(f"dataset {source.name!r}: has no rows")
    pad_id = int(tokenizer.pad_token_id or 0)  # which one does not matter: padding is masked by its position
    rows = collected.rows(source.name, form, pad_id if pad_id < vocab_size else 0)
    if not len(rows):
        raise UserError(
            f"dataset {source.name!r}: none of its {rows.n_read:,} rows has an answer token within "
            f"context_length {context}; raise context_length, or check that answers are not empty"
        )
    if int(rows.ids.max()) >= vocab_size:
        top = int(rows.ids.max())
        raise UserError(
            f"the tokenizer makes token {top}, but the model has {vocab_size} embeddings: they do not match"
        )
    return rows


def _form(source: Source, dataset_format: str, row: dict[str, object]) -> str:
    if dataset_format == "auto" and source.form != "auto":
        return source.form
    return form_of(row, dataset_format, source.name)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class _Collector:
    """Gathers tokenized rows: cut, counted, and left out where nothing is learnt from them."""

    def __init__(self, context_length: int):
        self.context_length = context_length
        self.kept: list[Tokens] = []
        self.index: list[int] = []
        self.n_read = self.n_truncated = 0

    def add(self, tokens: list[Tokens]) -> None:
        for row in tokens:
            self.n_truncated += len(row.ids) > self.context_length
            cut = Tokens(row.ids[: self.context_length], row.trains[: self.context_length])
            if cut.trains.any():
                self.kept.append(cut)
                self.index.append(self.n_read)
            self.n_read += 1

    def rows(self, name: str, form: str, pad_id: int) -> Rows:
        return Rows(
            name=name,
            form=form,
            ids=np.concatenate([row.ids for row in self.kept] or [np.empty(0, np.int32)]),
            trains=np.concatenate([row.trains for row in self.kept] or [np.empty(0, np.bool_)]),
            offsets=np.cumsum([0, *(len(row.ids) for row in self.kept)], dtype=np.int64),
            index=np.array(self.index, dtype=np.int64),
            context_length=self.context_length,
            pad_id=pad_id,
            n_read=self.n_read,
            n_dropped=self.n_read - len(self.kept),
            n_truncated=self.n_truncated,
        )


def _dummy(samples: int, context_length: int, vocab_size: int) -> Rows:
    """Random tokens that fill the context, each a label: for measuring speed and memory."""
    ids = np.random.default_rng(0).integers(0, vocab_size, samples * context_length, dtype=np.int32)
    trains = np.ones((samples, context_length), dtype=np.bool_)
    trains[:, 0] = False
    offsets = np.arange(samples + 1, dtype=np.int64) * context_length
    return Rows(
        "dummy", "random tokens", ids, trains.reshape(-1), offsets, np.arange(samples), context_length, 0, samples, 0, 0
    )
