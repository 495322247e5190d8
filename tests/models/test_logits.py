"""Logits: what a family's own forward does to them is done here, whatever fields its config has; else it is refused."""

import pytest
import torch
import transformers

from fsdp_qlora.errors import UserError
from fsdp_qlora.models.precision import MODES
from fsdp_qlora.models.skeleton import build, logit_shape
from tests.support import tiny
from tests.support.as_peft import assert_trains_as_peft
from tests.support.built import built

OF_OTHERS = {"logit_scale": 0.3, "logits_scaling": 3.0, "final_logit_softcapping": 2.0}
TIED = {"tie_word_embeddings": True}

# family -> (what its config says, factor, softcap)
SHAPES: dict[str, tuple[dict, float, float | None]] = {
    "Llama": (OF_OTHERS, 1.0, None),
    "Cohere": ({"logit_scale": 0.3, "logits_scaling": 3.0, **TIED}, 0.3, None),
    "Granite": ({"logits_scaling": 3.0}, 1 / 3, None),
    "HyperCLOVAX": ({"logits_scaling": 3.0}, 3.0, None),
    "MiniCPM3": ({"dim_model_base": 32, "num_key_value_heads": 4}, 0.5, None),
    "Gemma2": ({"final_logit_softcapping": 30.0, "logit_scale": 0.3}, 1.0, 30.0),
    "Gemma3Text": ({"final_logit_softcapping": None}, 1.0, None),
}
NOT_LINEAR = {
    "ModernBertDecoder": {},
    "Bert": {"is_decoder": True},
    "Electra": {"is_decoder": True, "embedding_size": 64},
}


def config_of(family: str, more: dict) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{family}Config")(**tiny.SHAPE | more)


@pytest.mark.parametrize("family", SHAPES)
def test_factor_and_softcap_are_those_that_the_family_applies(family):
    more, factor, softcap = SHAPES[family]
    model = build(config_of(family, more), MODES["fp32"], "eager")
    modules = dict(model.named_modules())
    assert logit_shape(model) == (factor, softcap)
    assert dict(model.named_modules()) == modules, "the model is as it was"
    assert not any("forward" in vars(module) for module in modules.values())


def test_a_forward_that_changes_logits_in_a_way_of_its_own_is_refused(monkeypatch):
    own = transformers.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = out.logits + out.logits.square() * 1e-3
        return out

    model = build(config_of("Llama", {}), MODES["fp32"], "eager")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(UserError, match="LlamaForCausalLM has more than a linear"):
        logit_shape(model)


@pytest.mark.parametrize("family", ["Llama", pytest.param("HyperCLOVAX", marks=pytest.mark.slow)])
def test_fields_of_other_families_change_nothing(family, tmp_path):
    tiny.save_model(config_of(family, SHAPES[family][0]), tmp_path)
    assert_trains_as_peft(tmp_path)


@pytest.mark.parametrize("family", NOT_LINEAR)
def test_weights_between_layers_and_head_are_refused_and_not_left_out(family, tmp_path):
    folder = tiny.save_model(config_of(family, NOT_LINEAR[family]), tmp_path, torch.float32)
    options = {"model_name": folder, "dataset": "dummy"}
    with pytest.raises(UserError, match="between its decoder layers and its logits") as error, built(options):
        pass
    assert str(error.value).startswith("model_name: ")
    assert "\n" not in str(error.value)
