"""What a full disk leaves: whole files, and a message that says which of them are where."""

from pathlib import Path

import pytest
import torch

from fsdp_qlora.config.parse import parse
from fsdp_qlora.errors import TrainingStopped
from fsdp_qlora.export.peft import ADAPTER, save_adapter_somewhere
from tests.support.small_tokenizers import bytes_tokenizer

TENSORS = {"model.layers.0.q_proj.lora_A": torch.ones(2, 4), "model.layers.0.q_proj.lora_B": torch.ones(4, 2)}


def save(folder: Path, tokenizer) -> None:
    save_adapter_somewhere(folder, TENSORS, ["model.layers.0.q_proj"], parse(["--model_name", "m"]), tokenizer)


def test_a_tokenizer_that_is_cut_short_leaves_no_file_and_the_adapter_is_said_to_be_in_place(tmp_path, monkeypatch):
    tokenizer = bytes_tokenizer()
    save(tmp_path, tokenizer)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "tokenizer.json" in before
    assert ADAPTER in before

    def full(folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "tokenizer.json").write_text('{"version": "1.0", "trunc')
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(TrainingStopped) as stopped:
        save(tmp_path, tokenizer)
    assert str(stopped.value).startswith(
        f"output_dir: the adapter is saved in {tmp_path}, but its tokenizer could not be"
    )
    assert "instead" not in str(stopped.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
