"""The quickstart's parts that need no network: its rows are what their script makes, asking tells right from wrong."""

import importlib.util
import json
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fsdp_qlora.__main__ import main as fsdp_qlora_command
from tests.support.small_tokenizers import CHATML, bytes_tokenizer

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
QUICKSTART = (LAUNCH / "quickstart.sh").read_text()


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, LAUNCH / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_what_the_script_makes_and_heldout_words_are_new(tmp_path: Path) -> None:
    make = script("quickstart_data/make.py")
    make.main(tmp_path)
    texts = {}
    for name in ("train", "heldout"):
        shipped = (LAUNCH / "quickstart_data" / f"{name}.jsonl").read_text()
        assert (tmp_path / f"{name}.jsonl").read_text() == shipped
        texts[name] = [json.loads(line)["messages"] for line in shipped.splitlines()]
    assert (len(texts["train"]), len(texts["heldout"])) == (make.TRAIN_ROWS, make.HELDOUT_ROWS)
    words = {
        name: {part for row in rows for part in row[-1]["content"].replace(",", "").split() if part.isalpha()}
        for name, rows in texts.items()
    }
    assert not words["train"] & words["heldout"]
    assert len({row[1]["content"] for row in texts["train"]}) == make.TRAIN_ROWS


def test_numbers_in_words() -> None:
    in_words = script("quickstart_data/make.py").in_words
    assert [in_words(n) for n in (2, 13, 20, 47, 90)] == ["two", "thirteen", "twenty", "forty-seven", "ninety"]


def test_asking_counts_right_answers_and_fails_below_the_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the quickstart asks: held-out conversations, exactly right answers before and after."""
    tokenizer = bytes_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "model")
    model = says_always(tokenizer, "yellow")
    model.save_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    rows = [
        [{"role": "user", "content": "hello " * count}, {"role": "assistant", "content": answer}]
        for count, answer in ((1, "hello"), (9, "yellow"))
    ]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    line = next(line for line in QUICKSTART.split("\n\n") if "fsdp_qlora evaluate" in line).replace("\\\n", "")
    asked = shlex.split(line)[shlex.split(line).index("evaluate") :]
    asked = asked[: asked.index("--overwrite_output_dir") + 2]
    places = {"$OUTPUT": tmp_path / "adapter", "$DATA/heldout.jsonl": heldout, "$OUTPUT/evaluation": tmp_path / "e"}
    given = [str(places.get(word, word)) for word in asked]
    given += ["--train_type", "lora", "--precision", "fp32", "--model_name", str(tmp_path / "model")]
    for mark, code in (("0.5", 0), ("0.8", 1)):
        given[given.index("--at_least") + 1] = mark
        assert fsdp_qlora_command(given) == code
        printed = capsys.readouterr().out
        assert "right:    hello\nadapter:  yellow\nbase:     yellow\n" in printed
        assert printed.count("1 of 2, 50.0%") == 2


def says_always(tokenizer: PreTrainedTokenizerFast, answer: str) -> LlamaForCausalLM:
    """A model whose layers do nothing and whose head leads from the prompt's last token to `answer` and its end."""
    shape = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape))
    path = tokenizer("\n" + answer)["input_ids"] + [tokenizer.eos_token_id]
    assert len(set(path)) == len(path)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairwise(path):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[token]
    return model


def test_quickstart_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    ran = subprocess.run(
        [LAUNCH / "quickstart.sh"], env={"PYTHON": str(old), "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert ran.returncode == 2
    assert b"Python 3.9.1 is too old, 3.11 or newer is needed" in ran.stderr


def test_what_the_quickstart_sets_itself_is_refused_before_anything_is_installed() -> None:
    train = (
        next(line for line in QUICKSTART.split("\n\n") if "torchrun" in line).replace("\\\n", "").split("train.py")[1]
    )
    set_here = [word for word in shlex.split(train) if word.startswith("--")]
    assert "--output_dir" in set_here
    for option in [*set_here, "--output-dir=mine"]:
        ran = subprocess.run(
            [LAUNCH / "quickstart.sh", "--num_epochs", "2", option],
            env={"PYTHON": "/nowhere", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == (
            f"launch/quickstart.sh: {option.split('=')[0]} is set here already; omit it, or start train.py yourself\n"
        )
