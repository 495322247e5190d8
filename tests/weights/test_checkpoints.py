"""Checkpoints as they come: quantized already by bitsandbytes, in several files, with a tied head."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from fsdp_qlora.errors import UserError
from tests.support import plain, tiny
from tests.support.built import built
from tests.support.runs import run_alone

OPTIONS = {"dataset": "dummy", "precision": "fp32", "lora_rank": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path_factory.mktemp("model"))


def quantized(model: Path, folder: Path, double_quant: bool) -> dict[str, torch.Tensor]:
    """A *-bnb-4bit checkpoint as transformers and bitsandbytes write one, then every code of it replaced by one of the
    inner eight: no block reaches its own scale then, so whoever decodes and encodes again is found out. Its tensors."""
    plain.load_quantized(model, plain.Recipe(double_quant=double_quant)).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if f"{name}.absmax" in tensors:
            high, low = torch.randint(4, 12, (2, *tensor.shape), generator=draw, dtype=torch.uint8)
            tensor.copy_(high * 16 + low)
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_checkpoint_is_taken_over_bit_for_bit(double_quant, model, tmp_path):
    tensors = quantized(model, tmp_path, double_quant)
    with built(OPTIONS | {"model_name": tmp_path, "double_quant": double_quant}) as ours:
        for name, linear in ours.model.linears().items():
            parts = {part: t.cpu() for part, t in linear.weight.home.parts(linear.weight.name).items()}
            found = {key.removeprefix(f"{name}.weight"): t for key, t in tensors.items() if key.startswith(f"{name}.w")}
            assert torch.equal(parts["codes"], found[""].view(-1))
            if double_quant:
                assert torch.equal(parts["absmax_q"], found[".absmax"])
                assert torch.equal(parts["nested_absmax"], found[".nested_absmax"])
                state = json.loads(bytes(found[".quant_state.bitsandbytes__nf4"].tolist()))
                assert parts["offset"].item() == torch.tensor(state["nested_offset"]).item()
            else:
                assert torch.equal(parts["absmax"], found[".absmax"])
        assert len(ours.model.linears()) == 21


def test_a_checkpoint_quantized_otherwise_than_asked_is_refused(model, tmp_path):
    quantized(model, tmp_path, double_quant=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(UserError, match="another form than bitsandbytes' NF4"),
        built(OPTIONS | {"model_name": tmp_path}),
    ):
        pass
    config["quantization_config"]["bnb_4bit_quant_type"] = "nf4"  # of which alone that is true
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(UserError, match="use --train_type qlora"),
        built(OPTIONS | {"model_name": tmp_path, "train_type": "lora"}),
    ):
        pass


@pytest.mark.slow
def test_a_quantized_checkpoint_trains_as_the_one_it_was_made_from(model, tmp_path):
    folder = tmp_path / "4bit"
    plain.load_quantized(model, plain.Recipe()).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    options = OPTIONS | {"dataset_samples": 8, "context_length": 32, "batch_size": 2, "lr": 1e-2}
    ready = run_alone(options | {"model_name": folder}, tmp_path / "ready")
    fresh = run_alone(options | {"model_name": model}, tmp_path / "fresh")
    assert len(fresh.losses) == 4
    assert ready.losses == fresh.losses


@pytest.mark.parametrize("tied", [False, True])
def test_several_files_are_as_good_as_one(tied, tmp_path):
    config = LlamaConfig(**tiny.SHAPE | {"tie_word_embeddings": tied})
    whole = tiny.save_model(config, tmp_path / "whole")
    split = tiny.save_model(config, tmp_path / "split", max_shard_size="60KB")
    assert len(list(split.glob("*.safetensors"))) > 3
    held = []
    for folder in (whole, split):
        with built(OPTIONS | {"model_name": folder}) as ours:
            assert ours.model.is_tied() == tied
            held.append({unit.name: unit.frozen.flat.detach().view(torch.uint8) for unit in ours.model.units})
    assert held[0].keys() == held[1].keys()
    assert len(held[0]) == (5 if tied else 6)
    for name, buffer in held[0].items():
        assert torch.equal(buffer, held[1][name]), name
