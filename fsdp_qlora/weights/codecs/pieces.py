"""Pieces in which a weight is encoded, so that what this takes on a GPU hardly grows with the weight."""

from collections.abc import Iterator

import torch

from fsdp_qlora.weights.codecs.base import Parts, Stored

# Bytes of a weight that are brought to the device at a time. A 70B model in 16 bits is 2,200 such pieces, of 16
# launches each in NF4: 0.4 s of the hosts' time. To copy a piece takes 5 ms at 13 GB/s.
PIECE = 64 << 20


def spans(total: int, most: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of runs that divide `total` things, of about equal length and at most `most`.

    Each run but the last has a multiple of `multiple` things; `most` is one itself."""
    count = max(1, -(-total // most))
    length = max(1, -(-total // (count * multiple))) * multiple
    for first in range(0, total, length):
        yield first, min(total, first + length)


def piece_numbers(itemsize: int) -> int:
    """Return how many numbers of `itemsize` bytes are brought at a time."""
    return PIECE // itemsize


def new_parts(stored: Stored, device: torch.device) -> Parts:
    """Return memory for what a codec stores."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in stored.items()}
