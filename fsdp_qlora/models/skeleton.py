"""A Hugging Face model without weights: its config read and checked, its modules built on the meta device."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.models.layer_kinds import check_kinds
from fsdp_qlora.models.logits import find_logit_shape
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.weights.checkpoint_files import check_model_name

# Families of a text model wrapped with a vision tower, by model type: text alone goes through them as through the text
# model, which the tests compare.
WRAPPERS = (
    *("gemma3", "mistral3", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("internvl", "idefics3", "smolvlm"),
)
# Subclasses of nn.Linear that compute the same. transformers and bitsandbytes do not quantize them.
LINEARS = ("FalconLinear",)
# Causal LMs by their name alone, by model type, and what is in the way.
UNSUPPORTED = {
    "cpmant": "its attention looks at later tokens too, so an answer would be seen before it is learnt",
    "xlm": "its attention looks at later tokens too",
    "xlnet": "its attention looks at later tokens too",
    "ctrl": "it changes what its embedding gave in place",
    "git": "it changes what its embedding gave in place",
    "trocr": "its layers look at an encoder, which is not there",
}


def read_config(model_name: str, revision: str | None) -> PretrainedConfig:
    """config.json of a local folder or a hub model. Raises UserError where there is none, or none that can be trained.

    Code that comes with a model is never run."""
    check_model_name(model_name)
    try:
        config = AutoConfig.from_pretrained(model_name, revision=revision, trust_remote_code=False)
    except Exception as error:  # each config class checks its values in its own way
        raise _unreadable(model_name, revision, error) from error
    reason = _obstacle(config)
    if reason:
        raise UserError(f"model_name: {model_name} is a {config.model_type} model, which cannot be trained: {reason}")
    return config


def _obstacle(config: PretrainedConfig) -> str:
    """Why models of a config cannot be trained, or ''."""
    if is_wrapper(config) and config.model_type not in WRAPPERS:
        return (
            f"it wraps a text model, and only those wrapped by {', '.join(WRAPPERS)} are taken out; "
            "use a text-only checkpoint"
        )
    # Encoders have both fields; GPT-NeoX has the first, and is causal whatever it says.
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        return "its attention looks both ways (is_decoder is false in its config.json); only causal LMs are trained"
    if getattr(config, "add_cross_attention", False):
        return "its layers look at an encoder (add_cross_attention in its config.json), which is not there"
    text = text_config(config)
    # "vision" is said of images alone. What transformers makes of these two depends on its attention implementation.
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention looks both ways, as its config.json asks; only causal LMs are trained"
    return UNSUPPORTED.get(config.model_type, "")


def _unreadable(model_name: str, revision: str | None, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"model_name: {model_name} needs Python code of its own (auto_map in its config.json), which is never run "
            "here; use a checkpoint of it in a form that transformers knows by itself"
        )
    if Path(model_name).is_dir():
        known = isinstance(error, StrictDataclassError)  # whose first line names transformers' check, not what is wrong
        why = first_line(error.__cause__ if known and error.__cause__ is not None else error)
        return UserError(f"model_name: {model_name} has no readable config.json ({why}); download the model again")
    if _is_adapter_on_hub(model_name, revision):
        return UserError(f"model_name: {model_name} is an adapter, not a model; set model_name to its base")
    return UserError(
        f"model_name: {model_name} is neither a local folder nor a model the hub gives ({first_line(error)}); "
        "check the name, the network, and `hf auth login` for a gated model"
    )


def _is_adapter_on_hub(model_name: str, revision: str | None) -> bool:
    try:
        return find_adapter_config_file(model_name, revision=revision) is not None
    except Exception:  # the hub gives neither: what is said is about the model
        return False


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text model: of a vision-language model's text part, else `config` itself."""
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def is_wrapper(config: PretrainedConfig) -> bool:
    """Whether its model holds a text model among others (a vision tower, ...)."""
    text = config.sub_configs.get("text_config")
    return text is not None and getattr(model_class(config), "config_class", None) is not text


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers' auto classes open the checkpoint with, None where they have none."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found: type[PreTrainedModel] = mapping[type(config)]
            return found
    return None


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest context the model was made for, in tokens; None where its config does not say.

    With scaled rotary positions that is the scaled length, which some configs state and others do not."""
    config = text_config(config)
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # of each kind of layer, or of all
    return max(most, *(_scaled_positions(kind, most) for kind in kinds))


def check_context(context_length: int, config: PretrainedConfig) -> None:
    """Raise UserError for a context that is longer than what the model was made for."""
    most = max_positions(config)
    if most is not None and context_length > most:
        raise UserError(f"context_length {context_length}: the model takes at most {most} tokens; lower it")


def check_layers_stay(config: PretrainedConfig) -> None:
    """Raise UserError for a model that leaves out layers at random while it trains: ranks would each leave out others,
    and wait for shards and gradients that never come."""
    share = getattr(text_config(config), "layerdrop", 0.0)
    if share:
        raise UserError(
            f"model_name: a step leaves out layers at random (layerdrop {share:g} in the model's config.json), which "
            "ranks cannot do in step; set layerdrop to 0 there"
        )


def _scaled_positions(rope: dict[str, Any], most: int) -> int:
    if rope.get("rope_type", "default") == "default":
        return most
    return round((rope.get("original_max_position_embeddings") or most) * (rope.get("factor") or 1.0))


def build(config: PretrainedConfig, precision: Precision, attention: str) -> PreTrainedModel:
    """The model with meta parameters and real buffers (rotary tables are not in checkpoints)."""
    config = copy.deepcopy(config)  # from_config writes the attention implementation into what it is given
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its linears are ours to decode
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    if not is_wrapper(config):
        auto = AutoModelForCausalLM
    try:
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(
                config, attn_implementation=attention, dtype=precision.stream, trust_remote_code=False
            )
    except Exception as error:  # each model class reads its config in its own way: a KeyError for an activation, ...
        raise UserError(
            f"model_name: a {config.model_type} model cannot be built as its config.json says "
            f"({type(error).__name__}: {first_line(error)}); a newer transformers may know it"
        ) from error
    text = text_config(model.config)
    if hasattr(text, "allow_global_per_layer_attribute_access"):  # else Gemma 4's config raises where the plan reads it
        text.allow_global_per_layer_attribute_access = True
    _check_heads(model)
    if getattr(text, "layer_types", None):
        check_kinds(config.model_type, backbone_of(model), decoder_layers(model)[1])
    return model


def _check_heads(model: PreTrainedModel) -> None:
    """Raise UserError where queries cannot share keys evenly: kernels would divide by zero or read beyond."""
    for module in backbone_of(model).modules():
        heads, shared = _heads_of(module)
        if shared and heads % shared:
            raise UserError(
                f"model_name: the config.json has {heads} attention heads and {shared} key/value heads; the first must "
                "be a multiple of the second"
            )


def _heads_of(module: nn.Module) -> tuple[int, int]:
    """Return how many heads of queries and of keys an attention has, (0, 0) for another module."""
    queries, keys, stacked = (getattr(module, name, None) for name in ("q_proj", "k_proj", "qkv_proj"))
    size, groups = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
    if isinstance(size, int) and isinstance(queries, nn.Linear) and isinstance(keys, nn.Linear):
        return queries.out_features // size, keys.out_features // size
    if groups is not None and isinstance(stacked, nn.Linear):  # Phi-3's: their rows do not say how many are whose
        config = getattr(module, "config", None)
        return getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", 0)
    return 0, 0


def quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return how config.json says that the checkpoint is quantized, None if it is not."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return None
    settings: dict[str, Any] = quantized if isinstance(quantized, dict) else quantized.to_dict()
    return settings


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that makes hidden states of text: of a wrapper its text model."""
    backbone: PreTrainedModel = model.get_decoder() if is_wrapper(model.config) else model.base_model
    return backbone


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The LM head. Raises UserError where it is no plain linear."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(
            f"model_name: {type(model).__name__} has no head that is a plain linear; only causal LMs are trained"
        )
    return head


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The path of a module in the model, '' of the model itself."""
    path: str = next(name for name, module in model.named_modules() if module is wanted)
    return path


def is_linear(module: nn.Module) -> bool:
    """Whether a module is x @ W^T + b and nothing else, as PEFT and bitsandbytes take it."""
    return type(module) is nn.Linear or type(module).__name__ in LINEARS


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(path, list) of the model's decoder layers. Raises UserError for an architecture that has no such list."""
    backbone = backbone_of(model)
    count = backbone.config.num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return path_of(model, module), module
    raise UserError(
        f"model_name: {type(model).__name__} has no list of {count} decoder layers; "
        "only decoder-only models are trained"
    )


def persistent_buffers(root: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that a checkpoint of `root` has."""
    stored = root.state_dict()
    return {name: buffer for name, buffer in root.named_buffers() if name in stored}


def logit_shape(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return (factor on the logits, softcap): what a family does to its logits between head and loss.

    Raises UserError where it does something else, which the head here would leave out."""
    found = find_logit_shape(model, path_of(model, head_of(model)), text_config(model.config))
    if found is None:
        raise UserError(
            f"model_name: {type(model).__name__} has more than a linear, a factor and a softcap between its decoder "
            "layers and its logits, which is not trained here; use another model"
        )
    return found
