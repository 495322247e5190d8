"""Random numbers as a source of weights."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

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

    def sample(self) -> None:
        return None

    def name_in_files(self, name: str) -> str:
        return name

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        return False

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> Mapping[str, Tensor]:
        shapes = {name: shape for name, shape in wanted.items() if shape is not None}
        return _Made(shapes, self.dtype, device)


@dataclass(frozen=True)
class _Made(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for: one at a time is in the device's memory, as of a checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, name: str) -> Tensor:
        shape, device = self.shapes[name], self.device
        if len(shape) == 1:  # a norm's weight keeps activations at unit size only where it is about one
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype, device=device)
        generator = torch.Generator(device).manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        return torch.randn(shape, dtype=self.dtype, device=device, generator=generator).mul_(1 / math.sqrt(shape[-1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
