"""Rows in JSON: one a line, in a list, in an object, or pretty-printed one after the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora.data.forms import FORMS
from fsdp_qlora.data.json_text import JsonText
from fsdp_qlora.data.packed import WRONG, Placed, Raw, kind_by_bytes, open_bytes
from fsdp_qlora.errors import BadRow, UserError, first_line

ROW_KEYS = ("data", "train", "rows", "examples")  # preferred, where an object holds several lists of objects


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a key that it has twice: which one is meant is not known."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in made if names.count(key) > 1)!r} is given twice in one object")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_line(location: str, raw: Raw) -> dict[str, Any]:
    """Return the row of a JSON line; one that is a row already as it is. Raises BadRow with the line."""
    row: Any = raw
    if isinstance(raw, bytes):
        try:
            row = DECODER.decode(raw.decode("utf-8-sig", "surrogatepass"))
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


def read_json(path: Path, name: str) -> Iterator[Placed]:
    """Yield the rows of a file named .json, which may hold JSON lines too."""
    with open_bytes(path) as file:
        begins = file.read(65536).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins == b"[":
        yield from _json_whole(path, name)
    else:  # many tools write JSON lines under this suffix
        yield from read_lines(path, name)


def read_lines(path: Path, name: str) -> Iterator[Placed]:
    """Yield the lines of a file of JSON lines as they are, or the rows of what is JSON over several lines.

    Raises UserError for what is no JSON as a whole; `parse_line` tells of a line."""
    with open_bytes(path) as file:
        numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip(b" \t\r\n\xef\xbb\xbf"))
        number, line = next(numbered, (0, b""))
        if not number:
            return
        line = line.removeprefix(b"\xef\xbb\xbf")
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{name}: is UTF-16 text, not UTF-8; save it as UTF-8")
        if kind := kind_by_bytes(line):
            raise UserError(f"{name}: is {kind}, not JSON lines; unpack it, or give a file with that suffix")
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
        text = JsonText(file, name, DECODER)
        if text.skip("["):
            yield from _elements(text)
            return
        line = text.next_line()
        first = text.value()
        held = _rows_in(first, name) if text.ended() else None
        if held is not None:
            yield from ((f"row {number}", row) for number, row in enumerate(held))
            return
        yield f"line {line}", first
        while not text.ended():
            line = text.next_line()
            yield f"line {line}", text.value()


def _elements(text: JsonText) -> Iterator[Placed]:
    """Yield the elements of the list that `text` is in, one decoded at a time."""
    number, more = 0, not text.skip("]")
    while more:
        yield f"row {number}", text.value()
        number, more = number + 1, text.skip(",")
        if not more and not text.skip("]"):
            raise text.malformed("Expecting ',' delimiter")
    if not text.ended():
        raise text.malformed("Extra data")


def _rows_in(value: Any, name: str) -> list[Any] | None:
    """Return the rows of a file that is one JSON value, None where it is itself a row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{name}: is one {type(value).__name__}; rows are read from a list or from one object a line")
    if any(form.fields(value) is not None for form in FORMS) or ("chosen" in value and "rejected" in value):
        return None
    lists = [key for key, held in value.items() if isinstance(held, list) and all(isinstance(h, dict) for h in held)]
    talks = [key for key in lists if value[key] and all("role" in held or "from" in held for held in value[key])]
    if lists and talks == lists:
        return None  # turns of a conversation under a name that --columns may give
    chosen = lists if len(lists) == 1 else [key for key in ROW_KEYS if key in lists][:1]
    if chosen:
        return list(value[chosen[0]])
    if all(isinstance(held, list | dict) for held in value.values()):
        raise UserError(
            f"{name}: is an object with the keys {', '.join(value) or '(none)'}; rows are read from a list or from one "
            "object a line"
        )
    return None
