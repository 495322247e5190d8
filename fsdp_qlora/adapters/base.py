"""The protocol of adapters: the trainable parameters that a linear gets, their first values, their form in PEFT."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fsdp_qlora.config.options import AdapterOptions


class AdapterKind(Protocol):
    """A kind of adapter. Callers take the parameters of a linear as they come, by name and in order."""

    @property
    def label(self) -> str:
        """Its name for the user."""
        ...

    @property
    def reads_norms(self) -> bool:
        """Return whether it needs the norms of the base's rows, [O] of each adapted linear: they are stored with it."""
        ...

    def parameters(self, out_features: int, in_features: int, options: AdapterOptions) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the trainable parameters of a linear, in PEFT's order."""
        ...

    def initialize(self, values: Tensor, path: str, parameter: str, seed: int, norms: Tensor | None = None) -> None:
        """Give a parameter of the linear at `path` its first values. values: zeros, float32 on the CPU.

        norms: of the base's rows, [O] on the CPU, where `reads_norms`. The values depend neither on the number of ranks
        nor on the other linears that are adapted."""
        ...

    def peft_name(self, path: str, parameter: str) -> str:
        """Return a parameter's name in adapter_model.safetensors. path: of its linear in the Hugging Face model."""
        ...

    def peft_config(
        self, options: AdapterOptions, base_model: str, revision: str | None, targets: list[str]
    ) -> dict[str, object]:
        """Return adapter_config.json: what `PeftModel.from_pretrained` rebuilds these adapters from."""
        ...

    def from_peft_name(self, name: str) -> tuple[str, str] | None:
        """Return (path, parameter) of a tensor in adapter_model.safetensors, None if no parameter of this kind."""
        ...

    def from_peft_config(self, settings: Mapping[str, Any]) -> AdapterOptions | None:
        """Return what adapter_config.json says, None if it is of another kind.

        Raises UserError where it says what this kind does not do."""
        ...

    def merged(self, weight: Tensor, values: Mapping[str, Tensor], options: AdapterOptions) -> Tensor:
        """Return weight and adapter in one matrix, computed in float32 on the weight's device. values: by parameter."""
        ...
