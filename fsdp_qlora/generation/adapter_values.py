"""Adapters of a model that does not train: the working values alone, and the same model without them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fsdp_qlora.models.causal_lm import CausalModel

Values = Callable[[str], Mapping[str, Tensor]]  # path of a linear -> its parameters


def make_adapters(model: CausalModel, device: torch.device) -> None:
    """Replace the adapters that the model declares by zeros: it answers as its base."""
    for linear in model.linears().values():
        for name, meta in linear.adapter_parameters().items():
            setattr(linear, name, nn.Parameter(torch.zeros(meta.shape, dtype=meta.dtype, device=device)))
        linear.is_base = True


def set_adapters(model: CausalModel, values: Values | None) -> None:
    """Give all adapters their values, rounded to the compute dtype; None: zeros, with which the base is left alone."""
    with torch.no_grad():
        for path, linear in model.linears().items():
            parameters = linear.adapter_parameters()
            found = values(path) if values is not None and parameters else {}
            for name, parameter in parameters.items():
                if values is None:
                    parameter.zero_()
                else:
                    parameter.copy_(found[name])
            linear.is_base = values is None
            linear.values_change()
