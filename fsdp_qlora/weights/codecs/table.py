"""The codecs by name; the choice of a run's codec; recognition of quantized weights in a checkpoint."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.codecs.base import CheckpointCodec, Codec, CodecFamily
from fsdp_qlora.weights.codecs.hqq import HQQFamily
from fsdp_qlora.weights.codecs.nf4 import NF4Family
from fsdp_qlora.weights.codecs.plain import PlainFamily

CODECS: dict[str, CodecFamily] = {"plain": PlainFamily(), "nf4": NF4Family(), "hqq": HQQFamily()}


def choose_codec(
    options: ModelOptions, quantization_config: Mapping[str, Any] | None, compute_dtype: torch.dtype
) -> tuple[Codec, bool]:
    """Return (the codec of the decoder's linears, whether the checkpoint is published in it).

    quantization_config: of the checkpoint's config.json. Raises UserError for a checkpoint quantized in another way
    than a codec here, or than `train_type` says."""
    family = CODECS[TRAIN_TYPES[options.train_type].codec]
    if quantization_config is None:
        return family.from_options(options, compute_dtype), False
    if not any(known.from_hf_config(quantization_config) for known in CODECS.values()):
        method = quantization_config.get("quant_method", "an unknown method")
        raise UserError(
            f"model_name: the checkpoint is quantized by {method} in another form than bitsandbytes' NF4, which alone "
            "is read as it is; use the unquantized model, or one of the *-bnb-4bit kind"
        )
    codec = family.from_hf_config(quantization_config)
    if codec is None:
        raise UserError(
            f"train_type: {options.train_type} trains over an unquantized base and this checkpoint is quantized; "
            "use --train_type qlora"
        )
    return codec, True


def codec_named(name: str) -> Codec:
    """Return the codec whose `name` this is."""
    found = (family.named(name) for family in CODECS.values())
    return next(codec for codec in found if codec is not None)


def companions(weight: str) -> list[str]:
    """Return the names of the tensors that a checkpoint may have for a quantized weight, itself excluded."""
    return [name for family in CODECS.values() for name in family.companions(weight)]


def weight_of(name: str) -> str:
    """Return the weight that a checkpoint's tensor of that name holds: that of another name where codes have one."""
    found = (family.weight_of(name) for family in CODECS.values())
    return next((weight for weight in found if weight is not None), name)


def companions_in(names: Set[str]) -> dict[str, tuple[str, int]]:
    """Return name -> (weight, place among its `companions`) of a checkpoint's tensors that belong to others."""
    weights = {weight_of(name) for name in names}
    known = weights | names
    return {
        companion: (weight, i)
        for weight in weights
        if is_quantized(weight, known)
        for i, companion in enumerate(companions(weight))
        if companion in names
    }


def is_quantized(weight: str, names: Set[str] | None) -> bool:
    """Return whether a checkpoint holds a weight quantized. names: its tensors, None if it makes any."""
    return names is not None and any(family.is_quantized(weight, names) for family in CODECS.values())


def stored_codec(weight: str, tensors: Mapping[str, Tensor]) -> CheckpointCodec | None:
    """Return the codec in which a checkpoint's tensors hold a weight, None if it is not quantized."""
    found = (family.stored_codec(weight, tensors) for family in CODECS.values())
    return next((codec for codec in found if codec is not None), None)
