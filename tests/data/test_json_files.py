"""Rows in JSON: places in messages are right, no key counts twice, and no file is held twice."""

import gzip
import json
import time
import tracemalloc
from pathlib import Path

import pytest
from test_data import load

from fsdp_qlora.data import json_text
from fsdp_qlora.data.readers import read_file
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import bytes_tokenizer

TWICE = '{"prompt": "a", "completion": "b", "completion": "c"}'
ONCE = '{"prompt": "a", "completion": "b"}'


def save(tmp_path: Path, text: str, name: str = "rows.json") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_key_that_is_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    lines = save(tmp_path, f"{ONCE}\n{TWICE}\n{ONCE}\n", "rows.jsonl")
    with pytest.raises(UserError, match=r"line 2: malformed JSON \('completion' is given twice in one object\)"):
        load(str(lines), bytes_tokenizer())
    assert load(str(lines), bytes_tokenizer(), bad_rows="skip").index.tolist() == [0, 2]
    nested = ONCE.replace('"a"', '{"x": 1, "x": 2}')
    for text in (
        f"[\n{ONCE},\n{TWICE}]",
        f"[\n{ONCE},\n{nested}]",
        json.dumps(json.loads(ONCE), indent=1) + "\n" + TWICE,
    ):
        with pytest.raises(UserError, match=r"line \d: malformed JSON \('\w+' is given twice"):
            load(str(save(tmp_path, text)), bytes_tokenizer())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"[\n{ONCE},\n{ONCE[:-1]}\n]", "line 4, column 1: malformed JSON"),
        (f"[\n{ONCE}\n{ONCE}]", "line 3, column 1: malformed JSON (Expecting ',' delimiter)"),
        (f"[\n{ONCE},\n", "line 3, column 1: malformed JSON (Expecting value)"),
        (f"[\n{ONCE},\n]", "line 3, column 1: malformed JSON (Expecting value)"),
        (f"[{ONCE}]\n{ONCE}", "line 2, column 1: malformed JSON (Extra data)"),
        ("[ ]", "has no rows"),
    ],
)
def test_a_list_that_is_broken_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(str(save(tmp_path, text)), bytes_tokenizer())
    assert words in str(caught.value)


def test_a_long_list_is_decoded_row_by_row(tmp_path: Path) -> None:
    path = save(tmp_path, json.dumps([json.loads(ONCE)] * 20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size, "the text, not all its rows"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("letter", ["y", "😀"])
def test_a_long_list_is_not_held_as_a_whole(tmp_path: Path, letter: str) -> None:
    path = save(tmp_path, json.dumps([{"prompt": "a", "completion": letter * 100_000}] * 150, ensure_ascii=False))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path)) == 150
        assert tracemalloc.get_traced_memory()[1] < 20 << 20, "one letter that is wide makes all of a text wide"
    finally:
        tracemalloc.stop()


SPLIT = [
    '[{"prompt": "a\\n\\u00e9", "completion": 12345}, {"prompt": "😀", "completion": -1.5e3}]', "[\n]", "[1, 23]",
    '{"prompt": 1,\n"completion": 2}\n\n {"prompt":\n3, "completion": 45}', '{"rows": [{"a": true}, {"a": null}]}',
    '[{"a": 1},\n {"a": 2} {"a": 3}]', '[{"a": 1},\n {"a": tru}]', '[{"a": 1}]\n x', '[{"a": "b\n"}]', '[{"a": 1',
]  # fmt: skip


@pytest.mark.parametrize("text", SPLIT)
def test_where_a_file_is_cut_into_pieces_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = save(tmp_path, text)

    def told(piece: int) -> object:
        monkeypatch.setattr(json_text, "PIECE", piece)
        try:
            return list(read_file(path))
        except UserError as error:
            return str(error)

    whole = told(1 << 20)
    assert [told(piece) for piece in range(1, 8)] == [whole] * 7


@pytest.mark.parametrize("text", [text for text in SPLIT if text.startswith("[")])
def test_a_list_is_what_the_json_library_takes_it_for(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, text)
    try:
        expected, place = json.loads(text), None
    except json.JSONDecodeError as error:
        expected, place = None, f"line {error.lineno}, column {error.colno}: malformed JSON ({error.msg})"
    if place is None:
        assert [row for _, row in read_file(path)] == expected
    else:
        with pytest.raises(UserError) as caught:
            list(read_file(path))
        assert place in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_packed_file_by_another_name_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(ONCE.encode()))
    with pytest.raises(UserError, match=r"rows.jsonl?': is gzip, not JSON lines; unpack it, or give a file with that"):
        load(str(tmp_path / name), bytes_tokenizer())


def test_pretty_printed_rows_take_time_in_proportion_and_have_their_lines(tmp_path: Path) -> None:
    path = save(tmp_path, (json.dumps(json.loads(ONCE) | {"x": "y" * 60}, indent=1) + "\n") * 60_000)
    begun = time.process_time()
    lines = [location for location, _ in read_file(path)]
    assert time.process_time() - begun < 4  # counted from the beginning for each row, 15
    assert lines == [f"line {5 * number + 1}" for number in range(60_000)]
