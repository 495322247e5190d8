"""The layout of a block's frozen bytes: the offset of each stored tensor in one flat buffer, from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdp_qlora.weights.codecs import Codec

ALIGN = 256  # bytes; every part starts at a multiple, so that a kernel may load 16 bytes at a time from any of them


@dataclass(frozen=True)
class Part:
    """One stored tensor of an entry: codes, scales, ..."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the buffer
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """One frozen tensor of a layout."""

    codec: Codec
    shape: tuple[int, ...]  # when decoded
    parts: dict[str, Part]


class Layout:
    """name -> Entry for one block. The same on every rank without communication: it depends on codecs and shapes only.

    nbytes is the buffer's length, a multiple of ALIGN * multiple_of so that `multiple_of` ranks can hold equal shards.
    used is the part of it that has tensors, a multiple of ALIGN; the rest is zeros.
    """

    def __init__(self, tensors: Mapping[str, tuple[Codec, tuple[int, ...]]], multiple_of: int = 1) -> None:
        self.entries: dict[str, Entry] = {}
        offset = 0
        for name, (codec, shape) in tensors.items():
            parts = {}
            for part, (dtype, part_shape) in codec.parts(shape).items():
                nbytes = torch.Size(part_shape).numel() * dtype.itemsize
                parts[part] = Part(dtype, tuple(part_shape), offset, nbytes)
                offset += _round_up(nbytes, ALIGN)
            self.entries[name] = Entry(codec, tuple(shape), parts)
        self.used = max(offset, ALIGN)
        self.nbytes = _round_up(self.used, ALIGN * multiple_of)

    def views(self, buffer: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return name -> part -> a view into `buffer` (uint8 [nbytes])."""
        return {
            name: {part: _view(buffer, stored) for part, stored in entry.parts.items()}
            for name, entry in self.entries.items()
        }


def _view(buffer: Tensor, part: Part) -> Tensor:
    return buffer[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
