"""Vision-language models: the text part trains from the command line, and PEFT opens the adapter on the wrapper."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.test_variants import WRAPPERS
from tests.support import plain, tiny
from tests.support.built import built
from tests.support.runs import run_alone

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"dataset": "dummy", "train_type": "lora", "precision": "fp32", "context_length": 32, "lora_rank": 4}
RUN = {"lr": 0.05, "max_steps": 2, "dataset_samples": 4, "lr_scheduler": "constant"}
# Older names of the parts: new -> old
OLD = {
    "gemma3": [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.")],
    "llava": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
    "qwen2_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
}


def wrapper(name: str, folder: Path) -> Path:
    return tiny.save_model(WRAPPERS[name][0](), folder)


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_peft_opens_the_adapter_on_the_wrapper(name, tmp_path):
    folder = wrapper(name, tmp_path / "model")
    run = run_alone(OPTIONS | RUN | {"model_name": folder}, tmp_path / "out")
    ids = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(1))
    base = plain.auto_class(folder).from_pretrained(folder, dtype=torch.float32)
    without = logits(base, ids)
    opened = PeftModel.from_pretrained(base, run.folder)
    adapted = {path for path, module in opened.named_modules() if hasattr(module, "lora_A")}
    saved = {key.removesuffix(".lora_A.weight") for key in run.tensors if key.endswith(".lora_A.weight")}
    assert adapted == saved, "PEFT adapts other linears than were trained (the vision tower's have the same names)"
    assert len(saved) == 3 * len({path.rsplit(".", 1)[-1] for path in saved})
    with_adapter = logits(opened, ids)
    assert (with_adapter - without).abs().max() > 0.1
    with built(OPTIONS | {"model_name": folder}) as ours:
        prefix, suffix = "base_model.model.", ".weight"
        ours.adapters.load({n.removeprefix(prefix).removesuffix(suffix): t for n, t in run.tensors.items()})
        torch.testing.assert_close(ours.logits(ids), with_adapter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OLD)
def test_a_wrappers_older_names_are_read(name, tmp_path):
    held = []
    for old in (False, True):
        folder = wrapper(name, tmp_path / str(old))
        state = plain.auto_class(folder).from_pretrained(folder).state_dict()
        tensors = {key: tensor.clone() for key, tensor in state.items() if key != "lm_head.weight" or name != "gemma3"}
        for new, older in OLD[name] if old else []:
            tensors = {older + k.removeprefix(new) if k.startswith(new) else k: t for k, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert any("language_model.layers" in key for key in load_file(folder / "model.safetensors")) == (not old)
        with built(OPTIONS | {"model_name": folder}) as ours:
            held.append({unit.name: unit.frozen.flat.detach().view(torch.uint8).clone() for unit in ours.model.units})
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][unit], held[1][unit]) for unit in held[0])


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all"])
def test_the_vision_tower_is_neither_read_nor_adapted(targets, tmp_path, capsys):
    folder = wrapper("llava", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.full_like(t, torch.nan) for name, t in tensors.items() if "vision" in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = run_alone(OPTIONS | RUN | {"model_name": folder, "lora_target_modules": targets}, tmp_path / "out")
    assert all("language_model.layers" in key for key in run.tensors)
    assert "only the text part of LlavaForConditionalGeneration trains" in capsys.readouterr().out
