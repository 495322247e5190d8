"""Files of rows: JSON, JSON lines, CSV, TSV, Parquet and Arrow, also compressed; each row with its location."""

import csv
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fsdp_qlora.data.json_files import read_json, read_lines
from fsdp_qlora.data.packed import PACKED, WRONG, Placed, open_bytes
from fsdp_qlora.errors import UserError, first_line

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow")


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds ('.jsonl' of rows.JSONL.gz), '' where none is known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = {".ndjson": ".jsonl"}.get(kind, kind)
    return kind if kind in SUFFIXES else ""


def read_file(path: Path, kind: str = "") -> Iterator[Placed]:
    """Return the (location, row) of a file as they are taken; a row may be JSON that `parse_line` reads.

    Raises UserError for a missing file and an unknown type at once, for one that cannot be read while rows are taken.
    """
    kind = kind or kind_of(path)
    name = f"dataset {str(path)!r}"
    if not path.exists():
        raise UserError(f"{name}: no such file (the current folder is {Path.cwd()})")
    if not path.is_file():
        raise UserError(f"{name}: is no regular file, and is read more than once; pipe it in and use --dataset -")
    if not kind:
        raise UserError(
            f"{name}: unknown file type {path.suffix!r}; use {', '.join(SUFFIXES)}, also with {', '.join(PACKED)}"
        )
    if path.stat().st_size < 200 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{name}: is a git-lfs pointer, not the file itself; run git lfs pull in its folder")
    return _read(path, kind, name)


def _read(path: Path, kind: str, name: str) -> Iterator[Placed]:
    try:
        yield from READERS[kind](path, name)
    except UnicodeDecodeError as error:  # its own place is one in a piece of the file
        raise UserError(f"{name}{_first_that_is_not_utf8(path)}; save it as UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _first_that_is_not_utf8(path: Path) -> str:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}: is not UTF-8 text ({error.reason} at byte {error.start} of the line)"
    return ": is not UTF-8 text"


def _table(rows: Any, number: int) -> Iterator[Placed]:
    for row in rows:
        yield f"row {number}", {key: without_nulls(value) for key, value in row.items()}
        number += 1


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls inside it: Arrow gives each object of a list the keys of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [without_nulls(held) for held in value]
    return value


@contextmanager
def _refusing(name: str, what: str) -> Iterator[None]:
    """Raise UserError in place of what pyarrow raises for a file that is not `what`."""
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{name}: is not {what} ({first_line(error)})") from error


def _parquet(path: Path, name: str) -> Iterator[Placed]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    with (
        _refusing(name, "a parquet file"),
        open_bytes(path) as packed,
        pyarrow.parquet.ParquetFile(packed) as file,
    ):
        _check_names(file.schema_arrow.names, name)
        for batch in file.iter_batches(batch_size=1024):
            yield from _table(batch.to_pylist(), number)
            number += batch.num_rows


def _arrow(path: Path, name: str) -> Iterator[Placed]:
    number = 0
    with _refusing(name, "an Arrow file"), open_bytes(path) as packed:
        for batch in _record_batches(packed):
            _check_names(batch.schema.names, name)
            yield from _table(batch.to_pylist(), number)
            number += batch.num_rows


def _record_batches(packed: IO[bytes]) -> Iterator[Any]:
    import pyarrow.ipc  # type: ignore[import-untyped]

    try:
        stream = pyarrow.ipc.open_stream(packed)
    except pyarrow.ArrowInvalid:
        packed.seek(0)
    else:
        yield from stream
        return
    file = pyarrow.ipc.open_file(packed)
    yield from (file.get_batch(index) for index in range(file.num_record_batches))


def _check_names(names: list[str], name: str) -> None:
    twice = next((column for column in names if names.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: names the column {twice!r} twice; name each once")


def _csv(path: Path, name: str) -> Iterator[Placed]:
    return _delimited(path, name, ",")


def _tsv(path: Path, name: str) -> Iterator[Placed]:
    return _delimited(path, name, "\t")


def _delimited(path: Path, name: str, delimiter: str) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    with open_bytes(path) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        begins = 1
        try:
            header = next((fields for fields in reader if fields), [])
            _check_names(header, name)
            begins = reader.line_num + 1  # a row may go over many lines
            for fields in reader:
                location, begins = f"line {begins}", reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield location, {WRONG: f"does not have the header's {len(header)} fields, but {len(fields)}"}
                else:
                    yield location, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{name}: line {begins}: malformed {'CSV' if delimiter == ',' else 'TSV'} ({error})"
            ) from error


READERS: dict[str, Callable[[Path, str], Iterator[Placed]]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".tsv": _tsv,
}
