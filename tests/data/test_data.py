"""Rows in: every source and form, exact prompts, BOS and EOS, what is cut and left out, how a file can be wrong."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.batches import Rows, load_rows, load_tokenizer
from fsdp_qlora.data.sources import open_source
from fsdp_qlora.errors import UserError
from tests.support.small_tokenizers import bytes_tokenizer, llama2_tokenizer, spaced_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ALPACA_ROWS = [
    {"instruction": "Say hello", "input": "", "output": "hello"},
    {"instruction": "Say it", "input": "a, \"b\"\nc", "output": "yellow {x}"},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(dataset: str, tokenizer: Any, context_length: int = 512, vocab_size: int = 50_000, **options: Any) -> Rows:
    options = {"rows_cache": None} | options
    return load_rows(DataOptions(dataset=dataset, context_length=context_length, **options), tokenizer, vocab_size)


def row(rows: Rows, number: int) -> tuple[list[int], list[bool]]:
    part = slice(rows.offsets[number], rows.offsets[number + 1])
    return rows.ids[part].tolist(), rows.trains[part].tolist()


def learnt(rows: Rows, number: int, tokenizer: Any) -> str:
    ids, trains = row(rows, number)
    return tokenizer.decode([token for token, learn in zip(ids, trains, strict=True) if learn])


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_is_exact_prefix_and_answer_is_learnt_with_eos(tmp_path: Path, bos: bool) -> None:
    tokenizer = bytes_tokenizer(bos)
    prompt, completion = "Say hel", "lo"  # one token together: a merge over the border would hide the answer
    together, alone = tokenizer(prompt + completion)["input_ids"], tokenizer(prompt)["input_ids"]
    assert together[: len(alone)] != alone
    rows = load(write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer)
    ids, trains = row(rows, 0)
    assert ids[: len(alone)] == alone
    assert ids.count(tokenizer.bos_token_id) == bos
    assert trains == [False] * len(alone) + [True] * (len(ids) - len(alone))
    assert ids[-1] == tokenizer.eos_token_id
    assert learnt(rows, 0, tokenizer) == "lo</s>"


def test_answer_gets_no_space_that_is_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = spaced_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello")["input_ids"]) == ["<s>", "▁", "hello"]
    given = [{"prompt": "Say hel", "completion": text} for text in ("lo", " lo", "hello", "\nhello", "")]
    rows = load(write(tmp_path / "a.jsonl", given), tokenizer)
    prompt = tokenizer("Say hel")["input_ids"]
    for number, each in enumerate(given):
        ids, _ = row(rows, number)
        assert ids[: len(prompt)] == prompt
        said = "".join(tokenizer.convert_ids_to_tokens(ids[len(prompt) :]))
        assert said == each["completion"].replace(" ", "▁") + "</s>"


def test_bos_and_eos_written_in_the_text_are_not_doubled(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(bos=True)
    rows = load(write(tmp_path / "a.jsonl", [{"text": "<s>hello</s>"}, {"text": "hello"}]), tokenizer)
    assert row(rows, 0) == row(rows, 1)
    assert rows.form == "text"


def test_loss_on_prompt_when_asked_for(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(bos=True)
    path = write(tmp_path / "a.jsonl", ALPACA_ROWS)
    ids, trains = row(load(path, tokenizer, train_on_prompt=True), 0)
    assert trains == [False] + [True] * (len(ids) - 1)  # nothing predicts the first token


def test_forms_and_their_words(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    cases: list[tuple[dict[str, Any], str, str, str]] = [
        (ALPACA_ROWS[0], "alpaca", "### Instruction:\nSay hello\n\n### Response:", "hello</s>"),
        (ALPACA_ROWS[1], "alpaca", '### Input:\na, "b"\nc\n\n### Response:', "yellow {x}</s>"),
        ({"question": "1+1?", "answer": 2}, "question_answer", "###Question:\n1+1?\n###Answer:\n", "2</s>"),
        (
            {"question": "q", "context": "c", "answer": "a"},
            "question_answer",
            "###Context:\nc\n###Question:\nq\n###Answer:\n",
            "a</s>",
        ),
        ({"text": "hello yellow"}, "text", "", "ello yellow</s>"),  # no BOS here: the first token is not predicted
    ]
    for given, form, prompt, answer in cases:
        rows = load(write(tmp_path / "a.jsonl", [given]), tokenizer)
        whole = tokenizer.decode(row(rows, 0)[0])
        assert rows.form == form
        if form == "text":
            assert whole == "hello yellow</s>"
            assert learnt(rows, 0, tokenizer) in whole
        else:
            assert whole.endswith(prompt + answer)
            assert learnt(rows, 0, tokenizer) == answer


def test_named_format_wins_over_recognition(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**ALPACA_ROWS[0], "text": "hello"}])
    assert load(path, bytes_tokenizer()).form == "alpaca"
    assert load(path, bytes_tokenizer(), dataset_format="text").form == "text"


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    paths = [
        Path(write(tmp_path / "a.jsonl", ALPACA_ROWS)),
        tmp_path / "b.json",
        tmp_path / "c.csv",
        tmp_path / "d.parquet",
    ]
    paths[1].write_text(json.dumps(ALPACA_ROWS, indent=1))
    with paths[2].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ALPACA_ROWS[0]))
        writer.writeheader()
        writer.writerows(ALPACA_ROWS)
    pq.write_table(pa.Table.from_pylist(ALPACA_ROWS), paths[3])
    want = load(str(paths[0]), tokenizer)
    for path in paths[1:]:
        got = load(str(path), tokenizer)
        assert np.array_equal(got.ids, want.ids), path
        assert np.array_equal(got.trains, want.trains), path
        assert len(load(str(path), tokenizer, dataset_samples=1)) == 1, path


def test_cut_and_dropped_rows_are_counted(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    given = [
        {"prompt": "x" * 50, "completion": "hello"},  # its answer lies beyond the context
        {"prompt": "hello", "completion": "y" * 50},
        {"prompt": "hello", "completion": "yellow"},
    ]
    rows = load(write(tmp_path / "a.jsonl", given), tokenizer, context_length=16)
    assert (rows.n_read, len(rows), rows.n_dropped, rows.n_truncated) == (3, 2, 1, 2)
    assert rows.index.tolist() == [1, 2]
    assert rows.lengths.tolist()[0] == 16
    assert row(rows, 0)[0][-1] != tokenizer.eos_token_id  # only cutting may lose EOS
    assert "1 row left out" in rows.summary
    assert "2 rows cut at context_length 16" in rows.summary
    with pytest.raises(UserError, match="none of its 1 row has an answer token within context_length 16"):
        load(write(tmp_path / "b.jsonl", given[:1]), tokenizer, context_length=16)


GOOD = '{"text": "hello"}\n'
FAULTS = {
    "bad line": ("a.jsonl", GOOD + "\n" + '{"text": "hel', "line 3, column 10: malformed JSON"),
    "bad json": ("a.json", '[\n{"text": "a"},\n{"text": }]', "line 3, column 10: malformed JSON"),
    "not an object": ("a.jsonl", GOOD + "[1, 2]\n", "line 2 is list, but each row must be an object"),
    "not text": ("a.jsonl", GOOD + '{"text": ["a"]}\n', "line 2: 'text' must be text, but is list"),
    "missing field": (
        "a.jsonl",
        GOOD + '{"txt": "a"}\n',
        "line 2: 'text' must be text, but is missing; the row has txt",
    ),
    "no form": ("a.jsonl", '{"txt": "a"}\n', "does not fit its columns txt; wanted: messages"),
    "empty": ("a.jsonl", "\n\n", "has no rows"),
    "empty list": ("a.json", "[]", "has no rows"),
    "csv fields": ("a.csv", "prompt,completion\na,b\na\n", "line 3 does not have the header's 2 fields"),
    "parquet": ("a.parquet", "hello hello", "is not a parquet file"),
    "unknown type": ("a.xml", "<a/>", "unknown file type '.xml'; use .json, .jsonl, .parquet, .csv"),
    "latin-1": ("a.jsonl", b'{"text": "\xe4"}', "is not UTF-8 text"),
    "missing": ("a.jsonl", None, "no such file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_told_in_one_line(tmp_path: Path, fault: str) -> None:
    name, content, message = FAULTS[fault]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load(str(path), bytes_tokenizer())
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_named_format_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"dataset_format 'alpaca' does not fit .* instruction \+ output .* question \+ answer"
    ):
        load(write(tmp_path / "a.jsonl", [{"text": "a"}]), bytes_tokenizer(), dataset_format="alpaca")


def test_limits_of_the_model(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", [{"text": "hello"}]), bytes_tokenizer()
    with pytest.raises(UserError, match="the model has 100 embeddings"):
        load(path, tokenizer, vocab_size=100)


def test_missing_pad_token_is_chosen_without_a_new_one(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, len(loaded)) == ("<unk>", len(tokenizer))
    with pytest.raises(UserError, match="its tokenizer could not be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_dummy_fills_the_context_without_a_tokenizer() -> None:
    rows = load("dummy", None, context_length=40, vocab_size=100)
    assert (len(rows), set(rows.lengths.tolist())) == (512, {40})
    assert len(load("dummy", None, context_length=40, dataset_samples=3)) == 3
    short = load("dummy", None, context_length=512, dataset_samples=2000, dummy_row_tokens=150)
    assert short.lengths.mean() == pytest.approx(150, rel=0.05)
    assert short.lengths.max() == 512
    assert rows.ids.max() == 99
    assert rows.trains.sum() == 512 * 39


def test_names_of_fsdp_qlora(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def hub(name: str) -> datasets.DatasetDict:
        asked.append(name)
        if name == "no/where":
            raise ConnectionError("cannot reach it\nlong story")
        if "know_sql" in name:
            made = [{"question": f"{i}", "context": "c", "answer": "a"} for i in range(1010)]
            return datasets.DatasetDict(validation=datasets.Dataset.from_list(made))
        if "guanaco" in name:
            text = "### Human: hi### Assistant: hello### Human: more### Assistant: yellow"
            return datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": text}]), test=None)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ALPACA_ROWS * 300))

    monkeypatch.setattr("datasets.load_dataset", hub)
    tokenizer = bytes_tokenizer()
    assert len(load("alpaca", tokenizer)) == 600
    assert len(load("alpaca_sample", tokenizer)) == 512
    assert len(load("alpaca_sample", tokenizer, dataset_samples=7)) == 7
    assert len(load("someone/else", tokenizer)) == 600
    sql = load("sql", tokenizer)
    shuffled = datasets.Dataset.from_list([{"i": i} for i in range(1010)]).shuffle(seed=42)["i"][1000:]
    assert [int(tokenizer.decode(row(sql, i)[0]).split("\n")[3]) for i in range(10)] == list(shuffled)
    guanaco = load("guanaco", tokenizer)
    assert learnt(guanaco, 0, tokenizer) == " hello yellow</s>"
    assert asked == [
        "yahma/alpaca-cleaned", "yahma/alpaca-cleaned", "yahma/alpaca-cleaned", "someone/else", "knowrohit07/know_sql",
        "timdettmers/openassistant-guanaco",
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"'no/where': could not be loaded from the hub .*cannot reach it\); give one of dummy"
    ):
        load("no/where", tokenizer)


def test_a_folder_without_data_is_called_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"the folder could not be loaded as a dataset \(.+\); give one of dummy"):
        next(open_source(str(tmp_path), None).rows)


@pytest.mark.skipif(not (SHARED / "llama2_tokenizer.model").is_file(), reason="Llama 2's tokenizer is not at hand")
def test_llama2_on_real_rows(tmp_path: Path) -> None:
    tokenizer = llama2_tokenizer(tmp_path, SHARED / "llama2_tokenizer.model")
    source = json.loads((SHARED / "gsm8k_train.json").read_text())[:500]
    rows = load(write(tmp_path / "a.jsonl", source), tokenizer, context_length=1024, vocab_size=32_000)
    assert len(rows) == 500
    for number, given in enumerate(source):
        ids, trains = row(rows, number)
        text = tokenizer.decode(ids)
        prompt = text[3 : text.rindex("### Response:") + len("### Response:")].lstrip()  # after <s>
        assert ids[: trains.index(True)] == tokenizer(prompt)["input_ids"]
        assert text.endswith("### Response:" + given["output"].strip(" ") + "</s>")  # no space of the tokenizer's own
        assert ids.count(1) == ids.count(2) == 1
        assert trains[-1]


def test_tokenizing_is_batched_and_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """52,000 Alpaca-like rows take seconds: a few calls a chunk of rows, none a row."""
    tokenizer, calls = bytes_tokenizer(), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **given: calls.append(1) or call(*args, **given))
    given = [{**ALPACA_ROWS[0], "output": f"hello yellow fellow {i} " * 8} for i in range(6_000)]
    path = write(tmp_path / "a.jsonl", given)
    start = time.perf_counter()
    assert len(load(path, tokenizer)) == 6_000
    assert len(calls) < 20
    assert time.perf_counter() - start < 15  # about 1 s on two idle cores
