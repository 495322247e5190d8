"""Random numbers as a source of weights."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fsdp_qlora.weights.source import Shape


class Dummy:
    """Random weights of the right shapes, so that a rig can be tried before anything is downloaded.

    The values depend on the name alone, so every rank and every run makes the same ones on the same kind of device.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def names(self) -> None:
        return None

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        """Nothing can be missing."""

    def content(self) -> None:
        return None

    def name_in_files(self, name: str) -> str:
        return name

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return False

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        return {name: self._make(name, shape, device) for name, shape in wanted.items() if shape is not None}

    def _make(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if len(shape) == 1:  # a norm's weight keeps activations at unit size only where it is about one
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype, device=device)
        generator = torch.Generator(device).manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        return torch.randn(shape, dtype=self.dtype, device=device, generator=generator).mul_(1 / math.sqrt(shape[-1]))
