"""Commands on pages are ones that the programs take; those of docs/export.md are run as they stand there."""

import json
import re
import shlex
from collections.abc import Iterator

import pytest
import transformers

from fsdp_qlora.__main__ import main
from fsdp_qlora.commands.table import COMMANDS
from fsdp_qlora.config.parse import parse, parse_as
from tests.docs.test_names import PAGES
from tests.support import tiny
from tests.support.saved_adapters import save_random_adapter
from tests.support.small_tokenizers import gpt2_tokenizer
from tests.support.torchrun import ROOT

_OURS = re.compile(r"^(?: {4})?(?:torchrun|python) [^`\n]*?(train\.py|-m fsdp_qlora) ([^`\n]+)$", re.MULTILINE)
REST = "..."  # options that a page leaves out


def commands_of(page: str) -> Iterator[list[str]]:
    """Yield `train.py` or `-m fsdp_qlora` with what follows, of a page's blocks of commands."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for program, words in _OURS.findall(text):
        yield [program, *shlex.split(words, comments=True)]


LINES = [pytest.param(command, id=f"{page}-{i}") for page in PAGES for i, command in enumerate(commands_of(page))]


@pytest.mark.parametrize("command", LINES)
def test_a_command_of_a_page_is_taken(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model_name: m\ndataset: rows.jsonl\n")
    program, *words = command
    left_out = ["--model_name", "m"] if REST in words and "--model_name" not in words else []
    words = [word for word in words if word != REST]
    if program == "train.py":
        parse([*words, *left_out])
        return
    name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)
    parse_as(COMMANDS[name].program, words[len(name.split()) :])


def test_pages_have_commands_of_both_programs():
    found = [command for page in PAGES for command in commands_of(page)]
    assert {program for program, *_ in found} == {"train.py", "-m fsdp_qlora"}
    assert len(found) > 15


def test_the_commands_of_the_export_page_make_what_it_says(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("libggml")
    shape = {"vocab_size": 448, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 4}
    base = tiny.save_model(transformers.LlamaConfig(**tiny.SHAPE | shape), tmp_path / "base")
    gpt2_tokenizer().save_pretrained(base)
    save_random_adapter(tmp_path / "output", {"model_name": base})
    monkeypatch.chdir(tmp_path)
    for _, *words in commands_of("docs/export.md"):
        assert main(words) == 0, words
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["finished"]
    assert len(list(tmp_path.glob("gguf/*.gguf"))) == 3
