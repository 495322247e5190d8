"""Faults of gguf: each is one line, before a weight is read where that can be known; no part of a file is left."""

import shutil

import pytest
from transformers import AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("cyllama")

from fsdp_qlora.export import merged
from tests.export.test_gguf import convert, llama, save_base
from tests.support.saved_adapters import save_random_adapter

__all__ = ["llama"]  # the fixture


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]  # behind a bar that is gone
    lines = [line for line in shown if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_disk_that_is_too_small_is_told_before_a_weight_is_read(llama, tmp_path, capsys, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real._replace(free=1000))
    monkeypatch.setattr(merged.Merged, "read", None)
    assert not convert(tmp_path / "g", 2, model_name=llama, quantization="f16")
    said = one_line(capsys)
    assert "has 0.00 GiB free and the file will take" in said
    assert "a smaller --quantization" in said


@pytest.mark.parametrize("more", [{}, {"lora_only": True}], ids=["merged", "alone"])
@pytest.mark.parametrize("shape", [{"hidden_size": 128}, {"num_hidden_layers": 1}], ids=["wider", "fewer"])
def test_an_adapter_of_another_base_is_one_line(shape, more, llama, tmp_path, capsys):
    adapter = save_random_adapter(tmp_path / "a", {"model_name": llama})
    other = save_base(tmp_path / "other", "Llama", **shape)
    capsys.readouterr()
    assert not convert(tmp_path / "g", 2, adapter=adapter, model_name=other, **more)
    assert f"adapter: {adapter} is of another model than {other}" in one_line(capsys)


def test_a_tokenizer_without_a_chat_template_is_noted(tmp_path, capsys):
    base = save_base(tmp_path / "b", "Llama", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    (file,) = convert(tmp_path / "g", model_name=base, quantization="f16")
    assert "note      the tokenizer has no chat template" in capsys.readouterr().out
    assert "TEMPLATE" not in file.with_name(f"{file.stem}.Modelfile").read_text()
