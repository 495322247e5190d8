"""A model's numbers under GGUF's keys."""

import re
from typing import Any

import gguf

from fsdp_qlora.export.gguf.families import Family
from fsdp_qlora.export.gguf.rope import head_dim_of, long_scale, rope_of

PHI3 = re.compile("phi-?3", re.IGNORECASE)
ROPE_SCALINGS = {
    "linear": gguf.RopeScalingType.LINEAR,
    "yarn": gguf.RopeScalingType.YARN,
    "longrope": gguf.RopeScalingType.LONGROPE,
}


def add_metadata(writer: gguf.GGUFWriter, config: Any, family: Family, name: str, file_type: int) -> None:
    """Add what llama.cpp reads of a model beside tensors and vocabulary. config: of the text model."""
    heads, size = config.num_attention_heads, head_dim_of(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config, size)
    if family.arch in ("GEMMA2", "GEMMA3", "PHI3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if family.arch == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def general_name(name: str, strips: bool) -> str:
    """Return a model's name by which llama.cpp strips white space behind special tokens, or by which it does not.

    It does where the name has phi-3 or phi3 in it (src/llama-vocab.cpp); the file has no other word on it."""
    if strips:
        return name if PHI3.search(name) else f"phi-3 {name}"
    return PHI3.sub("Phi 3", name)


def _add_rope(writer: gguf.GGUFWriter, config: Any, size: int) -> None:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * size))
    local = (config.rope_parameters or {}).get("sliding_attention")
    if isinstance(local, dict):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind not in ROPE_SCALINGS:
        return
    writer.add_rope_scaling_type(ROPE_SCALINGS[kind])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    context = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(context or config.max_position_embeddings)
    if kind == "longrope" and context:
        writer.add_rope_scaling_attn_factors(long_scale(config.max_position_embeddings / context, context))
