"""A check of numbers that are about to be stored: behind codes, NaN and infinity would look like any other number."""

import torch
from torch import Tensor


class NotFinite(Exception):
    """A weight that is to be quantized holds NaN or infinity."""


def all_finite(numbers: Tensor) -> bool:
    """Return whether a tensor of floats has neither NaN, which is both its minimum and maximum, nor infinity.

    `isfinite` of the tensor would take 2.5 times its memory."""
    if numbers.dtype.itemsize == 1:  # float8, of which there is no minimum
        numbers = numbers.to(torch.float16)
    return bool(torch.stack(numbers.aminmax()).isfinite().all())


def finite(numbers: Tensor) -> Tensor:
    """Return `numbers`. Raises NotFinite."""
    if not all_finite(numbers):
        raise NotFinite
    return numbers
