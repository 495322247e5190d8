"""Sources of rows: files of every kind and packing, folders, the hub's configs and splits, mixes, standard input."""

import bz2
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from test_data import ALPACA_ROWS, learnt, load, row, write

from fsdp_qlora.data import sources
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import bytes_tokenizer

TEXT = "".join(json.dumps(given) + "\n" for given in ALPACA_ROWS)
INDENTED = json.dumps(ALPACA_ROWS, indent=2)
TSV = 'instruction\tinput\toutput\nSay hello\t\thello\nSay it\t"a, ""b""\nc"\tyellow {x}\n'


FILES: dict[str, bytes] = {
    "capitals.JSONL": TEXT.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + TEXT.encode(),
    "crlf.jsonl": TEXT.replace("\n", "\r\n").encode(),
    "bom.json": b"\xef\xbb\xbf" + INDENTED.encode(),
    "lines.json": TEXT.encode(),
    "list.jsonl": INDENTED.encode(),
    "data.json": json.dumps({"version": "1", "data": ALPACA_ROWS}, indent=1).encode(),
    "train.json": json.dumps({"train": ALPACA_ROWS, "test": ALPACA_ROWS[:1]}).encode(),
    "odd_key.json": json.dumps({"my rows": ALPACA_ROWS}).encode(),
    "data.jsonl": json.dumps({"rows": ALPACA_ROWS}).encode(),
    "pretty.jsonl": "\n".join(json.dumps(given, indent=2) for given in ALPACA_ROWS).encode(),
    "pretty.json": "\n".join(json.dumps(given, indent=2) for given in ALPACA_ROWS).encode(),
    "packed.jsonl.gz": gzip.compress(TEXT.encode()),
    "packed.json.gz": gzip.compress(INDENTED.encode()),
    "packed.jsonl.bz2": bz2.compress(TEXT.encode()),
    "packed.jsonl.xz": lzma.compress(TEXT.encode()),
    "packed.tsv.gz": gzip.compress(TSV.encode()),
    "tabs.tsv": TSV.encode(),
    "bom.tsv": b"\xef\xbb\xbf" + TSV.encode(),
    "lines.ndjson": TEXT.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_files_give_the_same_rows(tmp_path: Path, name: str) -> None:
    tokenizer = bytes_tokenizer()
    want = load(write(tmp_path / "plain.jsonl", ALPACA_ROWS), tokenizer)
    (tmp_path / name).write_bytes(FILES[name])
    got = load(str(tmp_path / name), tokenizer)
    assert np.array_equal(got.ids, want.ids)
    assert np.array_equal(got.trains, want.trains)


def test_zstandard_and_arrow(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    want = load(write(tmp_path / "plain.jsonl", ALPACA_ROWS), tokenizer)
    with pa.OSFile(str(tmp_path / "a.jsonl.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
        out.write(TEXT.encode())
    table = pa.Table.from_pylist(ALPACA_ROWS)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.jsonl.zst", "a.arrow", "b.arrow"):
        assert np.array_equal(load(str(tmp_path / name), tokenizer).ids, want.ids), name


def test_one_pretty_printed_row_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ALPACA_ROWS[0], indent=4))
    assert len(load(str(path), bytes_tokenizer())) == 1


def test_an_object_without_rows_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": [ALPACA_ROWS[0]], "b": [ALPACA_ROWS[1]]}, indent=1))
    with pytest.raises(
        UserError, match=r"is an object with the keys a, b; rows are read from a list or from one object"
    ):
        load(str(path), bytes_tokenizer())
    path.write_text("3")
    with pytest.raises(UserError, match=r"line 1 is int, but each row must be an object|is one int"):
        load(str(path), bytes_tokenizer())


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut.jsonl.gz": (gzip.compress(TEXT.encode() * 500)[:-30], "cannot be read"),
    "no.jsonl.gz": (b"hello", "cannot be read"),
    "damaged.jsonl.gz": (gzip.compress(TEXT.encode())[:10] + b"\xff" + bytes(40), "cannot be read"),
    "no.jsonl.xz": (b"hello", "cannot be read"),
    "no.jsonl.zst": (b"hello", "cannot be read"),
    "no.arrow": (b"hello", "is not an Arrow file"),
    "twice.csv": (b"text,text\na,b\n", "names the column 'text' twice"),
    "open.csv": (b'text,b\nx,y\n\n"a,b\n', "line 4: malformed CSV"),
    "short.csv": (b'text,b\n"x\ny",z\n"a\n\nb"\n', "line 4 does not have the header's 2 fields, but 1"),
    "latin.csv": (b"text,b\n" + b"x,y\n" * 9000 + b"x,\xe9\n", "line 9002: is not UTF-8 text .* save it as UTF-8"),
    "latin.json": (b'[\n{"text": "\xe9"}]', "line 2: is not UTF-8 text"),
    "utf16.jsonl": (TEXT.encode("utf-16"), "is UTF-16 text"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "is a git-lfs pointer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(str(tmp_path / name), bytes_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_missing_path_is_called_missing_before_another_dataset_is_tokenized(tmp_path: Path) -> None:
    for name in ("rows", "rows.txt"):
        with pytest.raises(UserError, match="no such file"):
            load(str(tmp_path / name), bytes_tokenizer())
    there = write(tmp_path / "a.jsonl", [{"text": 3.5}, {"text": None}])
    with pytest.raises(UserError, match=r"b\.jsonl': no such file"):
        load(f"{there},{tmp_path / 'b.jsonl'}", bytes_tokenizer())
    with pytest.raises(UserError, match=r"^eval_dataset '.*b\.jsonl': no such file"):
        sources.check_sources(str(tmp_path / "b.jsonl"), "eval_dataset")


def test_a_path_with_a_split_and_a_pipe_are_called_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = write(tmp_path / "a.jsonl", [{"text": "x y"}])
    for name in (f"{tmp_path / 'folder'}:train", f"{file}:train"):
        with pytest.raises(UserError, match="a local path takes no config or split after a colon"):
            load(name, bytes_tokenizer())
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is no regular file, and is read more than once; pipe it in"):
        load(str(tmp_path / "pipe.jsonl"), bytes_tokenizer())


def test_one_file_by_two_names_is_one_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x y"}])
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in (f"{tmp_path}/../{tmp_path.name}/a.jsonl", str(tmp_path / "link.jsonl")):
        with pytest.raises(UserError, match="names a dataset twice"):
            load(f"{path},{other}", bytes_tokenizer())
    with pytest.raises(UserError, match="names a dataset twice"):
        sources.parts_of("alpaca,yahma/alpaca-cleaned")


def test_a_folder_of_files(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    (tmp_path / "more").mkdir()
    write(tmp_path / "b.jsonl", [{"text": "fellow"}])
    write(tmp_path / "more" / "a.jsonl", [{"text": "yellow"}, {"txt": "x"}])
    write(tmp_path / "test.jsonl", [{"text": "held out"}])
    (tmp_path / "README.md").write_text("hello")
    rows = load(str(tmp_path), tokenizer, bad_rows="skip")
    assert [tokenizer.decode(row(rows, n)[0]) for n in range(len(rows))] == ["fellow</s>", "yellow</s>"]
    assert "left out test.jsonl" in rows.summary
    with pytest.raises(UserError, match=r"more/a.jsonl, line 2: 'text' must be text"):
        load(str(tmp_path), tokenizer)
    write(tmp_path / "train-00.jsonl", [{"text": "mellow"}])
    assert len(load(str(tmp_path), tokenizer)) == 1


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    table = datasets.Dataset.from_list(ALPACA_ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "two"))
    want = load(write(tmp_path / "plain.jsonl", ALPACA_ROWS), tokenizer)
    for name in ("one", "two"):
        assert np.array_equal(load(str(tmp_path / name), tokenizer).ids, want.ids), name


def test_a_hub_datasets_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def hub(*names: str) -> datasets.DatasetDict:
        asked.append(names)
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([{"text": f"hello {split}"}]) for split in ("train", "validation")}
        )

    monkeypatch.setattr("datasets.load_dataset", hub)
    tokenizer = bytes_tokenizer()
    given = {"a/b": "train", "a/b:c": "train", "a/b:c:validation": "validation", "a/b::validation": "validation"}
    for name, split in given.items():
        assert tokenizer.decode(load(name, tokenizer).ids) == f"hello {split}</s>"
    assert asked == [("a/b",), ("a/b", "c"), ("a/b", "c"), ("a/b",)]
    with pytest.raises(UserError, match=r"has no split 'dev', only train, validation; choose one with a/b:c:SPLIT"):
        load("a/b:c:dev", tokenizer)


def test_several_datasets(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    a = write(tmp_path / "a.jsonl", [{"text": f"hello {i}"} for i in range(30)])
    b = write(tmp_path / "b.jsonl", [{"prompt": "say", "completion": f" yellow {i}"} for i in range(100)])
    rows = load(f"{a},{b}", tokenizer)
    assert (len(rows), rows.form) == (130, "text + prompt_completion")
    assert rows.index.tolist() == list(range(130))
    mixed = load(f"{a}:0.75,{b}:0.25", tokenizer)
    told = [tokenizer.decode(row(mixed, n)[0]) for n in range(len(mixed))]
    assert sum("hello" in text for text in told) == 30
    assert sum("yellow" in text for text in told) == 10
    assert len(set(told)) == 40, "none twice"
    assert "a.jsonl 30 of 30 rows" in mixed.summary
    assert "b.jsonl 10 of 100 rows" in mixed.summary
    assert learnt(mixed, 39, tokenizer) == " yellow 99</s>", "spread over the whole of it"
    assert len(load(f"{a}:3,{b}:1", tokenizer, dataset_samples=20)) == 20
    assert len(load(f"{a},{b}", tokenizer, dataset_samples=35)) == 35
    assert "there are no more" not in load(f"{a},{b}", tokenizer, dataset_samples=35).summary
    few = load(f"{a},{b}", tokenizer, dataset_samples=999)
    assert few.summary.endswith("there are no more, of dataset_samples 999")
    for wrong, message in [
        (f"{a}:0.5,{b}", "give every dataset a weight"),
        (f"{a}:0.5", "a weight says nothing about one dataset alone"),
        (f"{a},{a}", "names a dataset twice"),
        (f"{a},", "names nothing between two commas"),
        (f"{a}:0,{b}:1", "its weight must be above 0"),
        (f"{a},dummy", "dummy has no rows to mix"),
    ]:
        with pytest.raises(UserError, match=message):
            load(wrong, tokenizer)


def test_standard_input_is_read_once_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    tokenizer = bytes_tokenizer()
    want = load(write(tmp_path / "plain.jsonl", ALPACA_ROWS), tokenizer)
    for _ in range(2):  # another rank finds the pipe empty
        assert np.array_equal(load("-", tokenizer).ids, want.ids)
    sources.forget_stdin()
    assert [file.name for file in tmp_path.iterdir()] == ["plain.jsonl"]
    start_of = sources._start_of
    started = start_of(os.getpid())
    assert started.isdigit()
    monkeypatch.setattr(sources, "_start_of", lambda _: "1")  # another process had this number, and was killed
    sources.stdin_file().write_text('{"text": "of another run"}\n')
    monkeypatch.setattr(sources, "_start_of", start_of)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"[\n" + INDENTED.encode()[1:])))
    assert len(load("-", tokenizer)) == 2
    sources.forget_stdin()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a b"}\n{"text": \n')))
    with pytest.raises(UserError, match="dataset '-': line 2, column"):
        load("-", tokenizer)
    sources.forget_stdin()


def test_a_folder_tells_of_files_that_are_not_read_and_misses_no_part(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    for name in ("a.jsonl", "b.zip", "notes.md", "c.jsonl.incomplete"):
        write(tmp_path / name, rows)
    assert f"{tmp_path}: left out b.zip, c.jsonl.incomplete" in load(str(tmp_path), bytes_tokenizer()).summary
    for number in (0, 2):
        write(tmp_path / f"train-{number:05d}-of-00003.jsonl", rows)
    with pytest.raises(UserError, match=r"holds 2 of 3 parts, train-00001-of-00003.jsonl is missing; fetch it"):
        load(str(tmp_path), bytes_tokenizer())
    write(tmp_path / "train-00001-of-00003.jsonl", rows)
    assert len(load(str(tmp_path), bytes_tokenizer())) == 3
