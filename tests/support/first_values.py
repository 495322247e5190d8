"""First values of a linear's adapter, as any number of ranks should draw them."""

import torch
from torch import Tensor

from fsdp_qlora.adapters.lora import LoRA, lora_shapes


def first_values(path: str, out_features: int, in_features: int, rank: int, seed: int) -> dict[str, Tensor]:
    values = {name: torch.zeros(shape) for name, shape in lora_shapes(out_features, in_features, rank).items()}
    for name, value in values.items():
        LoRA().initialize(value, path, name, seed)
    return values
