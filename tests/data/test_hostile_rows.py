"""2,000 hostile rows: each trains or is refused with its line; none ends in a traceback, none is read by half."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.batches import Rows, load_rows
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML, LLAMA2, bytes_tokenizer

COUNT = 400  # rows of each kind of file
TEXTS = [
    "", " ", "\n\n", "hello", "a\x00b", "\x1b[2J", "\u202eabc", "👩‍👩‍👧", "é" * 50,
    "\ud83d", "x\udc00y", "<|im_end|>",
    "<|im_start|>assistant\nhi", "{{ 7 * 7 }}", "{% raise %}", "{generation}",
    "%s %d {0}", '"quoted"', "a,b\r\nc", "\r",
    "</s><s>", "<think>", "</think>x", "zQ7wJ0k", "\ue0f0x\ue0f1", "null", "NaN", "[1,2]", '{"a": 1}', "y" * 3000,
    "\ufeff",
]  # fmt: skip
VALUES: list[Any] = [
    *TEXTS, None, True, False, 0, -1, 3.5, 10**400, float("nan"), float("inf"), [], {}, [None], ["a"], {"a": None},
    [[]], [{"role": "user"}], {"text": "x"}, [{"type": "text", "text": "hi"}], [{"type": "image"}],
]  # fmt: skip
ROLES: list[Any] = [
    "user", "assistant", "system", "tool", "gpt", "human", "Assistant ", "critic", "", None, 7, [], "function_call",
]  # fmt: skip
KEYS = ["role", "content", "from", "value", "weight", "train", "tool_calls", "reasoning_content", "name", "extra"]
COLUMNS = [
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "question", "answer", "text",
    "system", "history", "tools", "chosen", "label", "id", "chat_template_kwargs",
]  # fmt: skip
CALLS: list[Any] = [
    None, [], [{}], "x", [{"function": {"name": "f", "arguments": "{}"}}],
    [{"function": {"name": "f", "arguments": "{"}}],
    [{"name": "f", "arguments": {"a": [1]}}], [{"function": {"name": 5}}], {"name": "f"},
]  # fmt: skip


def _message(draw: random.Random) -> Any:
    if draw.random() < 0.1:
        return draw.choice(VALUES)
    message = {"role": draw.choice(ROLES), "content": draw.choice(VALUES)}
    for key in draw.sample(KEYS, draw.randint(0, 2)):
        message[key] = draw.choice(CALLS) if key == "tool_calls" else draw.choice(VALUES)
    if draw.random() < 0.2:
        del message[draw.choice(list(message))]
    return message


def _talk(draw: random.Random) -> Any:
    if draw.random() < 0.3:  # a sane one among them
        return [{"role": "user", "content": draw.choice(TEXTS)}, {"role": "assistant", "content": draw.choice(TEXTS)}]
    return [_message(draw) for _ in range(draw.randint(0, 5))]


def _row(draw: random.Random, columns: list[str]) -> dict[str, Any]:
    row = {column: draw.choice(VALUES if draw.random() < 0.5 else TEXTS) for column in columns}
    for column in ("messages", "conversations"):
        if column in row and draw.random() < 0.9:
            row[column] = _talk(draw)
    for column in draw.sample(COLUMNS, draw.randint(0, 2)):
        row.setdefault(column, draw.choice(VALUES))
    if draw.random() < 0.1:
        del row[draw.choice(list(row))]
    return row


def _line(draw: random.Random, columns: list[str]) -> bytes:
    """A line of JSON, or nearly."""
    line = json.dumps(_row(draw, columns), ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    spoil = draw.random()
    if spoil < 0.05:
        return line[: draw.randint(0, len(line))].replace(b"\n", b"")
    if spoil < 0.08:
        return b"[" * 5000
    if spoil < 0.11:
        return b'{"text": ' + b"9" * 5000 + b"}"
    if spoil < 0.14:
        return bytes(draw.randrange(128, 256) for _ in range(9))
    if spoil < 0.2:
        return draw.choice([b"null", b"3", b'"x"', b"[]", b"{}", b"{}{}", b"\xef\xbb\xbf{}", b"// x", b"{'a': 1}"])
    return line


def _load(path: Path, tokenizer: Any, **options: Any) -> Rows:
    options = {"context_length": 256, "rows_cache": None} | options
    return load_rows(DataOptions(dataset=str(path), **options), tokenizer, 50_000)


def _one_line(error: UserError, path: Path) -> str:
    text = str(error)
    assert "\n" not in text
    assert str(path) in text
    return text


def _check(path: Path, tokenizer: Any, count: int) -> None:
    """Of a whole file: skipping, every row is accounted for; stopping, the first bad one is told in a line."""
    rows = _load(path, tokenizer, bad_rows="skip")
    told = sum(int(note.split()[0].replace(",", "")) for note in rows.notes if "left out" in note and "row" in note)
    assert rows.n_read == count
    assert count / 40 < len(set(rows.index.tolist())) < count
    assert len(set(rows.index.tolist())) + told == count
    assert all(rows.trains[start:end].any() for start, end in zip(rows.offsets, rows.offsets[1:], strict=False))
    with pytest.raises(UserError) as caught:
        _load(path, tokenizer)
    assert "line " in _one_line(caught.value, path) or "row " in str(caught.value)


FORMS = [
    ["messages"],
    ["conversations", "tools"],
    ["prompt", "completion"],
    ["instruction", "input", "output"],
    ["text"],
]


@pytest.mark.parametrize("columns", FORMS, ids=lambda columns: columns[0])
def test_json_lines(tmp_path: Path, columns: list[str]) -> None:
    draw = random.Random(str(columns))
    tokenizer = bytes_tokenizer(bos=True, eos="<|im_end|>", chat_template=draw.choice([CHATML, LLAMA2]))
    sane = {column: "hello" for column in columns} | {"messages": _sane(), "conversations": _sane(), "tools": None}
    lines = [json.dumps({column: sane[column] for column in columns}).encode()]
    lines += [_line(draw, columns) for _ in range(COUNT - 1)]
    lines = [line if line.strip() else b"0" for line in lines]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\r", b" ") for line in lines))
    _check(path, tokenizer, len(lines))


def _sane() -> list[dict[str, str]]:
    return [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yellow"}]


@pytest.mark.parametrize("seed", range(60))
def test_one_hostile_line_alone(tmp_path: Path, seed: int) -> None:
    """Each trains, or is refused in a line that names the file."""
    draw = random.Random(seed)
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    for number in range(10):
        path = tmp_path / f"{number}{draw.choice(['.jsonl', '.json'])}"
        path.write_bytes(_line(draw, draw.choice(FORMS)))
        try:
            assert len(_load(path, tokenizer))
        except UserError as error:
            _one_line(error, path)


def test_csv(tmp_path: Path) -> None:
    draw = random.Random(1)
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\r\n")
    writer.writerow(["prompt", "completion", "note"])
    for _ in range(COUNT):
        chosen = draw.choices(TEXTS, k=draw.choice([3, 3, 3, 2, 4, 1]))
        fields = [text.encode(errors="ignore").decode() for text in chosen]
        writer.writerow([field.replace("\x00", "") or "x" for field in fields])
    path = tmp_path / "rows.csv"
    path.write_bytes(made.getvalue().encode())
    _check(path, bytes_tokenizer(), COUNT)
    for seed in range(40):  # cut and spoiled anywhere: a line, never a traceback
        draw = random.Random(seed)
        spoiled = bytearray(made.getvalue().encode()[: draw.randint(0, 4000)])
        for _ in range(draw.randint(0, 3)):
            spoiled.insert(draw.randint(0, len(spoiled)), draw.choice(b'"\x00\xff,\n\r'))
        path.write_bytes(bytes(spoiled))
        for bad_rows in ("skip", "stop"):
            try:
                _load(path, bytes_tokenizer(), bad_rows=bad_rows)
            except UserError as error:
                _one_line(error, path)


KINDS: list[tuple[pa.DataType, Callable[[random.Random], Any]]] = [
    (pa.string(), lambda draw: draw.choice(["hello", "", None, "a\x00b", "👩‍👩‍👧", "<|im_end|>"])),
    (pa.float64(), lambda draw: draw.choice([1.5, float("nan"), float("-inf"), None])),
    (pa.int64(), lambda draw: draw.choice([1, -(2**63), None])),
    (pa.bool_(), lambda draw: draw.choice([True, None])),
    (pa.binary(), lambda draw: draw.choice([b"\xff", b"hello", None])),
    (pa.list_(pa.string()), lambda draw: draw.choice([["a"], [], [None], None])),
    (pa.timestamp("us"), lambda draw: draw.choice([0, None])),
    (pa.decimal128(5, 2), lambda draw: draw.choice([None])),
    (pa.null(), lambda draw: None),
    (pa.map_(pa.string(), pa.int64()), lambda draw: draw.choice([[("a", 1)], [], None])),
]


def test_parquet(tmp_path: Path) -> None:
    draw, tokenizer = random.Random(2), bytes_tokenizer()
    path = tmp_path / "rows.parquet"
    for kind, value in KINDS:
        columns = {
            "prompt": pa.array(["hello", *(draw.choice(["a", None]) for _ in range(40))]),
            "completion": pa.array([value(draw) for _ in range(41)], kind),
        }
        pq.write_table(pa.table(columns), path)
        try:
            rows = _load(path, tokenizer, bad_rows="skip")
            assert rows.n_read == 41
        except UserError as error:
            if "none of its 41 rows can be taken" not in _one_line(error, path):
                raise
    whole = path.read_bytes()
    for seed in range(60):
        draw = random.Random(seed)
        spoiled = bytearray(whole[: draw.choice([len(whole), draw.randint(0, len(whole))])])
        for _ in range(draw.randint(1, 4)):
            if spoiled:
                spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
        path.write_bytes(bytes(spoiled))
        try:
            assert _load(path, tokenizer, bad_rows="skip").n_read == 41
        except UserError as error:
            _one_line(error, path)


def test_messages_in_parquet_have_no_nulls_of_other_rows(tmp_path: Path) -> None:
    """Arrow gives each object of a list the keys of all the others: a call's arguments, a turn's weight."""
    calls = [{"function": {"name": "f", "arguments": {"a": "x"}}}]
    other = [{"function": {"name": "g", "arguments": {"b": "y"}}}]
    asked = {"role": "user", "content": "hi"}
    talks = [[asked, {"role": "assistant", "tool_calls": made, "content": ""}] for made in (calls, other)]
    talks.append([{**asked, "name": "me"}, {"role": "assistant", "content": "yellow", "weight": 1}])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": talk} for talk in talks]), path)
    template = CHATML.replace("m['content'] +", "m['content'] + m.tool_calls|default('', true)|string +")
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=template)
    rows = _load(path, tokenizer, context_length=512)
    first = tokenizer.decode(rows.ids[: rows.offsets[1]])
    assert "{'a': 'x'}" in first
    assert "None" not in first
