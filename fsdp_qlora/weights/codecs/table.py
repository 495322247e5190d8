"""The codecs by name; the choice of a run's codec; recognition of quantized weights in a checkpoint."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.codecs.base import CheckpointCodec, Codec, CodecFamily, CodecOf
from fsdp_qlora.weights.codecs.hqq import HQQFamily
from fsdp_qlora.weights.codecs.nf4 import NF4Family
from fsdp_qlora.weights.codecs.plain import PlainFamily

CODECS: dict[str, CodecFamily] = {"plain": PlainFamily(), "nf4": NF4Family(), "hqq": HQQFamily()}


def choose_codec(
    options: ModelOptions, quantization_config: Mapping[str, Any] | None, compute_dtype: torch.dtype
) -> tuple[CodecOf, bool]:
    """Return (weight -> the codec of a decoder's linear, whether the checkpoint is published in it).

    quantization_config: of the checkpoint's config.json. Raises UserError for a checkpoint quantized in another way
    than a codec here, or than `train_type` says."""
    family = CODECS[TRAIN_TYPES[options.train_type].codec]
    if quantization_config is None:
        codec = family.from_options(options, compute_dtype)
        return lambda weight: codec, False
    method = quantization_config.get("quant_method", "an unknown method")
    published = published_by(quantization_config)
    if published is None:
        raise UserError(
            f"model_name: the checkpoint is quantized by {method} in another form than bitsandbytes' NF4 or HQQ's 8, "
            "4, 3, 2 and 1 bits, which alone are read as they are; use the unquantized model, or one of the "
            "*-bnb-4bit kind"
        )
    codec_of = family.from_hf_config(quantization_config, compute_dtype)
    if codec_of is None:
        raise UserError(
            f"train_type: {options.train_type} does not train over a checkpoint that {method} quantized; "
            f"use --train_type {train_type_over(published, options.train_type)}"
        )
    return codec_of, True


def published_by(quantization_config: Mapping[str, Any]) -> str | None:
    """Return the family in which a checkpoint's config.json declares it quantized, None for one that is not here."""
    declared = (name for name, family in CODECS.items() if family.from_hf_config(quantization_config, torch.float32))
    return next(declared, None)


def train_type_over(codec: str, train_type: str) -> str:
    """Return the train type over a base in that codec which is nearest to `train_type`."""
    adapter = TRAIN_TYPES[train_type].adapter
    over = [name for name, kind in TRAIN_TYPES.items() if kind.codec == codec]
    return next((name for name in over if TRAIN_TYPES[name].adapter == adapter), over[0])


def telling(weight: str) -> list[str]:
    """Return the names of the small tensors that a checkpoint may have to tell a weight's form: for `described`."""
    return [name for family in CODECS.values() for name in family.telling(weight)]


def described(weight: str, tensors: Mapping[str, Tensor], compute_dtype: torch.dtype) -> tuple[str, Codec] | None:
    """Return (family, codec) of a weight whose form a checkpoint's tensors alone tell, None if none of them does."""
    found = ((name, family.described(weight, tensors, compute_dtype)) for name, family in CODECS.items())
    return next(((name, codec) for name, codec in found if codec is not None), None)


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
