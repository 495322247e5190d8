"""Families of models that llama.cpp has: its name of each, and what it wants otherwise than transformers has it.

Facts from llama.cpp, conversion/*.py and src/llama-model.cpp, October 2026. What its graph of a family fixes (a pattern
of sliding windows, a scale of attention) is compared with the config and refused where it differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fsdp_qlora.errors import UserError
from fsdp_qlora.export.gguf.rope import check_rope, llama3_frequencies, long_frequencies

# Layers of the two Gemmas of 27B, whose attention llama.cpp scales by hidden size over heads.
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a family.

    arch: in `gguf.MODEL_ARCH`. permutes: rows of q and k are in pairs that RoPE turns, not in halves. norm_shift: added
    to the norms' weights. check: raises UserError for a config that its graph does not compute. extra: tensors that are
    not in a checkpoint, by their names in GGUF. tied: the head is always the embedding. ropes: types of rotary
    positions. activations: names of the one of its MLP."""

    arch: str
    permutes: bool = False
    norm_shift: float = 0.0
    check: Callable[[Any], None] = lambda config: None
    extra: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    tied: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    activations: tuple[str, ...] = ("silu", "swish")


def family_of(config: Any) -> Family:
    """Return the family of a text model's config. Raises UserError for what is not known to run there."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model_name: a {config.model_type} model is not written as GGUF here; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    check_rope(config, family.ropes)
    renamed = config.model_type in ("gemma2", "gemma3_text")  # Gemma 1 computes what it has as hidden_act
    activation = config.hidden_activation if renamed else config.hidden_act
    if activation not in family.activations:
        raise UserError(
            f"model_name: llama.cpp computes {family.activations[0]} for {config.model_type}, and this model "
            f"{activation}"
        )
    family.check(config)
    return family


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


def _no_windows(config: Any) -> None:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError(f"model_name: llama.cpp has no sliding windows for {config.model_type}, which this model uses")


def _no_biases(config: Any) -> None:
    if getattr(config, "attention_bias", False):
        raise UserError(
            f"model_name: llama.cpp has no biases of attention for {config.model_type}, which this model has; it would "
            "not open the file"
        )


def _qwen3(config: Any) -> None:
    _no_windows(config)
    _no_biases(config)


def _gemma(config: Any) -> None:
    """Check windows, each sixth layer (Gemma 2: each second) without one, and the scale of attention."""
    _no_biases(config)
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
    if config.model_type == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        raise UserError(
            "model_name: llama.cpp always softcaps attention and logits of Gemma 2, which this model does not"
        )


GELU = ("gelu_pytorch_tanh", "gelu_new")
LLAMA = Family("LLAMA", permutes=True, extra=llama3_frequencies, ropes=("default", "linear", "yarn", "llama3"))
_GEMMA = Family("GEMMA", norm_shift=1.0, check=_no_biases, tied=True, ropes=("default",), activations=GELU)
# By model type of the text part's config.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("QWEN2", check=_no_windows),
    "qwen3": Family("QWEN3", check=_qwen3),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, arch="GEMMA2", check=_gemma),
    "gemma3_text": replace(_GEMMA, arch="GEMMA3", check=_gemma, ropes=("default", "linear")),
    "phi3": Family("PHI3", extra=long_frequencies, ropes=("default", "longrope")),
}
