"""DoRA: LoRA over a base whose rows have magnitudes of their own that train, with PEFT's names and config file."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fsdp_qlora.adapters.lora import LoRA
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.kernels.dora import row_norms

MAGNITUDE = "lora_magnitude_vector"
PEFT_NAME = re.compile(rf"base_model\.model\.(.+)\.{MAGNITUDE}")


class DoRA(LoRA):
    """Weight-decomposed low-rank adapters (arXiv:2402.09353): m / |W + s B A| * (W + s B A), by rows."""

    label = "DoRA"
    peft_settings: Mapping[str, object] = {"use_dora": True}
    reads_norms = True

    def parameters(self, out_features: int, in_features: int, options: AdapterOptions) -> dict[str, tuple[int, ...]]:
        return super().parameters(out_features, in_features, options) | {MAGNITUDE: (out_features,)}

    def initialize(self, values: Tensor, path: str, parameter: str, seed: int, norms: Tensor | None = None) -> None:
        """Set the magnitudes to the norms of the base's rows, with which it begins as the base; the rest as LoRA."""
        if parameter != MAGNITUDE:
            super().initialize(values, path, parameter, seed)
            return
        assert norms is not None, f"{path}: magnitudes begin as the norms of the base's rows"
        values.copy_(norms)

    def peft_name(self, path: str, parameter: str) -> str:
        return f"base_model.model.{path}.{MAGNITUDE}" if parameter == MAGNITUDE else super().peft_name(path, parameter)

    def from_peft_name(self, name: str) -> tuple[str, str] | None:
        found = PEFT_NAME.fullmatch(name)
        return (found[1], MAGNITUDE) if found else super().from_peft_name(name)

    def from_peft_config(self, settings: Mapping[str, Any]) -> AdapterOptions | None:
        return self._options(settings) if settings.get("use_dora") else None

    def merged(self, weight: Tensor, values: Mapping[str, Tensor], options: AdapterOptions) -> Tensor:
        summed = super().merged(weight, values, options)
        norms = row_norms(summed)
        factor = values[MAGNITUDE].to(summed.device).float() / norms
        return summed.mul_(factor.masked_fill_(norms == 0, 0)[:, None])
