"""Answers to held-out rows while training: those of the adapter of that step, and not a bit of training changes."""

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import train
from fsdp_qlora.__main__ import main
from fsdp_qlora.config.parse import parse
from fsdp_qlora.data.batches import Rows
from fsdp_qlora.generation.decoder import FusedDecoder
from fsdp_qlora.training.eval_questions import asked_of, questions_of
from tests.support import tiny
from tests.support.built import built
from tests.support.runs import Options, Run, flags, run_alone, run_ranks
from tests.support.small_tokenizers import gpt2_tokenizer

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
    assert re.search(r"step 2: row \d+ is answered '.*' \(right: '.*'\); 3 answers in 0:0\d", capsys.readouterr().out)
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
    trains = np.array([False, True, False, True, True, False, True, False, False, True, False], np.bool_)
    offsets = np.array([0, 5, 7, 11])
    rows = Rows("x", "x", np.arange(11, dtype=np.int32), trains, offsets, np.array([4, 5, 9]), 8, 0, 3, 0, 0)
    assert questions_of(rows, 5) == [(4, [0, 1, 2], [3, 4]), (9, [7, 8], [9])]  # the second asks nothing
    assert len(questions_of(rows, 1)) == 1


def held_out(form: str, prompt: int) -> Rows:
    """One row of so many tokens before an answer of one."""
    trains = np.array([False] * prompt + [True], np.bool_)
    ids = np.full(prompt + 1, 5, np.int32)
    return Rows("x", form, ids, trains, np.array([0, prompt + 1]), np.array([0]), 64, 0, 1, 0, 0)


def test_answers_end_where_those_of_generate_do(tmp_path):
    """The end of a turn, which a row that was cut does not show."""
    tokenizer = gpt2_tokenizer()
    tokenizer.eos_token = "</s>"
    config = parse(flags({"model_name": tmp_path, "dataset": "x.jsonl", "eval_samples": 1, "eval_generate": 1}))
    hf_config = transformers.LlamaConfig(**tiny.SHAPE | {"eos_token_id": [7, 8]})
    transformers.GenerationConfig(eos_token_id=9).save_pretrained(tmp_path)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    found = asked_of(config, held_out("messages", 4), tokenizer, hf_config)
    assert found is not None
    assert found.stops == [9, 7, 8, *ends]
    text = asked_of(config, held_out("prompt_completion", 4), tokenizer, hf_config)
    assert text is not None
    assert text.stops == [9, 7, 8, ends[0]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"eval_generate_tokens": 250},
            "eval_generate_tokens 250: the model takes at most 256 tokens, and held-out",
        ),
        ({"dataset": "TEXT"}, "eval_generate 2: has no effect, as no held-out row asks anything"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_weights_are_read(options, tmp_path, capsys, more, words):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"ant {'bee ' * i}"}) + "\n" for i in range(1, 9)))
    more = more | ({"dataset": text} if "dataset" in more else {})
    given = options | {"eval_generate": 2, "output_dir": tmp_path / "out", "eval_samples": 2} | more
    capsys.readouterr()
    assert train.main(flags(given)) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "loaded" not in said.out
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_tables_that_grow_with_rows_are_as_they_were(options, tmp_path):
    """Rotary tables of the kind dynamic grow with a row that is longer than all before, and stay so."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    shape = tiny.SHAPE | {"max_position_embeddings": 16, "rope_parameters": rope}
    model = tiny.save_model(transformers.LlamaConfig(**shape), tmp_path / "base")
    row, longer = torch.randint(3, 259, (1, 24)), torch.randint(3, 259, (1, 60))
    with built({"model_name": model, "dataset": "dummy", "precision": "fp32", "context_length": 60}) as ours:
        first = ours.loss(row, row, 23.0).item()
        with ours.model.evaluating():
            ours.model.logits(longer.to(ours.world.device), None)
            grown = ours.loss(row, row, 23.0).item()
        assert grown != first, "the tables did not grow"
        assert ours.loss(row, row, 23.0).item() == first


def test_no_memory_for_answers_ends_answers_and_not_training(options, tmp_path, monkeypatch, capsys):
    asks: Options = {"eval_generate": 3, "eval_generate_tokens": 6}
    without = run_alone(options, tmp_path / "without")
    prefill, calls = FusedDecoder.prefill, []

    def failing(self, prompts, passes):
        calls.append(prompts)
        if len(calls) == 5:  # the second row after the second evaluation
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return prefill(self, prompts, passes)

    monkeypatch.setattr(FusedDecoder, "prefill", failing)
    capsys.readouterr()
    run = run_alone(options | asks, tmp_path / "with")
    assert run.losses == without.losses
    assert [line["step"] for line in answers_of(run)] == [2, 2, 2]
    assert capsys.readouterr().out.count("eval_generate: no more answers, as rank 0 ran out of GPU memory") == 1


def test_the_file_is_cut_as_the_record_is(options, tmp_path):
    asks: Options = {"eval_generate": 1, "eval_generate_tokens": 2, "save_steps": 2}
    run = run_alone(options | asks, tmp_path / "out")
    whole = answers_of(run)
    assert [line["step"] for line in whole] == [2, STEPS]
    again = run_alone(options | asks | {"resume": run.folder / "checkpoint-2"}, tmp_path / "other")
    assert answers_of(again) == whole
    with (run.folder / "eval_answers.jsonl").open("a") as file:
        file.write('{"step": 3, "row"')  # killed in the middle
    run_alone(options | asks | {"resume": run.folder / "checkpoint-2", "overwrite_output_dir": "true"}, run.folder)
    assert answers_of(run) == whole
    run_alone(options | {"max_steps": 1, "overwrite_output_dir": "true"}, run.folder)
    assert not (run.folder / "eval_answers.jsonl").exists()


def test_a_full_disk_ends_the_answers_and_not_the_run(options, tmp_path, capsys, monkeypatch):
    """It is told once; the run ends as one without answers, its adapter saved."""

    def full(self: Path, *arguments: object, **more: object) -> object:
        if self.name == "eval_answers.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *arguments, **more)

    opened = Path.open
    without = run_alone(options, tmp_path / "without")
    monkeypatch.setattr(Path, "open", full)
    run = run_alone(options | {"eval_generate": 2, "eval_generate_tokens": 4}, tmp_path / "full")
    said = capsys.readouterr().out
    assert said.count("eval_answers.jsonl cannot be written (No space left on device); training goes on; free") == 1
    assert run.losses == without.losses
    assert all(torch.equal(run.tensors[name], tensor) for name, tensor in without.tensors.items())
