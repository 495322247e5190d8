"""Rows to evaluate on: held out of the training rows, or another dataset's. No row is ever on both sides.

A row is known by its tokens. What is held out depends on the rows' tokens and the seed alone, not on their order, so
that a dataset that grows or is shuffled keeps nearly the same rows held out.
"""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.options import Config
from fsdp_qlora.data.row_set import Rows
from fsdp_qlora.data.rows import load_other_rows
from fsdp_qlora.errors import UserError
from fsdp_qlora.units import count_of


def rows_to_evaluate(
    config: Config, rows: Rows, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, progress: bool = False
) -> tuple[Rows, Rows | None]:
    """Return (the rows to train on, the rows to evaluate on, None where none are asked for).

    rows: as `load_rows` has read them, with this tokenizer. Raises UserError where either side would have none."""
    options, seed = config.evaluation, config.training.seed
    if options.eval_dataset is not None:
        assert tokenizer is not None, "dummy rows are not evaluated on others"
        data = replace(config.data, dataset=options.eval_dataset, dataset_samples=options.eval_samples)
        others = load_other_rows(data, tokenizer, vocab_size, progress)
        return rows, _checked(without_copies(others, rows, options.eval_dataset))
    if options.eval_samples is not None:
        asked, count = f"eval_samples {options.eval_samples}", options.eval_samples
    elif options.eval_fraction is not None:
        asked, count = f"eval_fraction {options.eval_fraction}", round(options.eval_fraction * len(rows))
    else:
        return rows, None
    if not 0 < count < len(rows):
        raise UserError(
            f"{asked}: is {'none' if count == 0 else 'all'} of the {count_of(len(rows), 'row')}; "
            f"{'raise' if count == 0 else 'lower'} it"
        )
    training, held = hold_out(rows, count, seed)
    if not len(held):
        raise UserError(
            f"{asked}: nothing can be held out, as rows of the same tokens stay on one side and there are more than "
            f"{count} of each; raise it, or give --eval_dataset"
        )
    return training, _checked(held)


def hold_out(rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
    """Return (the rows to train on, at most `count` rows to evaluate on), both in the order that they were in.

    Rows of the same tokens stay on one side, as do the parts of one row of the dataset that was split."""
    contents = digests(rows, seed)
    group = _groups(contents, rows.index)
    sizes, left, held = np.bincount(group), count, np.zeros(len(group), np.bool_)
    names = _mixed(np.unique(contents))[: len(sizes)]  # of each group, by its lowest content
    for label in np.argsort(names, kind="stable"):
        if 0 < sizes[label] <= left:
            held[label], left = True, left - sizes[label]
        if not left:
            break
    out = held[group]
    training, evaluation = (rows.take(np.flatnonzero(side)) for side in (~out, out))
    told = "held out by content" + (f", {count - left} of {count} asked for (copies stay together)" if left else "")
    evaluation.notes = [told]
    return training, evaluation


def without_copies(others: Rows, training: Rows, name: str) -> Rows:
    """Return the rows of another dataset that are not among the training rows. Raises UserError where none is left."""
    copies = np.isin(digests(others, 0), digests(training, 0))
    if not copies.any():
        return others
    if copies.all():
        raise UserError(
            f"eval_dataset {name!r}: all its {count_of(len(others), 'row')} are among the training rows; give other "
            "rows, or hold training rows out with --eval_fraction"
        )
    left = others.take(np.flatnonzero(~copies))
    left.notes.append(f"{count_of(int(copies.sum()), 'row')} left out: among the training rows too")
    return left


def digests(rows: Rows, seed: int) -> npt.NDArray[np.uint64]:
    """Return a number of each row's tokens, uint64 [len]: the same for the same tokens, another for each seed."""
    key, tokens = seed.to_bytes(8, "little"), np.ascontiguousarray(rows.ids).view(np.uint8).data
    edges = (rows.offsets * rows.ids.itemsize).tolist()
    hashes = (hashlib.blake2b(tokens[start:end], digest_size=8, key=key).digest() for start, end in pairwise(edges))
    return np.frombuffer(b"".join(hashes), np.dtype("<u8")).astype(np.uint64)


def _groups(contents: npt.NDArray[np.uint64], index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each row's group, int64 [len]: rows of one content or of one row of the dataset, and what these join.

    A group's number is the rank of its lowest content among all contents."""
    kinds = [np.unique(values, return_inverse=True)[1].ravel() for values in (contents, index)]
    group = kinds[0].astype(np.int64)
    while True:
        before = group
        for kind in kinds:
            lowest = np.full(len(group), len(group), np.int64)
            np.minimum.at(lowest, kind, group)
            group = lowest[kind]
        if (group == before).all():
            return group


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the values mixed (SplitMix64): groups of many contents, whose lowest is low, shall not come first."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def _checked(rows: Rows) -> Rows:
    """Return the rows. Raises UserError where none has a label, as of one token each."""
    if not count_labels(rows):
        raise UserError(f"evaluation rows {rows.name!r}: none of them has a token to predict; give other rows")
    return rows


def count_labels(rows: Rows) -> int:
    """Return the number of labels: learnt tokens, but for a row's first, which nothing predicts."""
    return int(rows.trains.sum()) - int(rows.trains[rows.offsets[:-1]].sum())
