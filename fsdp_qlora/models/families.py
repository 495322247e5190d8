"""Families of decoder layers that have a fused block, and how to read a block's spec off a layer of each.

Families differ in few things: extra norms, biases, projections stored as one, softcaps, windows. What a layer has is
read from its modules; the table says which classes are known to be nothing but these things.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.models.fused.spec import AttentionSpec, BlockSpec, GatedMlpSpec, Norm
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor

# class of a layer's activation (its config's name for it may be in one field or another) -> the kernel's name for it
ACTIVATIONS = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["swish"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
    type(ACT2FN["gelu_new"]): "gelu_tanh",
}
# Names of a layer's norms before and after attention, before and after the MLP.
PLAIN_NORMS = ("input_layernorm", "", "post_attention_layernorm", "")
FOUR_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class NotFusable(Exception):
    """No fused block computes what a layer does; the message says why."""


def recognise(layer: nn.Module, frozen: FrozenBytes) -> BlockSpec:
    """Return the spec of a layer whose linears are frozen linears already. Raises NotFusable."""
    family = FAMILIES.get(type(layer).__name__)
    if family is None:
        raise NotFusable(f"{type(layer).__name__} has no fused block")
    return family(layer, frozen)


def eps_of(norm: Any) -> float:
    """Return what a family's RMSNorm adds to the mean square."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def standard_layer(
    layer: nn.Module,
    frozen: FrozenBytes,
    *,
    norms: tuple[str, str, str, str] = PLAIN_NORMS,
    shift: float = 0.0,
    config_window: bool = False,
    softcaps: bool = True,
) -> BlockSpec:
    """Return the spec of a layer of self_attn and mlp. Raises NotFusable, and UserError for a window of no token.

    norms: names of its four norms in order of use, '' where there is none. shift: 1 where norms multiply by 1 + w.
    config_window: every layer has the config's sliding window, unless its attention says otherwise. softcaps: scores
    have the softcap that the attention names, if any; Gemma 3's names one and leaves it out."""
    # Hugging Face's modules: torch takes any attribute of a module for a tensor or a module.
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    config, activation = attention.config, _activation(mlp)
    _check_attention(layer, attention)

    def norm(name: str) -> Norm | None:
        if not name:
            return None
        return Norm(FrozenTensor(frozen, f"{name}.weight"), eps_of(layer.get_submodule(name)), shift)

    first, second, third, fourth = (norm(name) for name in norms)
    assert first is not None
    assert third is not None
    has_head_norms = hasattr(attention, "q_norm")
    stacked_qkv, stacked_gate_up = hasattr(attention, "qkv_proj"), hasattr(mlp, "gate_up_proj")
    has_window = hasattr(attention, "sliding_window") or not config_window
    window = getattr(attention if has_window else config, "sliding_window", None)
    softcap = getattr(attention, "attn_logit_softcapping", None) if softcaps else None
    if window is not None and window < 1:
        raise UserError(f"model_name: the config.json has a sliding_window of {window} tokens; set 1 or more, or null")
    return BlockSpec(
        AttentionSpec(
            norm=first,
            out_norm=second,
            q_norm=norm("self_attn.q_norm") if has_head_norms else None,
            k_norm=norm("self_attn.k_norm") if has_head_norms else None,
            qkv=(attention.qkv_proj,) if stacked_qkv else (attention.q_proj, attention.k_proj, attention.v_proj),
            o=attention.o_proj,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            masking=Masking(float(attention.scaling), window, softcap),
        ),
        GatedMlpSpec(
            norm=third,
            out_norm=fourth,
            gate_up=(mlp.gate_up_proj,) if stacked_gate_up else (mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
            activation=activation,
        ),
    )


def _activation(mlp: Any) -> str:
    """Return the kernel's name for an MLP's activation. Raises NotFusable."""
    activation = type(mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn)
    if activation not in ACTIVATIONS:
        raise NotFusable(f"activation {activation.__name__} has no kernel")
    return ACTIVATIONS[activation]


def _check_attention(layer: nn.Module, attention: Any) -> None:
    """Raise NotFusable where a layer draws random numbers of its own."""
    if getattr(attention, "attention_dropout", 0.0) or any(m.p for m in layer.modules() if isinstance(m, nn.Dropout)):
        raise NotFusable("the base model has dropout of its own")


# Class of the layer -> its spec. A new family is one entry, and a function where it differs from the standard layer.
FAMILIES: dict[str, Callable[[nn.Module, FrozenBytes], BlockSpec]] = {
    "LlamaDecoderLayer": standard_layer,
    "MistralDecoderLayer": partial(standard_layer, config_window=True),
    "Qwen2DecoderLayer": standard_layer,
    "Qwen3DecoderLayer": standard_layer,
    "Phi3DecoderLayer": partial(standard_layer, config_window=True),
    "GemmaDecoderLayer": partial(standard_layer, shift=1.0),
    "Gemma2DecoderLayer": partial(standard_layer, norms=FOUR_NORMS, shift=1.0),
    "Gemma3DecoderLayer": partial(standard_layer, norms=FOUR_NORMS, shift=1.0, softcaps=False),
}
