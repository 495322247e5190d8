"""Reads off a Hugging Face decoder layer what the fused block needs to know, or says why it cannot be fused.

Families differ in few things: extra norms, biases, projections stored as one, softcaps, windows. What a layer has is
read from its modules; the table below only says which classes are known to be nothing but these things.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor

# Class of the layer -> (its four norms in order of use, '' where there is none; 1 where they multiply by 1 + w).
PLAIN_NORMS = ("input_layernorm", "", "post_attention_layernorm", "")
FOUR_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, tuple[tuple[str, str, str, str], float]] = {
    "LlamaDecoderLayer": (PLAIN_NORMS, 0.0),
    "MistralDecoderLayer": (PLAIN_NORMS, 0.0),
    "Qwen2DecoderLayer": (PLAIN_NORMS, 0.0),
    "Qwen3DecoderLayer": (PLAIN_NORMS, 0.0),
    "Phi3DecoderLayer": (PLAIN_NORMS, 0.0),
    "GemmaDecoderLayer": (PLAIN_NORMS, 1.0),
    "Gemma2DecoderLayer": (FOUR_NORMS, 1.0),
    "Gemma3DecoderLayer": (FOUR_NORMS, 1.0),
}
# class of a layer's activation (its config's name for it may be in one field or another) -> the kernel's name for it
ACTIVATIONS = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["swish"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
    type(ACT2FN["gelu_new"]): "gelu_tanh",
}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: y = x / rms(x) * (weight + shift)."""

    weight: FrozenTensor
    eps: float
    shift: float


@dataclass(frozen=True)
class Anatomy:
    """A decoder layer taken apart. qkv and gate_up: a linear each, or one for all, their rows one below the other."""

    attention_norm: Norm
    attention_out_norm: Norm | None
    mlp_norm: Norm
    mlp_out_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: tuple[FrozenLinear, ...]
    o: FrozenLinear
    gate_up: tuple[FrozenLinear, ...]
    down: FrozenLinear
    heads: int
    kv_heads: int
    head_dim: int
    masking: Masking
    activation: str

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        """In the order in which they are used."""
        return (*self.qkv, self.o, *self.gate_up, self.down)


def eps_of(norm: Any) -> float:
    """What a family's RMSNorm adds to the mean square."""
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def recognise(layer: nn.Module, frozen: FrozenBytes) -> Anatomy | str:
    """The anatomy of a layer whose linears are frozen linears already, or why there is no fused block for it."""
    family = FAMILIES.get(type(layer).__name__)
    if family is None:
        return f"{type(layer).__name__} has no fused block"
    names, shift = family
    # Hugging Face's modules: torch takes any attribute of a module for a tensor or a module.
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    config = attention.config
    activation = type(mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn)
    if activation not in ACTIVATIONS:
        return f"activation {activation.__name__} has no kernel"
    if getattr(attention, "attention_dropout", 0.0) or any(m.p for m in layer.modules() if isinstance(m, nn.Dropout)):
        return "the base model has dropout of its own"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks both ways"

    def norm(name: str) -> Norm | None:
        if not name:
            return None
        return Norm(FrozenTensor(frozen, f"{name}.weight"), eps_of(layer.get_submodule(name)), shift)

    first, second, third, fourth = (norm(name) for name in names)
    assert first is not None
    assert third is not None
    has_head_norms = hasattr(attention, "q_norm")
    qkv = (
        (attention.qkv_proj,)
        if hasattr(attention, "qkv_proj")
        else (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window") and type(layer).__name__ in ("MistralDecoderLayer", "Phi3DecoderLayer"):
        window = getattr(config, "sliding_window", None)  # these give every layer the config's
    return Anatomy(
        attention_norm=first,
        attention_out_norm=second,
        mlp_norm=third,
        mlp_out_norm=fourth,
        q_norm=norm("self_attn.q_norm") if has_head_norms else None,
        k_norm=norm("self_attn.k_norm") if has_head_norms else None,
        qkv=qkv,
        o=attention.o_proj,
        gate_up=gate_up,
        down=mlp.down_proj,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        masking=Masking(float(attention.scaling), window, getattr(attention, "attn_logit_softcapping", None)),
        activation=ACTIVATIONS[activation],
    )
