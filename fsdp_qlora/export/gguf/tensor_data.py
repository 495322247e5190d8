"""The container: a header from shapes alone, then tensors one by one, then the file read back and compared."""

import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.export.gguf.encode import Bytes
from fsdp_qlora.export.gguf.quantize import nbytes_of
from fsdp_qlora.units import GIB, as_gib

READ_BYTES = 1 << 22  # of a file at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, shape (rows first) and type."""

    name: str
    shape: tuple[int, ...]
    kind: Type

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.kind, self.shape)


def check_room(target: Path, entries: Sequence[Entry], smaller: str) -> int:
    """Return the bytes of a file's tensors. Raises UserError where its disk has less free. smaller: what takes less."""
    total = sum(entry.nbytes for entry in entries)
    free = shutil.disk_usage(target.parent).free
    if total > free:
        raise UserError(
            f"output_dir: {target.parent} has {as_gib(free, 2)} free and the file will take {total / GIB:.2f}; free "
            f"some space there, or take {smaller}"
        )
    return total


def write_file(
    writer: gguf.GGUFWriter, path: Path, entries: Sequence[Entry], data: Iterable[Iterator[Bytes]]
) -> dict[str, int]:
    """Write a GGUF file whose metadata is in `writer`; return each tensor's checksum.

    data: of each entry, in order, its bytes in pieces; taken one by one, so that no more than a piece is in memory."""
    for entry in entries:
        # gguf takes the shape of the bytes for its own types, and of the numbers for those that numpy has.
        rows = (*entry.shape[:-1], nbytes_of(entry.kind, entry.shape[-1:]))
        writer.add_tensor_info(entry.name, rows, np.dtype(np.uint8), entry.nbytes, raw_dtype=entry.kind)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    sums = {}
    with path.open("r+b") as out:
        out.seek(0, 2)
        _pad(out, writer.data_alignment)
        for entry, pieces in zip(entries, data, strict=True):
            checksum = written = 0
            for piece in pieces:
                out.write(piece.data)
                checksum, written = zlib.crc32(piece.data, checksum), written + piece.nbytes
            assert written == entry.nbytes, f"{entry.name}: {written} bytes of {entry.nbytes}"
            _pad(out, writer.data_alignment)
            sums[entry.name] = checksum
    return sums


def check_file(path: Path, entries: Sequence[Entry], sums: dict[str, int]) -> None:
    """Read a file back with `gguf`. Raises TrainingStopped where it is not what was written."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with path.open("rb") as file:
        for entry in entries:
            tensor = found.get(entry.name)
            if (
                tensor is None
                or tuple(reversed(tensor.shape.tolist())) != entry.shape
                or tensor.tensor_type is not entry.kind
                or _checksum(file, tensor.data_offset, entry.nbytes) != sums[entry.name]
            ):
                raise TrainingStopped(
                    f"output_dir: {entry.name} reads back otherwise than it was written: is the disk sound?"
                )


def _checksum(file: BinaryIO, offset: int, nbytes: int) -> int:
    """Return the checksum of a part of a file, read and not mapped: what is mapped counts as this process's memory."""
    file.seek(offset)
    checksum = 0
    for start in range(0, nbytes, READ_BYTES):
        checksum = zlib.crc32(file.read(min(READ_BYTES, nbytes - start)), checksum)
    return checksum


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))
