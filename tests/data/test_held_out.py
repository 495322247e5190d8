"""Rows held out for evaluation: by content and seed, never on both sides, whatever the order of the rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.parse import parse
from fsdp_qlora.data.batches import Rows, load_rows
from fsdp_qlora.data.evaluation_batches import EvaluationBatches
from fsdp_qlora.data.held_out import count_labels, hold_out, rows_to_evaluate
from fsdp_qlora.errors import UserError
from tests.support.runs import flags
from tests.support.tiny import save_tokenizer

Tokens = tuple[int, ...]


def rows_of(texts: list[str], index: list[int] | None = None) -> Rows:
    """A token a character, all learnt."""
    ids = np.array([ord(c) for text in texts for c in text], np.int32)
    offsets = np.cumsum([0, *map(len, texts)])
    numbers = np.array(range(len(texts)) if index is None else index)
    trains = np.ones(len(ids), np.bool_)
    return Rows("made", "text", ids, trains, offsets, numbers, 64, 0, n_read=len(texts), n_dropped=0, n_truncated=0)


def contents(rows: Rows) -> list[Tokens]:
    return [tuple(rows.ids[a:b].tolist()) for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]


def texts_of(rows: Rows) -> list[str]:
    return ["".join(map(chr, tokens)) for tokens in contents(rows)]


TEXTS = [f"row {number}" for number in range(200)]


def test_as_many_are_held_out_as_asked_for_and_every_row_is_on_one_side_in_its_order():
    training, held = hold_out(rows_of(TEXTS), 40, seed=42)
    assert (len(training), len(held)) == (160, 40)
    assert sorted(texts_of(training) + texts_of(held)) == sorted(TEXTS)
    for side in (training, held):
        assert side.index.tolist() == sorted(side.index.tolist())
        assert [TEXTS[i] for i in side.index] == texts_of(side)
    assert held.notes == ["held out by content"]


def test_what_is_held_out_depends_on_contents_and_seed_and_not_on_the_order():
    held = set(texts_of(hold_out(rows_of(TEXTS), 40, seed=42)[1]))
    shuffled = np.random.default_rng(0).permutation(TEXTS).tolist()
    assert set(texts_of(hold_out(rows_of(shuffled), 40, seed=42)[1])) == held
    assert len(held & set(texts_of(hold_out(rows_of(TEXTS), 40, seed=43)[1]))) < 20
    grown = set(texts_of(hold_out(rows_of([*TEXTS, *(f"new {n}" for n in range(20))]), 44, seed=42)[1]))
    assert len(grown & held) > 30, "a dataset that grows keeps nearly the same rows held out"


def test_rows_of_the_same_tokens_are_never_on_both_sides():
    texts = [f"row {number % 60}" for number in range(200)]  # each three or four times
    for seed in range(5):
        training, held = hold_out(rows_of(texts), 50, seed)
        assert not set(contents(training)) & set(contents(held))
        assert 46 < len(held) <= 50
        assert len(training) + len(held) == 200
    training, held = hold_out(rows_of(texts), 1, 0)
    assert (len(training), len(held)) == (200, 0), "no row is alone"


def test_parts_of_one_text_and_what_they_join_stay_on_one_side():
    texts = ["a1", "a2", "b1", "a2", "c1", "c2", *TEXTS]
    index = [0, 0, 1, 1, 2, 2, *range(3, 203)]  # b holds a's second part too
    sides = set()
    for seed in range(30):
        training, held = hold_out(rows_of(texts, index), 100, seed)
        for joined in ({"a1", "a2", "b1"}, {"c1", "c2"}):
            on = {side for side, rows in (("train", training), ("held", held)) if joined & set(texts_of(rows))}
            assert len(on) == 1
            sides |= on
    assert sides == {"train", "held"}


def test_texts_of_many_parts_are_not_held_out_first():
    parts = [(f"document {d}, part {p}", d) for d in range(40) for p in range(1 if d < 20 else 30)]
    long = 0
    for seed in range(20):
        _, held = hold_out(rows_of([text for text, _ in parts], [d for _, d in parts]), 310, seed)
        long += len({d for d in held.index.tolist() if d >= 20})
    assert 0.3 < long / (20 * 20) < 0.6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def save(file: Path, texts: list[str]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": text, "completion": "x"}) + "\n" for text in texts))
    return file


def split(tokenizer, dataset: Path, **options: object) -> tuple[Rows, Rows | None]:
    config = parse(flags({"model_name": "m", "dataset": dataset, "rows_cache": "null"} | options))
    return rows_to_evaluate(config, load_rows(config.data, tokenizer, 264), tokenizer, 264)


def test_another_datasets_rows_that_are_trained_on_are_left_out_and_told(tokenizer, tmp_path):
    file = save(tmp_path / "train.jsonl", TEXTS[:20])
    others = save(tmp_path / "other.jsonl", [*TEXTS[15:25], TEXTS[21]])
    training, held = split(tokenizer, file, eval_dataset=others)
    assert held is not None
    assert len(training) == 20
    assert held.index.tolist() == [5, 6, 7, 8, 9, 10], "its own copies count as often as they are there"
    assert "5 rows left out: among the training rows too" in held.summary
    _, held = split(tokenizer, file, eval_dataset=others, eval_samples=7)
    assert held is not None
    assert held.index.tolist() == [5, 6]
    _, held = split(tokenizer, file, eval_dataset=others, dataset_samples=16)
    assert held is not None
    assert len(held) == 10, "rows that dataset_samples leaves out are not trained on"


def test_a_folders_held_out_files_are_evaluated_on(tokenizer, tmp_path):
    save(tmp_path / "rows" / "train.jsonl", TEXTS[:9])
    save(tmp_path / "rows" / "test.jsonl", TEXTS[9:12])
    training, held = split(tokenizer, tmp_path / "rows", eval_dataset=tmp_path / "rows")
    assert held is not None
    assert (len(training), len(held)) == (9, 3)


def test_a_hub_datasets_validation_split_is_evaluated_on(tokenizer, tmp_path, monkeypatch):
    import datasets

    def table(numbers: range) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": f"p{n}", "completion": "x"} for n in numbers])

    splits = {"train": table(range(5)), "test": table(range(5, 7)), "validation": table(range(7, 10))}
    monkeypatch.setattr("datasets.load_dataset", lambda *_: datasets.DatasetDict(splits))
    for asked, count in (("some/rows", 3), ("some/rows::test", 2)):
        training, held = split(tokenizer, Path("some/rows"), eval_dataset=asked)
        assert held is not None
        assert (len(training), len(held)) == (5, count)


def test_one_chat_template_of_several_is_chosen_once(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {
        "plain": "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}",
        "loud": "{% for m in messages %}{% generation %}!{{ m.content }}</s>{% endgeneration %}{% endfor %}",
    }
    for name in ("a", "b"):
        row = {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": name * 2}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    training, held = split(tokenizer, tmp_path / "a.jsonl", eval_dataset=tmp_path / "b.jsonl", chat_template="loud")
    assert held is not None
    assert tokenizer.decode(training.ids).count("!") == tokenizer.decode(held.ids).count("!") > 0


REFUSED = [
    ({"eval_fraction": 0.01}, "eval_fraction 0.01: is none of the 20 rows; raise it"),
    ({"eval_fraction": 0.99}, "eval_fraction 0.99: is all of the 20 rows; lower it"),
    ({"eval_samples": 20}, "eval_samples 20: is all of the 20 rows; lower it"),
    ({"eval_dataset": "missing.jsonl"}, "eval_dataset 'missing.jsonl'"),
    ({"eval_dataset": "SAME"}, "all its 20 rows are among the training rows"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_leaves_one_side_empty_is_refused(tokenizer, tmp_path, options, words):
    file = save(tmp_path / "rows.jsonl", TEXTS[:20])
    with pytest.raises(UserError) as refused:
        split(tokenizer, file, **{name: file if value == "SAME" else value for name, value in options.items()})
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_copies_of_one_row_cannot_be_held_out(tokenizer, tmp_path):
    file = save(tmp_path / "rows.jsonl", ["same"] * 20)
    with pytest.raises(UserError, match="nothing can be held out, as rows of the same tokens stay on one side"):
        split(tokenizer, file, eval_samples=5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("most_tokens", [1, 30, 1000])
def test_ranks_share_the_micro_batches_that_one_would_take(ranks, most_tokens):
    rows = rows_of([text * (1 + number % 7) for number, text in enumerate(TEXTS[:23])])
    alone = list(EvaluationBatches(rows, most_tokens, 1, 0))
    assert sorted(row for batch in alone for row in batch.rows) == list(range(23))
    assert sum(batch.labels.numel() for batch in alone) == count_labels(rows)
    for batch in alone:
        assert batch.input_ids.numel() <= most_tokens or len(batch.rows) == 1
    shared = [list(EvaluationBatches(rows, most_tokens, ranks, rank)) for rank in range(ranks)]
    assert len({len(batches) for batches in shared}) == 1
    dealt = [batch for together in zip(*shared, strict=True) for batch in together]
    assert [batch.rows for batch in dealt if batch.rows] == [batch.rows for batch in alone]
    assert all(batch.labels.numel() == 0 for batch in dealt[len(alone) :])
