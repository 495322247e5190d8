"""Decoder-only families of Hugging Face: our loss and adapter gradients equal those of the same model under PEFT."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from fsdp_qlora.errors import UserError
from fsdp_qlora.models.generic_block import _drops
from tests.support import tiny
from tests.support.as_peft import assert_trains_as_peft
from tests.support.built import built

SLIDING = {"sliding_window": 16}  # shorter than the rows, so that a mask too many or too few is seen
KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# name -> what its config says beyond tiny.SHAPE
FAMILIES: dict[str, dict] = {
    "Llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "Mistral": SLIDING,
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Gemma": {"head_dim": 24, "tie_word_embeddings": True},
    "Gemma2": SLIDING | KINDS | {"head_dim": 24, "tie_word_embeddings": True, "query_pre_attn_scalar": 24,
                                 "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": SLIDING | KINDS | {"head_dim": 24, "tie_word_embeddings": True, "query_pre_attn_scalar": 24},
    "Phi3": SLIDING,
    "Phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "Granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "Cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "Bloom": {"tie_word_embeddings": True},
    "Persimmon": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
}  # fmt: skip
GENERIC = ("Phi", "Granite", "Cohere", "Bloom", "Persimmon")  # have no fused block

EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
REFUSED: dict[str, tuple[dict, str]] = {
    "Mixtral": (EXPERTS | {"num_local_experts": 4}, r"mlp\..*mixture of experts"),
    "Qwen3Moe": (EXPERTS | {"num_experts": 4, "head_dim": 16}, r"mlp\..*mixture of experts"),
    "GPT2": ({"n_layer": 2, "n_embd": 64, "n_head": 4}, r"Conv1D"),
}


def config_of(family: str, more: dict) -> PretrainedConfig:
    return getattr(transformers, f"{family}Config")(**tiny.SHAPE | more)


SLOW = {name: [pytest.mark.slow] for name in GENERIC[1:]}  # one of them is enough every day


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, [])) for name in FAMILIES])
def family(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, tiny.save_model(config_of(request.param, FAMILIES[request.param]), folder)


@pytest.mark.parametrize(
    ("train_type", "fused"),
    [
        pytest.param("lora", "false", marks=pytest.mark.slow),
        pytest.param("qlora", "false", marks=pytest.mark.slow),
        ("qlora", "auto"),
    ],
)
def test_loss_and_gradients_are_those_of_hugging_face_and_peft(family, train_type, fused):
    name, folder = family
    fusion = assert_trains_as_peft(folder, train_type, fused=fused)
    assert fusion.blocks == (3 if fused == "auto" and name not in GENERIC else 0), str(fusion)


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_not_layers_of_plain_linears_is_refused_by_name(refused, tmp_path):
    more, named = REFUSED[refused]
    folder = tiny.save_model(config_of(refused, more), tmp_path)
    with pytest.raises(UserError, match=named) as error, built({"model_name": folder, "dataset": "dummy"}):
        pass
    assert str(error.value).startswith("model_name: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("drops", [0.0, 0.1])
@pytest.mark.parametrize("named", ["number", "module"])
def test_a_layers_own_dropout_is_seen_as_a_number_and_as_a_module(named, drops):
    layer = torch.nn.Module()
    layer.attention_dropout = drops if named == "number" else torch.nn.Dropout(drops)
    assert _drops(layer) == (drops > 0)
