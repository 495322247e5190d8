"""Every field of a fused family's config: a model with another value of it trains as under transformers and PEFT.

A field that a later transformers brings is in none of these tables, and fails here until someone has looked at it."""

from pathlib import Path

import pytest
import transformers

from tests.support import tiny
from tests.support.as_peft import assert_trains_as_peft
from tests.support.tiers import some_slow

FUSED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi3")
KINDS = ["full_attention", "sliding_attention", "full_attention"]
ROPE = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + i / 8 for i in range(4)],
    "long_factor": [2.0 + i for i in range(4)],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
}

# field -> another value, in what else that needs, beyond tiny.SHAPE
OTHERS: dict[str, dict] = {
    "vocab_size": {"vocab_size": 301},
    "hidden_size": {"hidden_size": 96},
    "intermediate_size": {"intermediate_size": 80},
    "num_hidden_layers": {"num_hidden_layers": 1},
    "num_attention_heads": {"num_attention_heads": 2},
    "num_key_value_heads": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "hidden_act": {"hidden_act": "gelu_new"},
    "hidden_activation": {"hidden_activation": "silu"},
    "max_position_embeddings": {"max_position_embeddings": 64},
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "rope_parameters": {"rope_parameters": ROPE},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "sliding_window": {"sliding_window": 5},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "layer_types": {"layer_types": KINDS, "sliding_window": 5, "use_sliding_window": True},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 7},
    "attn_logit_softcapping": {"attn_logit_softcapping": 0.5},
    "final_logit_softcapping": {"final_logit_softcapping": 0.5},
    # Other values are refused (tests/weights/test_checkpoint_config.py) or not fused (test_fused.py).
    "use_bidirectional_attention": {"use_bidirectional_attention": False},
    "attention_dropout": {"attention_dropout": 0.0},
    "resid_pdrop": {"resid_pdrop": 0.0},
    # Read by no forward.
    "initializer_range": {"initializer_range": 0.2},
    "pretraining_tp": {"pretraining_tp": 2},
    "embd_pdrop": {"embd_pdrop": 0.5},
    "use_cache": {"use_cache": False},
    "pad_token_id": {"pad_token_id": 7},
    "bos_token_id": {"bos_token_id": 7},
    "eos_token_id": {"eos_token_id": 7},
    "original_max_position_embeddings": {"original_max_position_embeddings": 16},
    # Of all configs.
    "output_hidden_states": {"output_hidden_states": True},
    "chunk_size_feed_forward": {"chunk_size_feed_forward": 8},
}
OF_ALL = ("output_hidden_states", "chunk_size_feed_forward")
OF_FAMILY = {
    ("Gemma3Text", "rope_parameters"): {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    ("Phi3", "rope_parameters"): {"rope_parameters": LONG},
    ("Phi3", "original_max_position_embeddings"): {
        "original_max_position_embeddings": 16,
        "rope_parameters": {name: value for name, value in LONG.items() if name != "original_max_position_embeddings"},
    },
}


def fields_of(family: str) -> list[str]:
    """Return the fields that a family's config adds to those of all configs, and some of these."""
    config = getattr(transformers, f"{family}Config")
    return [name for name in config.__dataclass_fields__ if name not in BASE or name in OF_ALL]


BASE = set(transformers.PretrainedConfig.__dataclass_fields__)
CASES = [f"{family}.{field}" for family in FUSED for field in fields_of(family)]


@pytest.mark.parametrize("case", some_slow(CASES, 24))
def test_a_model_with_another_value_of_a_field_trains_as_under_peft(case: str, tmp_path: Path) -> None:
    family, field = case.split(".")
    assert field in OTHERS, f"{family} has a field that no test knows: does it change what a fused block computes?"
    kind = getattr(transformers, f"{family}Config")
    usual = {"head_dim": 16} if "head_dim" in kind.__dataclass_fields__ else {}
    other = OF_FAMILY.get((family, field), OTHERS[field])
    tiny.save_model(kind(**tiny.SHAPE | usual | other), tmp_path)
    fusion = assert_trains_as_peft(tmp_path, "lora")
    assert fusion.blocks > 0, str(fusion)
