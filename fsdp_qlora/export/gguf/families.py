"""Families of models that llama.cpp has: its name of each, and what it wants otherwise than transformers has it.

Facts from llama.cpp, conversion/*.py and src/llama-model.cpp, October 2026. What its graph of a family fixes (a pattern
of sliding windows, a scale of attention) is compared with the config and refused where it differs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError

# Layers of the two Gemmas of 27B, whose attention llama.cpp scales by hidden size over heads.
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a family.

    arch: in `gguf.MODEL_ARCH`. permutes: rows of q and k are in pairs that RoPE turns, not in halves. norm_shift: added
    to the norms' weights. check: raises UserError for a config that its graph does not compute. extra: tensors that are
    not in a checkpoint, by their names in GGUF. tied: the head is always the embedding."""

    arch: str
    permutes: bool = False
    norm_shift: float = 0.0
    check: Callable[[Any], None] = lambda config: None
    extra: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    tied: bool = False


def family_of(config: Any) -> Family:
    """Return the family of a text model's config. Raises UserError for what is not known to run there."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model_name: a {config.model_type} model is not written as GGUF here; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    rope_type = rope_of(config).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UserError(f"model_name: rotary positions of type {rope_type} are not written as GGUF here")
    family.check(config)
    return family


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of full attention."""
    rope = dict(config.rope_parameters or {})
    return dict(rope.get("full_attention", rope))


def head_dim_of(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Return rows of q or k (a weight, a bias, a B of an adapter) with each head's two halves interleaved."""
    size = rows.shape[0] // heads
    return rows.view(heads, 2, size // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def heads_permuted(name: str, family: Family, config: Any) -> int:
    """Return the number of heads in which the rows of a tensor of that name are permuted, 0 where they are not."""
    if not family.permutes:
        return 0
    kinds = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((int(heads) for kind, heads in kinds.items() if f".{kind}." in name), 0)


def _llama3_frequencies(config: Any) -> dict[str, Tensor]:
    """Return what Llama 3's scaling divides each rotary frequency by."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return {}
    dims, base, factor = head_dim_of(config), rope["rope_theta"], rope["factor"]
    wavelengths = 2 * math.pi * base ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    context = rope["original_max_position_embeddings"]
    low, high = context / rope["low_freq_factor"], context / rope["high_freq_factor"]
    smooth = (context / wavelengths - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths < high, 1.0, torch.where(wavelengths > low, factor, between))
    return {"rope_freqs.weight": factors.float()}


def _long_frequencies(config: Any) -> dict[str, Tensor]:
    rope = rope_of(config)
    if not rope.get("long_factor"):
        return {}
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
    }


def _no_windows(config: Any) -> None:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError(f"model_name: llama.cpp has no sliding windows for {config.model_type}, which this model uses")


def _gemma(config: Any) -> None:
    """Check windows, each sixth layer (Gemma 2: each second) without one, and the scale of attention."""
    every = 2 if config.model_type == "gemma2" else 6
    layers = config.num_hidden_layers
    fixed = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if list(config.layer_types) != fixed:
        raise UserError(f"model_name: llama.cpp gives each {every}th layer full attention, which this model does not")
    by_heads = GEMMA_27B[config.model_type] == layers
    fixed_scale = config.hidden_size // config.num_attention_heads if by_heads else config.head_dim
    if config.query_pre_attn_scalar != fixed_scale:
        raise UserError(
            f"model_name: llama.cpp scales attention by {fixed_scale} here and the config.json by "
            f"{config.query_pre_attn_scalar}"
        )
    if config.model_type == "gemma3_text" and getattr(config, "attn_logit_softcapping", None):
        raise UserError("model_name: llama.cpp has no softcap of attention for Gemma 3")


ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")
LLAMA = Family("LLAMA", permutes=True, extra=_llama3_frequencies)
# By model type of the text part's config.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("QWEN2", check=_no_windows),
    "qwen3": Family("QWEN3", check=_no_windows),
    "gemma": Family("GEMMA", norm_shift=1.0, tied=True),
    "gemma2": Family("GEMMA2", norm_shift=1.0, check=_gemma, tied=True),
    "gemma3_text": Family("GEMMA3", norm_shift=1.0, check=_gemma, tied=True),
    "phi3": Family("PHI3", extra=_long_frequencies),
}
