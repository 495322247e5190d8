"""Faults of generate and evaluate: each is one line, and what was answered or measured so far is not lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fsdp_qlora.__main__ import main
from fsdp_qlora.generation.answers import Answers
from tests.generation.test_generate import material
from tests.support import tiny
from tests.support.full_disk import REFUSED, no_file_beyond
from tests.support.runs import Options, flags

__all__ = ["material"]  # the fixture
NEW = 4
OUTPUT = {"generate": "output_file", "evaluate": "output_dir"}
COMMANDS = pytest.mark.parametrize("command", OUTPUT)


class Asked:
    """A command over the rows of `material`: what it leaves, and the one line that it ends with."""

    def __init__(self, material: Path, folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
        self.options: Options = {"adapter": material / "adapter", "dataset": material / "rows.jsonl", "batch_size": 2}
        self.command, self.capsys, self.output = command, capsys, folder / "output"
        self.out = ""

    def __call__(self, code: int, **more: object) -> str:
        self.capsys.readouterr()
        given = {"max_new_tokens": NEW, OUTPUT[self.command]: self.output} | self.options | more
        given |= {"measures": "exact"} if self.command == "evaluate" else {}
        assert main([self.command, *flags({name: value for name, value in given.items() if value is not None})]) == code
        said = self.capsys.readouterr()
        self.out = said.out
        lines = [line for line in said.err.split("\n") if line.startswith(f"{self.command}:")]
        assert len(lines) == (code != 0), said.err
        return "".join(lines)

    def answers(self) -> list[str]:
        file = self.output if self.command == "generate" else self.output / "answers.jsonl"
        return [json.loads(line)["answer"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def asked(material, tmp_path, capsys) -> Callable[[str], Asked]:
    return lambda command: Asked(material, tmp_path, capsys, command)


@pytest.mark.parametrize("nbytes", [0, 1, 300, 500])
def test_a_full_disk_leaves_the_answers_so_far_each_of_them_whole(nbytes, asked):
    generate = asked("generate")
    generate(0)  # on a GPU it writes compiled kernels too, which the limit would stop
    whole = generate.output.read_bytes()
    assert len(generate.answers()) == 7
    generate.output.unlink()
    with no_file_beyond(nbytes):
        said = generate(2)
    assert "output_file:" in said
    assert f"cannot be written ({REFUSED}); free some space" in said
    assert generate.output.read_bytes() == whole[: whole.rfind(b"\n", 0, nbytes) + 1]


def test_a_full_disk_leaves_the_figures_on_the_screen(asked):
    evaluate = asked("evaluate")
    evaluate(0)  # as above
    for file in evaluate.output.iterdir():
        file.unlink()
    with no_file_beyond(100):
        said = evaluate(2)
    assert f"cannot be written ({REFUSED}); free some space" in said
    assert "exact" in evaluate.out
    assert "of 7" in evaluate.out
    assert not list(evaluate.output.iterdir())


@COMMANDS
def test_an_interruption_says_what_is_left_and_the_same_command_starts_anew(command, asked, monkeypatch):
    run, call = asked(command), Answers.__call__

    def interrupted(self: Answers, *given: Any) -> object:
        for count, some in enumerate(call(self, *given)):
            if count == 2:
                raise KeyboardInterrupt
            yield some

    with monkeypatch.context() as patched:
        patched.setattr(Answers, "__call__", interrupted)
        said = run(130)
    assert "interrupted; " in said
    assert "the same command starts anew" in said
    assert len(run.answers()) == (4 if command == "generate" else 0)
    if command == "generate":
        assert "exists; choose another file, or --overwrite true" in run(2)
    run(0, **({"overwrite": True} if command == "generate" else {}))
    assert len(run.answers()) == 7
    assert "exists; choose another" in run(2)


@COMMANDS
def test_an_adapter_of_another_base_is_one_line(command, asked, tmp_path):
    other = tiny.save_model(transformers.Qwen2Config(**tiny.SHAPE | {"hidden_size": 128}), tmp_path / "other")
    said = asked(command)(2, model_name=other)
    assert "adapter:" in said
    assert "belongs to another base" in said


@COMMANDS
def test_conversations_without_a_chat_template_are_one_line(command, asked, tmp_path):
    turns = [{"role": "user", "content": "ant"}, {"role": "assistant", "content": "bee"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    said = asked(command)(2, dataset=tmp_path / "chat.jsonl")
    assert "no chat template" in said
    assert "--chat_template" in said


@COMMANDS
def test_rows_of_the_embedding_without_a_token_are_answers_without_words(command, asked, material, tmp_path):
    """A vocabulary larger than the tokenizer's, 264 of 259: one of its last two rows is always the likeliest."""
    base = tiny.save_model(transformers.Qwen2Config(**tiny.SHAPE), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    head = tensors["lm_head.weight"]
    head.zero_()
    head[-1] = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    head[-2] = -head[-1]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = asked(command)
    run(0, adapter=None, model_name=base, precision="fp32")
    assert run.answers() == [""] * 7
