"""Pieces in which a weight is encoded, so that what this takes on a GPU hardly grows with the weight."""

from collections.abc import Callable, Iterable, Iterator

import torch

from fsdp_qlora.runtime.background import torch_threads
from fsdp_qlora.weights.codecs.base import Parts, Stored

# Bytes of a weight that are brought to the device at a time. A 70B model in 16 bits is 2,200 such pieces, of 16
# launches each in NF4: 0.4 s of the hosts' time. To copy a piece takes 5 ms at 13 GB/s.
PIECE = 64 << 20
# The same on a CPU: what is made of it stays in a core's cache. NF4 takes 5 ns a number of one core, 10 with PIECE.
CPU_PIECE = 2 << 20


def spans(total: int, most: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of runs that divide `total` things, of about equal length and at most `most`.

    Each run but the last has a multiple of `multiple` things; `most` is one itself."""
    count = max(1, -(-total // most))
    length = max(1, -(-total // (count * multiple))) * multiple
    for first in range(0, total, length):
        yield first, min(total, first + length)


def piece_numbers(itemsize: int, device: torch.device | None = None) -> int:
    """Return how many numbers of `itemsize` bytes are brought at a time. device: that encodes them; None: a GPU."""
    on_cpu = device is not None and device.type == "cpu"
    return (min(PIECE, CPU_PIECE) if on_cpu else PIECE) // itemsize


def for_each(work: Callable[[tuple[int, int]], None], pieces: Iterable[tuple[int, int]], device: torch.device) -> None:
    """Call `work` with each piece: in turn, or on a CPU in as many threads as PyTorch has, each on a piece of its own.

    Threads of PyTorch share one small operation after another instead, and wait for the last of them each time."""
    count, pieces = torch.get_num_threads(), list(pieces)
    if device.type != "cpu" or min(count, len(pieces)) <= 1:
        for piece in pieces:
            work(piece)
        return
    with torch_threads(min(count, len(pieces))) as threads:
        for _ in threads.map(work, pieces):
            pass  # raises what a thread raised


def new_parts(stored: Stored, device: torch.device) -> Parts:
    """Return memory for what a codec stores."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in stored.items()}
