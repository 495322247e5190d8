"""The source of weights that the options name."""

from pathlib import Path

import torch

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.weights.checkpoint import Checkpoint
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
