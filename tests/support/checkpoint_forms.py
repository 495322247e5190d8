"""Small checkpoints changed by hand, and what transformers reads of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from tests.support import tiny
from tests.support.built import Built, built
from tests.support.runs import flags

OPTIONS = {"dataset": "dummy", "train_type": "lora", "precision": "fp32", "lora_rank": 2, "context_length": 32}
TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(folder: Path, **more: object) -> Path:
    return tiny.save_model(LlamaConfig(**tiny.SHAPE | more), folder)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a one-file checkpoint, or replace them where `change` returns others."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, file, metadata={"format": "pt"})


def pickled(folder: Path, **saving: Any) -> None:
    """Replace a checkpoint by a pytorch_model.bin of the same tensors, tied ones included as PyTorch keeps them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", **saving)
    (folder / "model.safetensors").unlink()


def frozen(ours: Built) -> dict[str, Tensor]:
    """Name in the model -> tensor, of everything that was read."""
    return {
        source: unit.frozen.decode(entry, torch.float32).clone()
        for unit in ours.model.units
        for entry, source in unit.sources.items()
    }


def assert_reads_what_transformers_reads(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    with built(OPTIONS | {"model_name": folder}) as ours:
        found = frozen(ours)
        if ours.model.is_tied():
            found[HEAD] = found[EMBEDDING]
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(found[name], tensor), name


def refused(folder: Path, capsys: pytest.CaptureFixture[str], about: str = "model_name", **options: object) -> str:
    """The one line that the program ends with."""
    code = train.main(flags(OPTIONS | {"model_name": folder, "output_dir": folder.parent / "out"} | options))
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if about in line]
    assert code == 2
    assert len(lines) == 1, said
    assert not any("Traceback" in line for line in said)
    return lines[0]
