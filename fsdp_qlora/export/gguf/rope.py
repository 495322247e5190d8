"""Rotary positions as llama.cpp turns them: of which type for each family, and the frequencies that it reads."""

import math
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.errors import UserError

CLOSE = 1e-6  # relative, of two scales of attention that are the same


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of full attention."""
    rope = dict(config.rope_parameters or {})
    return dict(rope.get("full_attention", rope))


def head_dim_of(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_rope(config: Any, allowed: tuple[str, ...]) -> None:
    """Raise UserError for rotary positions that llama.cpp would turn otherwise. allowed: the family's types."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    local = (config.rope_parameters or {}).get("sliding_attention") or {}
    if kind not in allowed or local.get("rope_type", "default") != "default":
        raise UserError(
            f"model_name: rotary positions of type {kind if kind not in allowed else local['rope_type']} are not "
            f"written as GGUF for {config.model_type} here"
        )
    if kind == "yarn":
        _check_yarn(rope)
    if kind == "longrope":
        _check_longrope(rope, config)


def long_scale(factor: float, context: float) -> float:
    """Return what longrope multiplies cosines and sines by, beyond the original context."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def llama3_frequencies(config: Any) -> dict[str, Tensor]:
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


def long_frequencies(config: Any) -> dict[str, Tensor]:
    rope = rope_of(config)
    if not rope.get("long_factor"):
        return {}
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
    }


def _check_yarn(rope: dict[str, Any]) -> None:
    """Compare the scale of attention with llama.cpp's, 1 + ln(factor) / 10, and how the range's ends are rounded."""
    factor = rope.get("factor")
    if not factor:
        raise UserError("model_name: its yarn positions have no factor, which llama.cpp reads")
    part = [_yarn_scale(factor, rope.get(name) or 1.0) for name in ("mscale", "mscale_all_dim")]
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    scale = rope.get("attention_factor") or (part[0] / part[1] if both else _yarn_scale(factor, 1.0))
    _check_scale("yarn", scale, _yarn_scale(factor, 1.0))
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if (fast, slow) != (32, 1):  # for no family here are a file's own read
        raise UserError(
            f"model_name: llama.cpp has yarn positions with beta_fast 32 and beta_slow 1 only, and the model has "
            f"{fast:g} and {slow:g}"
        )
    if rope.get("truncate", True) is not True:
        raise UserError("model_name: llama.cpp has yarn positions with truncate true only")


def _check_longrope(rope: dict[str, Any], config: Any) -> None:
    context = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if not context or any(name in rope for name in ("short_mscale", "long_mscale")):
        raise UserError("model_name: llama.cpp has no form of its longrope positions (mscale, or no original context)")
    fixed = long_scale(config.max_position_embeddings / context, context)
    own = long_scale(rope["factor"], context) if rope.get("factor") else fixed
    _check_scale("longrope", rope.get("attention_factor") or own, fixed)


def _check_scale(kind: str, scale: float, fixed: float) -> None:
    if not math.isclose(scale, fixed, rel_tol=CLOSE):
        raise UserError(
            f"model_name: llama.cpp scales {kind} attention by {fixed:.6g} here and the model by {scale:.6g}"
        )


def _yarn_scale(factor: float, by: float) -> float:
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
