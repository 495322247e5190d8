"""Answers to held-out rows while training: those of the adapter of that step, and not a bit of training changes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from fsdp_qlora.__main__ import main
from fsdp_qlora.data.batches import Rows
from fsdp_qlora.training.eval_answers import questions_of
from tests.support import tiny
from tests.support.runs import Options, Run, flags, run_alone, run_ranks

STEPS = 4


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("eval-answers")
    model = tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE), folder / "base")
    shared: Options = {"model_name": model, "dataset": tiny.save_rows(folder / "rows.jsonl", 20), "precision": "fp32"}
    shared |= {"eval_samples": 4, "eval_steps": 2, "max_steps": STEPS, "lora_rank": 4, "log_to": "stdout", "lr": 3e-2}
    return shared | {"context_length": 64, "batch_size": 2, "lora_dropout": 0.1}


def answers_of(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "eval_answers.jsonl").read_text().splitlines()]


def test_answers_are_the_adapters_and_training_is_the_same_to_the_bit(options, tmp_path, capsys):
    asks: Options = {"eval_generate": 3, "eval_generate_tokens": 6}
    without, run = run_alone(options, tmp_path / "without"), run_alone(options | asks, tmp_path / "with")
    assert run.losses == without.losses
    assert [e["eval_loss"] for e in run.evaluations] == [e["eval_loss"] for e in without.evaluations]
    assert all(torch.equal(run.tensors[name], tensor) for name, tensor in without.tensors.items())
    lines = answers_of(run)
    assert [line["step"] for line in lines] == [2] * 3 + [STEPS] * 3
    assert "is answered" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path(str(options["dataset"])).read_text().splitlines()]
    for line in lines:
        assert line["prompt"] == rows[line["row"]]["prompt"]
        assert line["expected"] == rows[line["row"]]["completion"]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines[3:]))
    given: Options = {
        "adapter": run.folder,
        "dataset": asked,
        "max_new_tokens": 6,
        "output_file": tmp_path / "said.jsonl",
    }
    assert main(["generate", *flags(given)]) == 0
    said = [json.loads(line)["answer"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert said == [line["answer"] for line in lines[3:]]
    assert [line["answer"] for line in lines[:3]] != said


def test_ranks_answer_together_and_train_the_same(options, tmp_path):
    asks: Options = {"eval_generate": 3, "eval_generate_tokens": 6}
    cases = {
        f"{name}-{with_answers}": options | placed | (asks if with_answers else {})
        for name, placed in (("shard", {"sharding_strategy": "full_shard"}), ("stream", {"use_cpu_offload": "true"}))
        for with_answers in (False, True)
    }
    runs = run_ranks(cases, 2, tmp_path)
    for name in ("shard", "stream"):
        assert runs[f"{name}-True"].losses == runs[f"{name}-False"].losses
        tensors = runs[f"{name}-False"].tensors
        assert all(torch.equal(runs[f"{name}-True"].tensors[key], tensor) for key, tensor in tensors.items())
    assert answers_of(runs["shard-True"]) == answers_of(runs["stream-True"])
    assert len(answers_of(runs["shard-True"])) == 6


def test_a_question_ends_where_the_last_answer_begins():
    import numpy as np

    trains = np.array([False, True, False, True, True, True, True, False, False, True, False], np.bool_)
    offsets = np.array([0, 5, 7, 11])
    rows = Rows("x", "x", np.arange(11, dtype=np.int32), trains, offsets, np.array([4, 5, 9]), 8, 0, 3, 0, 0)
    assert questions_of(rows, 5) == [(4, [0, 1, 2], [3, 4]), (9, [7, 8], [9])]  # the second asks nothing
    assert len(questions_of(rows, 1)) == 1
