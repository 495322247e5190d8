"""Where rows come from: fsdp_qlora's dataset names, any dataset of the hub, a local file. Rows leave as plain dicts."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import UserError, first_line

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Named:
    """One of fsdp_qlora's dataset names: the hub id and what that program does with it."""

    hub_id: str
    split: str = "train"
    samples: int | None = None  # rows taken when dataset_samples is not given; None = all
    shuffle_seed: int | None = None  # shuffled before rows are taken; fixed, so that the held-back rows stay the same
    skip: int = 0  # rows held back after shuffling (fsdp_qlora's evaluation uses them)
    form: str = "auto"


NAMES = {
    "alpaca": Named("yahma/alpaca-cleaned"),
    "alpaca_sample": Named("yahma/alpaca-cleaned", samples=512),
    "guanaco": Named("timdettmers/openassistant-guanaco", form="guanaco"),
    "sql": Named("knowrohit07/know_sql", split="validation", shuffle_seed=42, skip=1000),
    "orca_math": Named("microsoft/orca-math-word-problems-200k", samples=512, shuffle_seed=42),
}


@dataclass
class Source:
    """Rows on their way in. `rows` yields (place, row); place says where a bad row is, e.g. 'line 17'. Read it once."""

    name: str
    rows: Iterator[tuple[str, Row]]
    form: str = "auto"


def open_source(dataset: str, samples: int | None) -> Source:
    """Rows of `dataset` (a name, a local path or a hub id), the first `samples` of them.

    Nothing is read before the first row is taken. While rows are taken, raises UserError for a
    missing file, an unknown file type, a malformed line (with its number).
    """
    if dataset in NAMES:
        named = NAMES[dataset]
        return Source(dataset, _hub_rows(dataset, named, samples or named.samples), named.form)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return Source(dataset, _hub_rows(dataset, Named(str(path)), samples))
    if path.is_file() or path.suffix in SUFFIXES or dataset.startswith((".", "/", "~")):
        return Source(dataset, islice(_file_rows(path), samples))
    return Source(dataset, _hub_rows(dataset, Named(dataset), samples))


def _hub_rows(dataset: str, named: Named, samples: int | None) -> Iterator[tuple[str, Row]]:
    import datasets  # with pandas and Arrow 0.9 s and 80 MiB on every rank, which rows of a local file do not need

    try:
        splits = datasets.load_dataset(named.hub_id)
    except Exception as error:  # the hub's client raises from a dozen libraries; whatever it is, the user must know it
        is_folder = Path(named.hub_id).is_dir()
        tried = (
            "the folder could not be loaded as a dataset"
            if is_folder
            else f"could not be loaded from the hub as {named.hub_id!r}"
        )
        known = ", ".join(["dummy", *NAMES])
        raise UserError(
            f"dataset {dataset!r}: {tried} ({first_line(error)}); "
            f"give one of {known}, a hub id, or a path ending in {', '.join(SUFFIXES)}"
        ) from error
    split = named.split if named.split in splits or len(splits) != 1 else next(iter(splits))
    if split not in splits:
        raise UserError(
            f"dataset {dataset!r}: has no split {split!r}, only {', '.join(splits)}; save the one you want as a file"
        )
    table = splits[split]
    if named.shuffle_seed is not None:
        table = table.shuffle(seed=named.shuffle_seed)
    stop = len(table) if samples is None else min(len(table), named.skip + samples)
    for index in range(named.skip, stop):
        yield f"row {index}", table[index]


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"dataset {str(path)!r}: unknown file type {path.suffix!r}; use {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"dataset {str(path)!r}: no such file (the current folder is {Path.cwd()})")
    read = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}[path.suffix]
    try:
        for place, row in read(path):
            if not isinstance(row, dict):
                raise UserError(
                    f"dataset {str(path)!r}: {place} is {type(row).__name__}, but each row must be an object"
                )
            yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {str(path)!r}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"dataset {str(path)!r}: cannot be read ({error.strerror or error})") from error


def _malformed(path: Path, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"dataset {str(path)!r}: line {line}, column {error.colno}: malformed JSON ({error.msg})")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise _malformed(path, number, error) from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):  # many tools write JSON lines under this suffix
        yield from _jsonl(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _malformed(path, error.lineno, error) from error
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"dataset {str(path)!r}: is not a parquet file ({first_line(error)})") from error


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    count = len(reader.fieldnames or [])
                    raise UserError(
                        f"dataset {str(path)!r}: line {reader.line_num} does not have the header's {count} fields"
                    )
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise UserError(f"dataset {str(path)!r}: line {reader.line_num}: malformed CSV ({error})") from error
