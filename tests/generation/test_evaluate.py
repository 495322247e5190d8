"""The command evaluate: PEFT's losses and choices, exact answers counted, alike on ranks; intervals that are right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from fsdp_qlora.__main__ import main
from fsdp_qlora.commands.evaluate_rows import Measured, is_right
from fsdp_qlora.config.options import DataOptions
from fsdp_qlora.data.asked import continuations, read_prompts
from fsdp_qlora.errors import BadRow
from fsdp_qlora.generation.answers import Answer
from fsdp_qlora.generation.likelihood import RowLoss
from fsdp_qlora.generation.scores import NORMALIZE, Share, best, choices_of, mean_loss, sign_test
from tests.generation.test_generate import WORKER, by_peft, material
from tests.support import plain
from tests.support.runs import Options, flags
from tests.support.small_tokenizers import gpt2_tokenizer
from tests.support.torchrun import ROOT, run_torchrun

__all__ = ["material"]  # the fixture
NEW = 8


def evaluate(folder: Path, code: int = 0, **options: object) -> dict:
    assert main(["evaluate", *flags({"output_dir": folder} | options)]) == code
    return json.loads((folder / "evaluation.json").read_text())


def saved(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def peft_model(material: Path, adapted: bool) -> torch.nn.Module:
    model = plain.load_base(material / "base", plain.Recipe())
    return (PeftModel.from_pretrained(model, material / "adapter") if adapted else model).eval()


def test_loss_and_exact_answers_are_those_of_peft(material, tmp_path, capsys):
    """The rows' answers are what the adapted model says, but for two; the base says other things."""
    asked = [json.loads(line)["prompt"] for line in (material / "rows.jsonl").read_text().splitlines()]
    said = by_peft(material, True)
    rows = [{"prompt": p, "completion": f" {a}\n" if a.strip() else "x"} for p, a in zip(asked, said, strict=True)]
    rows[1]["completion"], rows[4]["completion"] = "wrong", "wrong too"
    wanted = sum(" ".join(row["completion"].split()) == " ".join(a.split()) for row, a in zip(rows, said, strict=True))
    assert wanted >= len(rows) - 3
    file = saved(tmp_path / "rows.jsonl", rows)
    shared: Options = {"adapter": material / "adapter", "dataset": file, "max_new_tokens": NEW, "batch_size": 3}
    found = evaluate(tmp_path / "e", **shared)
    printed = capsys.readouterr().out
    assert found["measures"] == ["loss", "exact"]
    assert (found["adapter"]["exact"]["right"], found["adapter"]["exact"]["rows"]) == (wanted, len(rows))
    assert found["base"]["exact"]["right"] == 0
    assert found["exact_compared"] == {"only_adapter": wanted, "only_base": 0, "p": sign_test(wanted, 0)}
    assert f"{wanted} of {len(rows)}" in printed
    assert [f"answered  {len(rows)} rows ({state})" in printed for state in ("adapter", "base")] == [True, True]
    for state, adapted in (("adapter", True), ("base", False)):
        model, total, labels = peft_model(material, adapted), 0.0, 0
        with torch.no_grad():
            for ids, row_labels in plain.read_rows(file, material / "base", 512):
                total += plain.summed_loss(model, ids, row_labels).item()
                labels += sum(label != -100 for label in row_labels)
        assert found[state]["loss"] == pytest.approx(total / labels, rel=1e-5)
        assert found[state]["label_tokens"] == labels
        assert found[state]["perplexity"] == pytest.approx(math.exp(total / labels), rel=1e-4)
    answers = [json.loads(line) for line in (tmp_path / "e" / "answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in answers] == said
    assert sum(line["right"] for line in answers) == wanted
    assert len((tmp_path / "e" / "answers_base.jsonl").read_text().splitlines()) == len(rows)
    again: Options = shared | {"overwrite_output_dir": "true", "at_least": 0.99}
    evaluate(tmp_path / "e", 1, **again)
    assert "at_least" in capsys.readouterr().err
    assert main(["evaluate", *flags(shared | {"output_dir": tmp_path / "e"})]) == 2
    assert "evaluation.json exists" in capsys.readouterr().err


def test_choices_are_scored_as_peft_scores_them_on_two_ranks_too(material, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "base")
    texts = ["cow", "doe doe doe", "e", "fox", "gnu gnu"]
    rows = [{"prompt": f"{text} is", "choices": texts[:3], "completion": texts[i % 3]} for i, text in enumerate(texts)]
    model, right = peft_model(material, True), {"choice": 0, "choice_per_token": 0}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        losses = []
        for text in row["choices"]:
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                total = plain.summed_loss(model, prompt + answer, [-100] * len(prompt) + answer).item()
            losses.append((total, total / len(answer)))
        for i, name in enumerate(right):
            best_one = min(range(3), key=lambda c, i=i, losses=losses: losses[c][i])
            right[name] += row["choices"][best_one] == row["completion"]
    options: Options = {"adapter": material / "adapter", "dataset": saved(tmp_path / "rows.jsonl", rows)}
    alone = evaluate(tmp_path / "alone", **options)
    assert alone["measures"] == ["loss", "choice"]
    assert {name: alone["adapter"][name]["right"] for name in right} == right
    runs = {
        name: ["evaluate", *flags(options | more | {"output_dir": tmp_path / name})]
        for name, more in (("shard", {"sharding_strategy": "full_shard"}), ("stream", {"use_cpu_offload": "true"}))
    }
    (tmp_path / "cases.json").write_text(json.dumps(runs))
    done = run_torchrun(WORKER, 2, [str(tmp_path / "cases.json")], timeout=200)
    for name in runs:
        assert done.stdout.count(f"{name} ended with 0") == 2, done.stdout + done.stderr
        found = json.loads((tmp_path / name / "evaluation.json").read_text())
        for state in ("adapter", "base"):
            assert found[state].pop("loss") == pytest.approx(alone[state]["loss"], rel=1e-6)
            assert found[state]["choice"] == alone[state]["choice"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measures": "choice"}, ["measures", "column choices", "line 1"]),
        ({"measures": "auto,loss"}, ["measures auto,loss", "auto includes"]),
        ({"measures": "loss", "at_least": 0.5}, ["at_least 0.5", "no effect", "add exact"]),
        ({"measures": "exact", "dataset": "BARE"}, ["line 1", "no answer to compare"]),
        ({"dataset": "BARE"}, ["neither answers nor choices"]),
        ({"measures": "accuracy"}, ["measures accuracy", "loss, exact, choice"]),
        ({"measures": "choice", "dataset": "LONG"}, ["at most 256 tokens", "line 2", "longest choice"]),
        ({"measures": "loss", "batch_size": 2}, ["batch_size 2", "no effect", "add exact"]),
        ({"output_dir": "ROWS"}, ["output_dir", "cannot be written"]),
    ],
)
def test_a_mistake_is_one_line(options, words, material, tmp_path, capsys):
    places = {"BARE": saved(tmp_path / "bare.jsonl", [{"prompt": "ant bee"}]), "ROWS": material / "rows.jsonl"}
    asked = {"prompt": "ant", "completion": "bee"}
    rows = [asked | {"choices": ["bee", "cow"]}, asked | {"choices": ["bee", "cow " * 300]}]
    places["LONG"] = saved(tmp_path / "long.jsonl", rows)
    given: Options = {"adapter": material / "adapter", "dataset": material / "rows.jsonl", "output_dir": tmp_path / "e"}
    given |= {"max_new_tokens": NEW} if options.get("measures") not in ("choice", "loss") else {}
    given |= {name: places.get(value, value) for name, value in options.items()}
    capsys.readouterr()
    assert main(["evaluate", *flags(given)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("evaluate:", "--"))]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines
    assert not (tmp_path / "e" / "evaluation.json").exists()


@pytest.mark.slow
def test_rows_from_standard_input_are_measured_in_every_way(material, tmp_path):
    rows = [json.loads(line) for line in (material / "rows.jsonl").read_text().splitlines()]
    file = saved(tmp_path / "rows.jsonl", [row | {"choices": [row["completion"], "gnu"]} for row in rows])
    shared: Options = {"adapter": material / "adapter", "measures": "loss,choice,exact", "max_new_tokens": 2}
    wanted = evaluate(tmp_path / "file", **shared, dataset=file)
    arguments = flags(shared | {"dataset": "-", "output_dir": tmp_path / "piped"})
    piped = [sys.executable, "-m", "fsdp_qlora", "evaluate", *arguments]
    done = subprocess.run(piped, input=file.read_bytes(), capture_output=True, cwd=ROOT, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "piped" / "evaluation.json").read_text())
    assert found | {"dataset": wanted["dataset"]} == wanted


def test_an_answer_that_is_an_integer_counts_choices(material, tmp_path):
    """Its text is another choice's, which is wrong."""
    row = {"prompt": "ant", "choices": ["8", "2", "24", "120"], "answer": 2}
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "base")
    options = DataOptions(dataset=str(saved(tmp_path / "rows.jsonl", [row, row | {"answer": "24"}])))
    numbers = [prompt.number for prompt in read_prompts(options, tokenizer, 1 << 20).prompts]
    assert numbers == [2, None]


# ---- figures


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"), [(38, 40, 0.8350, 0.9862), (0, 11, 0.0, 0.2588), (10, 10, 0.7225, 1.0)]
)
def test_intervals_are_wilsons(right, rows, low, high):
    assert Share(right, rows).interval == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_a_loss_holds_the_truth_as_often_as_it_says():
    """Of 400 samples of 60 rows with one mean loss per label; rows are of unequal lengths, as rows are."""
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        labels = torch.randint(1, 40, (60,), generator=draw)
        levels = 2 + 0.7 * torch.randn(60, generator=draw)
        found = mean_loss([RowLoss(float(n * x), int(n)) for n, x in zip(labels, levels, strict=True)])
        assert found.half is not None
        held += abs(found.mean - 2) < found.half
    assert 0.91 < held / 400 < 0.98
    assert mean_loss([RowLoss(6.0, 3)]).half is None


def test_what_of_an_answer_counts():
    assert NORMALIZE["none"](" a  b ") == " a  b "
    assert NORMALIZE["space"](" A\n b ") == "A b"
    assert NORMALIZE["words"]("The cat, and A dog!") == "cat and dog"
    assert NORMALIZE["words"]("don't, a well-known U.S. man") == "dont wellknown us man"  # as SQuAD deletes punctuation


def test_special_tokens_of_an_expected_answer_count_and_others_do_not():
    tokenizer = gpt2_tokenizer()
    call, plain_text = (continuations(tokenizer, [text])[0] for text in ("<|im_end|>fly(owl)", "fly(owl)"))
    assert len(call) == len(plain_text) + 1
    assert is_right(Answer(0, call, True), "<|im_end|>fly(owl)", tokenizer, NORMALIZE["none"])
    assert is_right(Answer(0, call, True), "fly(owl)", tokenizer, NORMALIZE["none"])
    assert not is_right(Answer(0, plain_text, True), "<|im_end|>fly(owl)", tokenizer, NORMALIZE["none"])


def test_the_right_choice_is_found_by_text_label_number_and_letter():
    assert choices_of({"choices": ["8", "2", "24", "120"]}, 2, "x") == (["8", "2", "24", "120"], 2)
    assert choices_of({"choices": ["8", "2"], "gold": 1}, None, "x") == (["8", "2"], 1)
    assert choices_of({"choices": ["x", " y"]}, "y", "x") == (["x", " y"], 1)
    assert choices_of({"choices": ["x", "y"]}, "1", "x") == (["x", "y"], 1)
    assert choices_of({"choices": ["x", "y"]}, "A", "x") == (["x", "y"], 0)
    assert choices_of({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, None, "x") == (
        ["x", "y"],
        1,
    )
    numbered = {"choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}}
    assert choices_of(numbered, "2", "x") == (["w", "x", "y", "z"], 1)  # a label comes before a number
    assert choices_of(numbered, "0", "x") == (["w", "x", "y", "z"], 0)
    assert choices_of({"prompt": "x"}, "y", "x") is None
    with pytest.raises(BadRow, match="none of its 2 choices"):
        choices_of({"choices": ["x", "y"]}, "z", "row 1")
    with pytest.raises(BadRow, match="none of its 2 choices"):
        choices_of({"choices": ["x", "2"]}, 2, "row 1")
    for choices, answer in (
        (["1", "0"], "0"),
        (["8", "2", "24"], "2"),
        (["B", "A"], "A"),
        ({"text": ["2", "1"], "label": ["1", "2"]}, "1"),
        ({"text": ["x", "y"], "label": [1, 0]}, 1),
        ([1, 2, 3], 1),
    ):
        with pytest.raises(BadRow, match=r"row 1: its answer .* may mean"):
            choices_of({"choices": choices}, answer, "row 1")
    with pytest.raises(BadRow, match="row 1: a choice is empty"):
        choices_of({"choices": ["x", " "]}, "x", "row 1")
    with pytest.raises(BadRow, match="row 1: its right choice 'x' is there twice"):
        choices_of({"choices": ["x", "y", "x"]}, 2, "row 1")
    assert choices_of({"choices": ["x", "y", "x"]}, "y", "x") == (["x", "y", "x"], 1)
    scores = [RowLoss(3.0, 1), RowLoss(4.0, 4), RowLoss(3.0, 1)]
    assert (best(scores, per_token=False), best(scores, per_token=True)) == (0, 1)


NO_CHOICES = {
    "text": "yes/no", "number": 5, "nothing": [], "one": ["x"], "null": ["x", None], "lists": [["x"], ["y"]],
    "texts": {"text": "xy"}, "no texts": {"label": ["A", "B"]}, "labels": {"text": ["x", "y"], "label": 5},
    "half a character": ["x", "\ud800"],
}  # fmt: skip


@pytest.mark.parametrize("given", NO_CHOICES.values(), ids=NO_CHOICES)
def test_choices_that_are_none_are_refused(given):
    with pytest.raises(BadRow, match=r"^row 1: (choices is|label is|has [01] choice|choices holds)") as error:
        choices_of({"choices": given}, "x", "row 1")
    str(error.value).encode()


def test_bad_choices_are_bad_rows(material, tmp_path, capsys):
    good = {"prompt": "ant", "choices": ["bee", "cow"], "completion": "cow"}
    rows = saved(tmp_path / "rows.jsonl", [good, good | {"choices": "bee"}, good | {"completion": "doe"}, good])
    asked: Options = {"adapter": material / "adapter", "dataset": rows, "measures": "choice"}
    assert main(["evaluate", *flags(asked | {"output_dir": tmp_path / "e"})]) == 2
    assert "line 2: choices is 'bee'" in capsys.readouterr().err
    assert evaluate(tmp_path / "skip", **asked, bad_rows="skip")["adapter"]["choice"]["rows"] == 2
    assert "2 bad rows left out" in capsys.readouterr().out


@pytest.mark.parametrize(("mean", "perplexity"), [(2.0, pytest.approx(7.389056)), (800.0, None), (math.nan, None)])
def test_a_loss_of_any_size_has_a_record(mean, perplexity):
    made = mean_loss([RowLoss(mean, 1), RowLoss(mean, 1)])
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    assert record["perplexity"] == perplexity
    assert record["loss"] == (None if math.isnan(mean) else mean)
    assert (record["loss_interval"] is None) == math.isnan(mean)
    assert "perplexity" in Measured(loss=made).cells()


def test_of_losses_that_are_no_numbers_no_choice_is_the_likeliest():
    assert best([RowLoss(math.nan, 1), RowLoss(1.0, 1)], per_token=False) == -1
    assert best([RowLoss(math.inf, 1), RowLoss(1.0, 1)], per_token=True) == 1


def test_chance_of_unequal_numbers():
    assert sign_test(700, 500) == pytest.approx(8.5354e-9, rel=1e-3)  # more ways than a float holds
    assert sign_test(600, 600) == 1.0
    assert sign_test(3000, 0) == 0.0
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == 1.0


def test_an_evaluation_that_replaces_one_leaves_no_answers_of_it(material, tmp_path):
    asked: Options = {"adapter": material / "adapter", "dataset": material / "rows.jsonl"}
    evaluate(tmp_path, **asked, max_new_tokens=2)
    (tmp_path / "notes.txt").write_text("mine")
    evaluate(tmp_path, **asked, measures="loss", overwrite_output_dir=True)
    assert {file.name for file in tmp_path.iterdir()} == {"evaluation.json", "notes.txt"}
