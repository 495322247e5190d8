"""A Hugging Face model without weights: its config read and checked, its modules built on the meta device."""

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from fsdp_qlora.codecs import NF4, Codec, Plain
from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.precision import Precision


def read_config(model_name: str, revision: str | None) -> PretrainedConfig:
    """config.json of a local folder or a hub model. Raises UserError where there is none or its type is unknown."""
    try:
        config = AutoConfig.from_pretrained(model_name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        what = (
            "has no readable config.json"
            if Path(model_name).is_dir()
            else "is neither a local folder nor a model the hub gives"
        )
        raise UserError(
            f"model_name: {model_name} {what} ({first_line(error)}); check the name, the network, "
            "and `hf auth login` for a gated model"
        ) from error
    return config


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest context the model was made for, in tokens; None where its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def build(config: PretrainedConfig, precision: Precision, attention: str) -> PreTrainedModel:
    """The model with meta parameters and real buffers (rotary tables are not in checkpoints)."""
    config = copy.deepcopy(config)  # from_config writes the attention implementation into what it is given
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its linears are ours to decode
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=precision.stream)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"model_name: a {config.model_type} model cannot be built as a causal LM: {first_line(error)}"
        ) from error
    return model


@dataclass(frozen=True)
class Attention:
    """An attention implementation of transformers, and why it was chosen."""

    name: str
    reason: str


def choose_attention(wanted: str, config: PretrainedConfig, precision: Precision, device: torch.device) -> Attention:
    """`auto` is FlashAttention-2 where flash-attn is installed and card and dtype allow it, else sdpa where it can."""
    able = device.type == "cuda" and precision.compute is not torch.float32
    installed = importlib.util.find_spec("flash_attn") is not None
    sdpa_can = _runs_on_sdpa(config)
    if wanted == "auto":
        if able and installed and torch.cuda.get_device_capability(device) >= (8, 0):
            return Attention("flash_attention_2", "flash-attn is installed")
        if not sdpa_can:
            return Attention(
                "eager", f"sdpa cannot do what {config.model_type} does, flash-attn can; memory is quadratic"
            )
        return Attention("sdpa", "flash-attn is not installed" if able else "flash-attn is for 16-bit compute on a GPU")
    if wanted == "flash_attention_2" and not (able and installed):
        why = "is not installed (pip install flash-attn)" if able else "needs a GPU and 16-bit compute"
        raise UserError(f"attention: flash_attention_2 {why}; use --attention auto or sdpa")
    if wanted == "sdpa" and not sdpa_can:
        raise UserError(
            f"attention: sdpa cannot do what {config.model_type} does (a softcap); use --attention auto or eager"
        )
    return Attention(wanted, "as asked")


def _runs_on_sdpa(config: PretrainedConfig) -> bool:
    """Whether the model's class says so and its scores have no softcap, which PyTorch's attention cannot apply: the
    Gemma 2 of transformers 5.17 says that it can, and leaves the softcap out."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True  # `build` says what is wrong with it
    return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", True))


def linear_codec(
    config: PretrainedConfig, train_type: str, double_quant: bool, precision: Precision
) -> tuple[Codec, bool]:
    """(how the decoder's linears are stored, whether the checkpoint has them in that form already)."""
    if train_type != "qlora":
        if hasattr(config, "quantization_config"):
            raise UserError(
                f"train_type: {train_type} trains over an unquantized base and this checkpoint is quantized; "
                "use --train_type qlora"
            )
        return Plain(precision.compute), False
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return NF4(double_quant), False
    settings: dict[str, Any] = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type") != "nf4":
        method = settings.get("quant_method", "an unknown method")
        raise UserError(
            f"model_name: the checkpoint is quantized by {method} in another form than bitsandbytes' NF4, which alone "
            "is read as it is; use the unquantized model, or one of the *-bnb-4bit kind"
        )
    return NF4(bool(settings.get("bnb_4bit_use_double_quant"))), True


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's decoder layers. Raises UserError for an architecture that has no such list."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(
        f"model_name: {type(model).__name__} has no list of {count} decoder layers; "
        "only decoder-only models are trained"
    )


def logit_shape(config: PretrainedConfig) -> tuple[float, float | None]:
    """(factor on the logits, softcap): what a family does to its logits between head and loss."""
    factor = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    factor /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return float(factor), getattr(config, "final_logit_softcapping", None)
