"""Shapes, biases, tied heads, scaled rotary positions and wrappers of many families: loss and gradients are PEFT's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig

from tests.support import tiny
from tests.support.as_peft import assert_trains_as_peft
from tests.support.tiers import some_slow

TIED = {"tie_word_embeddings": True}
ODD = {"hidden_size": 96, "intermediate_size": 208, "head_dim": 20, "vocab_size": 277}
ONE_KEY_HEAD = {"num_key_value_heads": 1}
ALL_KEY_HEADS = {"num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True}
DROPLESS = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def rope(kind: str, **settings: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | settings}


LINEAR = rope("linear", factor=4.0)
DYNAMIC = rope("dynamic", factor=4.0)  # of all lengths here as unscaled
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
LONG = rope(
    "longrope",
    short_factor=[1.0 + i / 8 for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=32,
    factor=8.0,
)
SECTIONS = rope("default", mrope_section=[2, 3, 3])

# name -> (family, what its config says beyond tiny.SHAPE, blocks that run fused)
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", {}, 3),
    "llama-tied": ("Llama", TIED, 3),
    "llama-biases": ("Llama", BIASES, 3),
    "llama-odd": ("Llama", ODD, 3),
    "llama-mqa-tied": ("Llama", ONE_KEY_HEAD | TIED, 3),
    "llama-mha": ("Llama", ALL_KEY_HEADS, 3),
    "llama-linear": ("Llama", LINEAR, 3),
    "llama-dynamic": ("Llama", DYNAMIC, 3),
    "llama-yarn": ("Llama", YARN, 3),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}, 3),
    "llama-one-layer": ("Llama", {"num_hidden_layers": 1}, 1),
    "mistral-odd": ("Mistral", ODD | {"sliding_window": 7}, 3),
    "ministral": ("Ministral", {"head_dim": 16, "sliding_window": 16}, 0),
    "ministral3": ("Ministral3", {}, 0),
    "qwen2-tied": ("Qwen2", TIED, 3),
    "qwen2-mqa-yarn": ("Qwen2", ONE_KEY_HEAD | YARN, 3),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 3),
    "qwen3-tied-odd": ("Qwen3", ODD | TIED, 3),
    "qwen3-biases": ("Qwen3", {"attention_bias": True, "head_dim": 16}, 3),
    "gemma-odd": ("Gemma", ODD | TIED, 3),
    "gemma2-untied": ("Gemma2", {"head_dim": 16}, 3),
    "gemma3-linear": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, **TIED}, 3),
    "vaultgemma": ("VaultGemma", {"head_dim": 16} | TIED, 0),
    "gemma4": ("Gemma4Text", {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0} | TIED, 0),
    "gemma4-layer-inputs": (
        "Gemma4Text",
        {"head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264} | TIED,
        0,
    ),
    "phi3-longrope": ("Phi3", LONG, 3),
    "phi3-tied-mqa": ("Phi3", TIED | ONE_KEY_HEAD, 3),
    "phi-layernorms": ("Phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5} | ALL_KEY_HEADS, 0),
    "smollm3": ("SmolLM3", TIED, 0),
    "olmo": ("Olmo", {"clip_qkv": 2.0}, 0),
    "olmo2": ("Olmo2", {}, 0),
    "olmo3": ("Olmo3", {"sliding_window": 16}, 0),
    "gpt-neox": ("GPTNeoX", DROPLESS | {"rotary_pct": 0.5}, 0),
    "gpt-neox-serial": ("GPTNeoX", DROPLESS | {"use_parallel_residual": False, "attention_bias": False}, 0),
    "gpt-neo": ("GPTNeo", {"attention_types": [[["global", "local", "global"], 1]], "num_layers": 3}, 0),
    "gpt-j": ("GPTJ", DROPLESS | {"rotary_dim": 8}, 0),
    "gpt-bigcode": ("GPTBigCode", DROPLESS | TIED, 0),
    "codegen": ("CodeGen", DROPLESS | {"rotary_dim": 8}, 0),
    "falcon": ("Falcon", TIED | DROPLESS, 0),
    "falcon-new": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2} | DROPLESS, 0),
    "falcon-alibi": ("Falcon", {"alibi": True, "bias": True, "multi_query": False} | DROPLESS, 0),
    "mpt": ("Mpt", {}, 0),
    "opt": ("OPT", {"ffn_dim": 96, "dropout": 0.0} | TIED, 0),
    "opt-projected": ("OPT", {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "dropout": 0.0} | TIED, 0),
    "command-r-plus": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.25} | TIED, 0),
    "command-r7b": ("Cohere2", {"sliding_window": 16} | TIED, 0),
    "exaone": ("Exaone", {}, 3),
    "exaone4": ("Exaone4", {"sliding_window": 16}, 0),
    "apertus": ("Apertus", {}, 0),
    "nemotron": ("Nemotron", {"head_dim": 16}, 0),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "qk_layernorm": True}, 0),
    "starcoder2": ("Starcoder2", TIED | {"sliding_window": 16}, 0),
    "glm4": ("Glm4", {"head_dim": 16}, 0),
    "seed-oss": ("SeedOss", {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0}, 0),
    "granite-tied": ("Granite", TIED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}, 0),
    "minicpm3": ("MiniCPM3", ALL_KEY_HEADS | TIED, 0),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}, 0),
    "ernie4_5": ("Ernie4_5", TIED, 0),
    "internlm3": ("InternLM3", {}, 3),
    "bitnet": ("BitNet", {}, 0),
}

EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,  # as many as the text model's
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYES = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64}


def text(family: str, **more: object) -> dict[str, Any]:
    """The config of a text part, as config.json has it."""
    config: dict[str, Any] = getattr(transformers, f"{family}Config")(**tiny.SHAPE | more).to_dict()
    return config


# name -> (its config, blocks that run fused)
WRAPPERS: dict[str, tuple[Callable[[], PretrainedConfig], int]] = {
    "gemma3": (
        lambda: transformers.Gemma3Config(
            text_config=text("Gemma3Text", head_dim=16, sliding_window=16, **TIED),
            vision_config=EYES,
            mm_tokens_per_image=4,
        ),
        3,
    ),
    "mistral3": (
        lambda: transformers.Mistral3Config(
            text_config=text("Mistral", head_dim=16), vision_config=EYES | {"model_type": "pixtral"}
        ),
        3,
    ),
    "llava": (lambda: transformers.LlavaConfig(text_config=text("Llama"), vision_config=EYES), 3),
    "llava_next": (lambda: transformers.LlavaNextConfig(text_config=text("Mistral"), vision_config=EYES), 3),
    "qwen2_vl": (
        lambda: transformers.Qwen2VLConfig(
            text_config=tiny.SHAPE | SECTIONS,
            vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        ),
        0,
    ),
    "qwen2_5_vl": (
        lambda: transformers.Qwen2_5_VLConfig(text_config=tiny.SHAPE | SECTIONS, vision_config=QWEN_EYES),
        0,
    ),
    "qwen3_vl": (
        lambda: transformers.Qwen3VLConfig(
            text_config=tiny.SHAPE | SECTIONS | {"head_dim": 16},
            vision_config=QWEN_EYES | {"deepstack_visual_indexes": [0]},
        ),
        0,
    ),
    "internvl": (
        lambda: transformers.InternVLConfig(
            text_config=text("Qwen2"), vision_config=EYES | {"image_size": [28, 28], "patch_size": [14, 14]}
        ),
        3,
    ),
    "idefics3": (lambda: transformers.Idefics3Config(text_config=text("Llama"), vision_config=EYES), 3),
    "smolvlm": (lambda: transformers.SmolVLMConfig(text_config=text("Llama"), vision_config=EYES), 3),
}


def train_type_of(name: str) -> str:
    """Half of the variants over a plain base, half over NF4, in turn."""
    return ("lora", "qlora")[[*VARIANTS, *WRAPPERS].index(name) % 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_as_under_peft(name: str, tmp_path: Path, one_thread: None) -> None:
    family, more, fused = VARIANTS[name]
    config = getattr(transformers, f"{family}Config")(**tiny.SHAPE | more)
    tiny.save_model(config, tmp_path)
    # Falcon's alibi is scaled in another way by transformers' eager attention than by its default.
    fusion = assert_trains_as_peft(tmp_path, train_type_of(name), None if name == "falcon-alibi" else "eager")
    assert fusion.blocks == fused, str(fusion)


@pytest.mark.parametrize("name", some_slow(WRAPPERS, 3))
def test_the_text_part_of_a_wrapper_trains_as_under_peft(name: str, tmp_path: Path, one_thread: None) -> None:
    config, fused = WRAPPERS[name]
    tiny.save_model(config(), tmp_path)
    fusion = assert_trains_as_peft(tmp_path, train_type_of(name))
    assert fusion.blocks == fused, str(fusion)


def test_there_are_enough_of_them() -> None:
    assert len(VARIANTS) + len(WRAPPERS) >= 54
