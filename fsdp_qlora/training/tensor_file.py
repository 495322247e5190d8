"""A safetensors file written tensor by tensor: at most two are in host memory, and a checksum comes along.

A machine that is full of the base has no host memory for all of them at once (`safetensors_header`).
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fsdp_qlora.safetensors_header import Form, header

READ_BYTES = 2**23  # of a file that are checked at a time


class Written(NamedTuple):
    """What a file on the disk has."""

    nbytes: int
    crc32: int


class TensorFile:
    """A file of tensors, written in the order of `forms`. Where the disk fails, that call or a later raises OSError.

    One thread writes a piece and another computes its checksum (3 GB/s of a core) while the caller copies the next one
    from its device: one waits for the slowest of the three, which is the disk. Two pieces are in memory at once."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        self._left = list(forms.items())
        self._file = path.open("wb", buffering=0)
        self._pool = ThreadPoolExecutor(2)
        self._writing: Future[None] | None = None
        self._summing: Future[int] | None = None
        self._nbytes = 0
        self._write(memoryview(header(forms)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, from any device. It may change once this returns, if it is not on the CPU."""
        self.write_flat([name], tensor.detach().contiguous().reshape(-1), tuple(tensor.shape))

    def write_flat(self, names: Sequence[str], flat: Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Write the next tensors, whose values are one after the other in `flat`. shape: of the only one."""
        next_ones, self._left = self._left[: len(names)], self._left[len(names) :]
        assert [name for name, _ in next_ones] == list(names)
        assert all(form.dtype == flat.dtype for _, form in next_ones), f"{names}: {flat.dtype}"
        assert sum(form.nbytes for _, form in next_ones) == flat.nbytes, f"{names}: {flat.nbytes} bytes"
        assert shape is None or next_ones[0][1].shape == shape, f"{names}: {shape}"
        if flat.nbytes:
            self._write(memoryview(flat.cpu().view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def close(self) -> Written:
        """Return once all of the file is on the disk."""
        assert not self._left, "a tensor of the header was not written"
        crc32 = self._wait()
        os.fsync(self._file.fileno())
        self._file.close()  # whose error counts: some file systems tell only here that they are full
        self.abandon()
        return Written(self._nbytes, crc32)

    def abandon(self) -> None:
        """Close the file as it is."""
        self._pool.shutdown()
        with suppress(OSError):
            self._file.close()

    def _write(self, piece: memoryview) -> None:
        before = self._wait()
        self._nbytes += len(piece)
        self._summing = self._pool.submit(zlib.crc32, piece, before)
        self._writing = self._pool.submit(self._write_all, piece)

    def _write_all(self, piece: memoryview) -> None:
        while piece:
            piece = piece[self._file.write(piece) :]

    def _wait(self) -> int:
        """Return the checksum up to here, once all of it is written. Raises the writing's OSError."""
        if self._writing is None or self._summing is None:
            return 0
        self._writing.result()
        return self._summing.result()


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file. Raises OSError."""
    crc = 0
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                crc = zlib.crc32(piece, crc)
    except OSError as error:
        error.filename = str(path)  # which an error of reading lacks
        raise
    return crc
