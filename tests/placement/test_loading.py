"""Loading that ends before its time."""

import threading
import time
from typing import Any

import pytest
from transformers import LlamaConfig

from fsdp_qlora.errors import UserError
from fsdp_qlora.models.causal_lm import Unit
from fsdp_qlora.placement import load
from tests.support import tiny
from tests.support.built import built
from tests.support.runs import Options


def test_a_run_that_ends_while_it_loads_does_not_wait_for_the_disk(tmp_path, monkeypatch, capsys):
    """Nor does Ctrl-C, or a rank whose peer has ended."""
    answers, read = threading.Event(), load._read

    def reads_slowly(unit: Unit, *arguments: Any) -> Any:
        if unit.name != "model.embed_tokens":
            answers.wait(60)
        return read(unit, *arguments)

    def refuses(*arguments: object) -> None:
        raise UserError("model_name: this one is damaged")

    monkeypatch.setattr(load, "_read", reads_slowly)
    monkeypatch.setattr(load, "encode", refuses)
    options: Options = {
        "model_name": tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path / "model"), "dataset": "dummy",
        "precision": "fp32", "lora_rank": 2, "base_cache": "null",
    }  # fmt: skip
    start = time.monotonic()
    try:
        with pytest.raises(UserError, match="this one is damaged"), built(options):
            pass
        assert time.monotonic() - start < 30
    finally:
        answers.set()
