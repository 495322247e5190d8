"""Tokenized rows on disk, and on all cores: the same rows however they were made, and never those of other content."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data import rows_cache, tokenizing
from fsdp_qlora.data.batches import Batches, Rows, load_rows
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import CHATML, bytes_tokenizer

COUNT = rows_cache.MANY_ROWS + 100


def write(path: Path, count: int = COUNT, word: str = "yellow") -> str:
    with path.open("w") as file:
        for i in range(count):
            talk = [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"{word} {i * i}"}]
            file.write(json.dumps({"messages": talk, "id": i}) + "\n")
    return str(path)


def load(path: str, tokenizer: Any = None, cache: Path | None = None, **options: Any) -> Rows:
    tokenizer = tokenizer or bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    given = DataOptions(dataset=path, context_length=128, rows_cache=str(cache) if cache else None, **options)
    return load_rows(given, tokenizer, 50_000)


def same(one: Rows, other: Rows) -> bool:
    return all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name))
        for f in fields(Rows)
        if f.name not in ("notes", "name")
    )


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_rows_come_back_from_the_cache_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    made = load(path, cache=cache)
    assert len(entries(cache)) == 1
    monkeypatch.setattr("fsdp_qlora.data.rows.tokenize", lambda *_: pytest.fail("tokenized again"))
    held = load(path, cache=cache)
    assert same(made, held)
    assert isinstance(held.ids, np.memmap)
    assert "columns not used: id" in held.summary
    assert "tokenized before, read from" in held.summary
    moved = shutil.move(path, tmp_path / "b.jsonl")
    assert same(made, load(str(moved), cache=cache)), "what counts is the content"
    batch = Batches(held, 2, 1, 1, 0, 0).step(0, 0)[0]
    assert batch.labels.max() > 0


@pytest.mark.slow
def test_whatever_decides_the_tokens_is_part_of_the_key(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    prompt = tmp_path / "p.jinja"
    prompt.write_text("{{ id }}{% generation %}{{ messages[1].content }}{% endgeneration %}")
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    other = bytes_tokenizer(bos=True, eos="<|im_end|>", chat_template=CHATML)
    renamed = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML.replace("m['role']", "m['role']|upper"))
    makes: list[tuple[Any, dict[str, Any]]] = [
        (tokenizer, {}),
        (other, {}),
        (renamed, {}),
        (tokenizer, {"train_on_prompt": True}),
        (tokenizer, {"dataset_samples": COUNT - 1}),
        (tokenizer, {"bad_rows": "skip"}),
        (tokenizer, {"prompt_template": str(prompt)}),
    ]
    for number, (given, options) in enumerate(makes, start=1):
        load(path, given, cache, **options)
        assert len(entries(cache)) == number, options
    prompt.write_text(prompt.read_text() + "!")
    load(path, tokenizer, cache, prompt_template=str(prompt))
    write(tmp_path / "a.jsonl", word="mellow")
    changed = load(path, tokenizer, cache)
    assert len(entries(cache)) == len(makes) + 2
    assert "mellow" in tokenizer.decode(changed.ids[:40])


@pytest.mark.slow
def test_damaged_old_and_small_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    made = load(path, cache=cache)
    (entry,) = cache.iterdir()
    (entry / "ids.npy").write_bytes((entry / "ids.npy").read_bytes()[:-100])
    assert same(made, load(path, cache=cache)), "cut short by a full disk: made anew"
    assert isinstance(load(path, cache=cache).ids, np.memmap), "and kept again"
    monkeypatch.setattr(rows_cache, "KEPT_DAYS", -1)
    load(write(tmp_path / "b.jsonl", word="b"), cache=cache)
    assert not entries(cache), "old ones go"
    for name in ("photos", ".git", "0" * 32):
        (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine" / ".rows-begun").mkdir()
    load(path, cache=tmp_path / "mine")
    assert entries(tmp_path / "mine") == {"photos", ".git", "0" * 32}, "what the user keeps there stays"
    load(write(tmp_path / "c.jsonl", 10), cache=tmp_path / "small")
    assert not (tmp_path / "small").exists(), "few rows are not worth it"


def test_a_cache_that_cannot_be_written_is_noted_and_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file" / "cache", tmp_path / ("n" * 300)):  # the second cannot even be looked at
        rows = load(write(tmp_path / "a.jsonl"), cache=folder)
        assert len(rows) == COUNT
        assert "not kept in rows_cache" in rows.summary


def test_a_template_that_shows_the_date_is_not_cached(tmp_path: Path) -> None:
    template = "{{ strftime_now('%H:%M:%S') }}" + CHATML
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=template)
    rows = load(write(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache")
    assert len(rows) == COUNT
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_all_cores_make_the_same_rows_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", 3000)
    lines = Path(path).read_text().splitlines(keepends=True)
    lines[2500] = '{"messages": 3}\n'
    lines[700] = '{"messages": []}\n'
    Path(path).write_text("".join(lines))
    monkeypatch.setattr(tokenizing, "usable_cores", lambda _: 3)
    many = load(path, bad_rows="skip")
    with pytest.raises(UserError) as first:
        load(path)
    monkeypatch.setattr(tokenizing, "usable_cores", lambda _: 1)
    alone = load(path, bad_rows="skip")
    assert same(many, alone)
    assert many.notes == alone.notes
    assert "2 bad rows left out (line 701: 'messages' is an empty list; line 2501: " in many.summary
    assert "line 701: 'messages' is an empty list" in str(first.value), "the first of all, whichever was met first"


@pytest.mark.parametrize("name", rows_cache.ARRAYS)
def test_an_entry_that_the_disk_has_spoiled_is_made_anew(tmp_path: Path, name: str) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    made = load(path, cache=cache)
    (entry,) = cache.iterdir()
    held = bytearray((entry / f"{name}.npy").read_bytes())
    held[-9] ^= 1
    (entry / f"{name}.npy").write_bytes(held)
    anew = load(path, cache=cache)
    assert same(made, anew)
    assert "tokenized before" not in anew.summary
    assert "tokenized before" in load(path, cache=cache).summary
