"""The rows of a curve, looked at before anything trains: are there enough, and is a test row among them?"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from fsdp_qlora.data.sources import open_source, parts_of, told_as
from fsdp_qlora.errors import UserError


def check_rows(dataset: str, eval_dataset: str, eval_samples: int | None, most: int) -> list[str]:
    """Return notes for the user. most: rows of the largest point.

    Raises UserError where a dataset cannot be read or has fewer rows than the largest point, and where all test rows
    are trained on."""
    measured = {content for _, content in islice(_contents(eval_dataset, eval_samples, "eval_dataset"), eval_samples)}
    if not measured:
        raise UserError(f"eval_dataset {eval_dataset!r}: has no rows")
    count, first, copies = 0, "", set[str]()
    for location, content in islice(_contents(dataset, most, "dataset"), most):
        count += 1
        if content in measured:
            first = first or f"{location}, row {count:,} of dataset"
            copies.add(content)
    if count < most:
        raise UserError(f"rows {most}: dataset {dataset!r} has {count:,} rows; ask for at most so many")
    if not copies:
        return []
    if len(copies) == len(measured):
        raise UserError(
            f"eval_dataset {eval_dataset!r}: all its rows are among the {most:,} training rows (the first: {first}); "
            "give other rows, or ask for fewer --rows"
        )
    are = "row is" if len(copies) == 1 else "rows are"
    return [
        f"note      {len(copies):,} of {len(measured):,} different test {are} among the {most:,} training rows (the "
        f"first: {first}): points beyond it look better than they are"
    ]


def contents_of(dataset: str, option: str) -> list[str]:
    """Return a number of what each part of `option`'s dataset holds, '' where that cannot be told cheaply.

    Raises UserError where it is not there."""
    with told_as(option):
        return [open_source(part.name, None).content() for part in parts_of(dataset)]


def _contents(dataset: str, samples: int | None, option: str) -> Iterator[tuple[str, str]]:
    """Yield (where a row is, what it holds), as far as the row can be read: others are told when it is trained on."""
    with told_as(option):
        for part in parts_of(dataset):
            for location, raw in open_source(part.name, samples).rows:
                yield location, _content(raw)


def _content(raw: Any) -> str:
    try:
        row = json.loads(raw) if isinstance(raw, str | bytes) else raw
        return json.dumps(row, sort_keys=True, default=str)
    except ValueError:
        return str(raw)
