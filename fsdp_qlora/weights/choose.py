"""The source of weights that the options name, and the codec of each of its linears."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.weights.checkpoint import Checkpoint
from fsdp_qlora.weights.codecs import Codec, Plain, choose_codec, is_quantized
from fsdp_qlora.weights.dummy import Dummy
from fsdp_qlora.weights.hub import OnHub
from fsdp_qlora.weights.source import Weights


def open_weights(options: ModelOptions, dtype: torch.dtype) -> Weights:
    """Return the source of the frozen weights. Only headers are read so far, of a hub model or dummy weights nothing.

    dtype: of dummy weights."""
    if options.dummy_weights:
        return Dummy(dtype)
    if Path(options.model_name).is_dir():
        return Checkpoint(Path(options.model_name), options.loading_workers)
    return OnHub(options.model_name, options.revision, options.loading_workers)


def codec_chooser(
    options: ModelOptions, quantization_config: Mapping[str, Any] | None, weights: Weights, compute_dtype: torch.dtype
) -> Callable[[str], Codec]:
    """Return checkpoint name of a linear's weight -> its codec. A quantized checkpoint may hold some unquantized.

    quantization_config: of the checkpoint's config.json."""
    codec, prequantized = choose_codec(options, quantization_config, compute_dtype)
    plain = Plain(compute_dtype)
    return lambda name: codec if not prequantized or is_quantized(name, weights.names()) else plain
