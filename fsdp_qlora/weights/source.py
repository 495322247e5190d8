"""The protocol of a source of weights: tensors by their checkpoint names."""

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...] | None  # None: checked by the reader


class StoredTensor(NamedTuple):
    """What a checkpoint's headers say of a tensor."""

    shape: tuple[int, ...]
    is_float: bool  # of 16 bits or more; others hold codes, or numbers that a scale beside them belongs to


class Weights(Protocol):
    """A source of tensors by their checkpoint names."""

    def names(self) -> Set[str] | None:
        """Return the names of all tensors, or None if the source makes any that is asked for."""

    def check(self, expected: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
        """Raise UserError naming every tensor that is missing or of another shape, and with them the unknown ones; and
        every weight of a shape that is stored as codes."""

    def content(self) -> str | None:
        """Return what tells the source's files from any others, without reading them; None if they are made up.

        Raises UserError where they are gone."""

    def sample(self) -> str | None:
        """Return a checksum of the first numbers of every tensor, the same wherever and in whatever files they are.

        None if they are made up. Raises UserError where a file cannot be read."""

    def name_in_files(self, name: str) -> str:
        """Return the name that the source's files have for a tensor."""

    def equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        """Return whether two tensors are known to have the same numbers in `dtype`, without a download."""

    def read(self, wanted: Mapping[str, Shape], device: torch.device) -> Mapping[str, Tensor]:
        """Return the tensors of those names, of the shapes they have, on the CPU or `device`, in their own dtypes.

        Those on `device` may be made when they are asked for, anew each time."""
