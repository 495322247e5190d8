"""The source of weights that the options name, and the codec of each of its linears."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.options import OPTIONS, ModelOptions
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.codecs import (
    HQQ,
    Codec,
    CodecOf,
    Plain,
    choose_codec,
    companions,
    described,
    is_quantized,
    train_type_over,
)
from fsdp_qlora.weights.dummy import Dummy
from fsdp_qlora.weights.hub import OnHub
from fsdp_qlora.weights.source import Weights

# Options that say how a base is quantized, by the field of a codec that a published one has in their place.
HOW = {"n_bits": "bits", "hqq_group_size": "group", "hqq_axis": "axis"}


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
    options: ModelOptions, quantization_config: Mapping[str, Any] | None, weights: Weights, compute_dtype: torch.dtype
) -> CodecOf:
    """Return checkpoint name of a linear's weight -> its codec. A quantized checkpoint may hold some unquantized.

    quantization_config: of the checkpoint's config.json; without it a weight's own tensors tell where they can.
    Raises UserError, as the function that it returns, for a checkpoint that the options do not fit."""
    chosen, published = choose_codec(options, quantization_config, compute_dtype)
    names = weights.names()
    if not published and _tell_themselves(weights, compute_dtype):
        chosen, published = partial(_as_stored, options, weights, compute_dtype), True
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


def _tell_themselves(weights: Weights, compute_dtype: torch.dtype) -> bool:
    """Return whether a checkpoint's tensors tell in what form they are, for which its config.json need not."""
    names = weights.names()
    first = next((name for name in names or () if is_quantized(name, names)), None)
    return first is not None and described(first, _WhenAsked(weights, first), compute_dtype) is not None


def _as_stored(options: ModelOptions, weights: Weights, compute_dtype: torch.dtype, name: str) -> Codec:
    found = described(name, _WhenAsked(weights, name), compute_dtype)
    assert found is not None, f"{name} is quantized otherwise than the rest of its checkpoint"
    family, codec = found
    if family != TRAIN_TYPES[options.train_type].codec:
        raise UserError(
            f"train_type: {options.train_type} does not train over {name} as the checkpoint has it, in {codec.name}; "
            f"use --train_type {train_type_over(family, options.train_type)}"
        )
    return codec


def _check_asked(options: ModelOptions, codec: Codec, name: str) -> None:
    """Raise UserError for an option that asks for another form than a published weight has."""
    if not isinstance(codec, HQQ):
        return
    for option, field in HOW.items():
        asked, has = getattr(options, option), getattr(codec, field)
        if asked not in (OPTIONS[option].default, has):
            raise UserError(f"{option}: {asked} is not what the checkpoint has ({has} in {name}); omit {option}")
    if not options.hqq_optimize:
        raise UserError(
            f"hqq_optimize: false has no effect on {name}, which the checkpoint has quantized; omit hqq_optimize"
        )


class _WhenAsked(Mapping[str, Tensor]):
    """The tensors of one weight in a checkpoint, each read when it is asked for."""

    def __init__(self, weights: Weights, weight: str) -> None:
        self._weights = weights
        names = weights.names() or set()
        self._names = {name: None for name in (weight, *companions(weight)) if name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._weights.read({name: None}, torch.device("cpu"))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
