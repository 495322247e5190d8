"""Files of rows: JSON, JSON lines, CSV, TSV, Parquet and Arrow, also compressed; each row with its location."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fsdp_qlora.data.forms import FORMS
from fsdp_qlora.errors import BadRow, UserError, first_line

Raw = dict[str, Any] | bytes  # a row, or the JSON line that holds it
Placed = tuple[str, Raw]

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow")
PACKED = (".gz", ".zst", ".bz2", ".xz")
WRONG = "\0wrong"  # the only key of a row that its reader could not make out; its value says why
SPACE = re.compile(r"[ \t\r\n]*")
ROW_KEYS = ("data", "train", "rows", "examples")  # preferred, where an object holds several lists of objects


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds ('.jsonl' of rows.JSONL.gz), '' where none is known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = {".ndjson": ".jsonl"}.get(kind, kind)
    return kind if kind in SUFFIXES else ""


def read_file(path: Path, kind: str = "") -> Iterator[Placed]:
    """Yield (location, row) of a file. Raises UserError if the file cannot be read, BadRow if a row cannot."""
    kind = kind or kind_of(path)
    name = f"dataset {str(path)!r}"
    if not kind:
        raise UserError(
            f"{name}: unknown file type {path.suffix!r}; use {', '.join(SUFFIXES)}, also with {', '.join(PACKED)}"
        )
    if not path.is_file():
        raise UserError(f"{name}: no such file (the current folder is {Path.cwd()})")
    if path.stat().st_size < 200 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{name}: is a git-lfs pointer, not the file itself; run git lfs pull in its folder")
    try:
        yield from READERS[kind](path, name)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading what was packed into it, where it is packed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return io.BufferedReader(_Raw(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened: IO[bytes] = openers.get(suffix, open)(path, "rb")
    return opened


class _Raw(io.RawIOBase):
    """An Arrow stream as Python's own readers want it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def parse_line(location: str, raw: Raw) -> dict[str, Any]:
    """Return the row of a JSON line; one that is a row already as it is. Raises BadRow with the line."""
    row: Any = raw
    if isinstance(raw, bytes):
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise BadRow(f"{location}, column {error.colno}: malformed JSON ({error.msg})") from error
        except UnicodeDecodeError as error:
            raise BadRow(f"{location}: is not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
            raise BadRow(f"{location}: malformed JSON ({first_line(error)})") from error
    if not isinstance(row, dict):
        raise BadRow(f"{location} is {type(row).__name__}, but each row must be an object")
    if WRONG in row:
        raise BadRow(f"{location} {row[WRONG]}")
    return row


def _jsonl(path: Path, name: str) -> Iterator[Placed]:
    with open_bytes(path) as file:
        numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip(b" \t\r\n\xef\xbb\xbf"))
        number, line = next(numbered, (0, b""))
        if not number:
            return
        line = line.removeprefix(b"\xef\xbb\xbf")
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{name}: is UTF-16 text, not UTF-8; save it as UTF-8")
        second = next(numbered, None)
        alone = second is None and line.lstrip().startswith(b"{")
        if line.lstrip().startswith(b"[") or alone or (second and not _is_whole(line) and not _is_whole(second[1])):
            pass  # one value over many lines, or alone in its line: it may hold the rows
        else:
            yield f"line {number}", line
            if second:
                yield f"line {second[0]}", second[1]
            for number, line in numbered:
                yield f"line {number}", line
            return
    yield from _json_whole(path, name)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_whole(path: Path, name: str) -> Iterator[Placed]:
    """Yield the rows of a list, an object with one in it, or objects one after the other over any number of lines."""
    with open_bytes(path) as file:
        text = file.read().decode("utf-8-sig")
    values: list[tuple[int, Any]] = []
    decoder, at = json.JSONDecoder(), 0
    while (at := SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}: line {error.lineno}, column {error.colno}: malformed JSON ({error.msg})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: malformed JSON ({first_line(error)})") from error
        values.append((at, value))
        at = end
    held = _rows_in(values[0][1], name) if len(values) == 1 else None
    if held is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(held))
        return
    for at, value in values:
        yield f"line {text.count(chr(10), 0, at) + 1}", value


def _rows_in(value: Any, name: str) -> list[Any] | None:
    """Return the rows of a file that is one JSON value, None where it is itself a row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{name}: is one {type(value).__name__}; rows are read from a list or from one object a line")
    if any(form.fields(value) is not None for form in FORMS):
        return None
    lists = [key for key, held in value.items() if isinstance(held, list) and all(isinstance(h, dict) for h in held)]
    chosen = lists if len(lists) == 1 else [key for key in ROW_KEYS if key in lists][:1]
    if chosen:
        return list(value[chosen[0]])
    if all(isinstance(held, list | dict) for held in value.values()):
        raise UserError(
            f"{name}: is an object with the keys {', '.join(value) or '(none)'}; rows are read from a list or from one "
            "object a line"
        )
    return None


def _json(path: Path, name: str) -> Iterator[Placed]:
    with open_bytes(path) as file:
        begins = file.read(65536).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins == b"[":
        yield from _json_whole(path, name)
    else:  # many tools write JSON lines under this suffix
        yield from _jsonl(path, name)


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
    import pyarrow

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
        try:
            header = next((fields for fields in reader if fields), [])
            _check_names(header, name)
            for fields in reader:
                location = f"line {reader.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield location, {WRONG: f"does not have the header's {len(header)} fields, but {len(fields)}"}
                else:
                    yield location, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{name}: line {reader.line_num}: malformed {'CSV' if delimiter == ',' else 'TSV'} ({error})"
            ) from error


READERS: dict[str, Callable[[Path, str], Iterator[Placed]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".tsv": _tsv,
}
