"""A safetensors file written tensor by tensor: one of them is in host memory at a time, and a checksum comes along.

The library's own `save_file` wants all tensors in host memory at once: 5 GB a rank at 70B, on a machine that is full of
the base. The format is a header, which is known before the first tensor is, and the tensors' bytes one after the other.
"""

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
READ_BYTES = 2**23  # of a file that are checked at a time


class Form(NamedTuple):
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Written(NamedTuple):
    """What a file on the disk has."""

    nbytes: int
    crc32: int


class TensorFile:
    """A file of tensors, written in the order of `forms`. Any call raises OSError where the disk fails.

    The checksum of one tensor is computed by a thread while the disk takes the next: at 3 GB/s it is not what one
    waits for."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        self._left = list(forms.items())
        self._file = path.open("wb", buffering=0)
        self._pool = ThreadPoolExecutor(1)
        self._sum: Future[int] | None = None
        self._nbytes = 0
        self._write(memoryview(header(forms)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, from any device."""
        expected, form = self._left.pop(0)
        assert name == expected
        assert (tensor.dtype, tuple(tensor.shape)) == form, f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {form}"
        if form.nbytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def close(self) -> Written:
        """Return once all of the file is on the disk."""
        assert not self._left, "a tensor of the header was not written"
        os.fsync(self._file.fileno())
        written = Written(self._nbytes, self._checksum())
        self.abandon()
        return written

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()
        self._pool.shutdown()

    def _checksum(self) -> int:
        return self._sum.result() if self._sum is not None else 0

    def _write(self, piece: memoryview) -> None:
        before = self._checksum()
        self._sum = self._pool.submit(zlib.crc32, piece, before)
        self._nbytes += len(piece)
        while piece:
            piece = piece[self._file.write(piece) :]


def header(forms: Mapping[str, Form]) -> bytes:
    """Return the beginning of a safetensors file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, form in forms.items():
        end = offset + form.nbytes
        entries[name] = {"dtype": NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file. Raises OSError."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc
