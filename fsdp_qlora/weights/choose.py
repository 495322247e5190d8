"""The source of weights that the options name, and the codec of each of its linears."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.codecs import (
    HQQ,
    NF4,
    Codec,
    CodecOf,
    Plain,
    check_groups,
    choose_codec,
    described,
    is_quantized,
    published_by,
    telling,
    train_type_over,
)
from fsdp_qlora.weights.dummy import Dummy
from fsdp_qlora.weights.hub import OnHub
from fsdp_qlora.weights.source import Shape, Weights

# Options that say how a base is quantized, by the field of a codec that a published one has in their place.
HOW = {"n_bits": "bits", "hqq_group_size": "group", "hqq_axis": "axis"}

Told = Mapping[str, tuple[str, Codec]]  # weight -> (family, codec)


def open_weights(options: ModelOptions, dtype: torch.dtype) -> Weights:
    """Return the source of the frozen weights. Only headers are read so far, of a hub model or dummy weights nothing.

    dtype: of dummy weights."""
    if options.dummy_weights:
        return random_weights(dtype)
    if Path(options.model_name).is_dir():
        return Checkpoint(Path(options.model_name), options.loading_workers)
    return OnHub(options.model_name, options.revision, options.loading_workers)


def random_weights(dtype: torch.dtype) -> Weights:
    """Return a source of random numbers under any name."""
    return Dummy(dtype)


def codec_chooser(
    options: ModelOptions,
    quantization_config: Mapping[str, Any] | None,
    weights: Weights,
    compute_dtype: torch.dtype,
    told: Told,
) -> CodecOf:
    """Return checkpoint name of a linear's weight -> its codec. A quantized checkpoint may hold some unquantized.

    quantization_config: of the checkpoint's config.json. told: `told_forms` of the weights.
    Raises UserError, as the function that it returns, for a checkpoint that the options do not fit."""
    chosen, published = choose_codec(options, quantization_config, compute_dtype)
    names = weights.names()
    if told:
        chosen, published = partial(_as_told, options, told), True
    if not published:
        return chosen
    plain = Plain(compute_dtype)

    def codec_of(name: str) -> Codec:
        if not is_quantized(name, names):
            return plain
        codec = chosen(name)
        _check_asked(options, codec, name)
        return codec

    return codec_of


def check_asked_groups(options: ModelOptions, linears: Sequence[tuple[Codec, tuple[int, ...]]]) -> None:
    """Raise UserError where the groups that the options ask for do not fit all linears: (codec, shape) of each."""
    grouped = [(codec, shape) for codec, shape in linears if isinstance(codec, HQQ)]
    check_groups(grouped, train_type_over("nf4", options.train_type))


def told_forms(
    quantization_config: Mapping[str, Any] | None, weights: Weights, compute_dtype: torch.dtype
) -> dict[str, tuple[str, Codec]]:
    """Return weight -> (family, codec) of a checkpoint whose config.json says nothing and whose tensors do; else {}.

    What tells is read at once: seven small tensors for each weight, of a hub model behind its download."""
    names = weights.names()
    if quantization_config is not None or names is None:
        return {}
    smalls = {name: [n for n in telling(name) if n in names] for name in names if is_quantized(name, names)}
    wanted: dict[str, Shape] = {name: None for small in smalls.values() for name in small}
    tensors = weights.read(wanted, torch.device("cpu")) if wanted else {}
    forms = {
        weight: described(weight, {name: tensors[name] for name in small}, compute_dtype)
        for weight, small in smalls.items()
    }
    return {weight: form for weight, form in forms.items() if form is not None}


def as_published(options: ModelOptions, quantization_config: Mapping[str, Any] | None, told: Told) -> ModelOptions:
    """Return the options that read a checkpoint as it is: over the form in which it is published, if it is in one.

    HQQ in float32, which rounds neither its scales nor its numbers. told: `told_forms` of the weights."""
    family = next((family for family, _ in told.values()), None)
    if family is None and quantization_config is not None:
        family = published_by(quantization_config)
    if family is None:
        return options
    precision = "fp32" if family == "hqq" else options.precision
    return replace(options, train_type=train_type_over(family, options.train_type), precision=precision)


def _as_told(options: ModelOptions, told: Told, name: str) -> Codec:
    assert name in told, f"{name} is quantized otherwise than the rest of its checkpoint"
    family, codec = told[name]
    if family != TRAIN_TYPES[options.train_type].codec:
        raise UserError(
            f"train_type: {options.train_type} does not train over {name} as the checkpoint has it, in {codec.name}; "
            f"use --train_type {train_type_over(family, options.train_type)}"
        )
    return codec


def _check_asked(options: ModelOptions, codec: Codec, name: str) -> None:
    """Raise UserError for an option that asks for another form than a published weight has."""
    if isinstance(codec, NF4) and codec.double_quant and not options.double_quant:
        raise UserError(
            f"double_quant: false is not what the checkpoint has ({name} is double-quantized); omit double_quant"
        )
    if not isinstance(codec, HQQ):
        return
    for option, field in HOW.items():
        asked, has = getattr(options, option), getattr(codec, field)
        if asked not in (None, has):
            raise UserError(f"{option}: {asked} is not what the checkpoint has ({has} in {name}); omit {option}")
    if not options.hqq_optimize:
        raise UserError(
            f"hqq_optimize: false has no effect on {name}, which the checkpoint has quantized; omit hqq_optimize"
        )
