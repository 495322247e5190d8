"""A file of rows as bytes, unpacked where it is packed; and the form in which rows leave a file."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Raw = dict[str, Any] | bytes  # a row, or the JSON line that holds it
Placed = tuple[str, Raw]  # its location, as 'line 17', and the row

PACKED = (".gz", ".zst", ".bz2", ".xz")
BEGINS = {  # the first bytes of files that are packed, or of a kind that has no lines
    b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
}  # fmt: skip
WRONG = "\0wrong"  # the only key of a row that its reader could not make out; its value says why


def kind_by_bytes(begins: bytes) -> str:
    """Return what a file is by its first bytes, '' where it may be text."""
    return next((kind for mark, kind in BEGINS.items() if begins.startswith(mark)), "")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading what was packed into it, where it is packed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return io.BufferedReader(_Raw(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened: IO[bytes] = openers.get(suffix, open)(path, "rb")
    return opened


class _Raw(io.RawIOBase):
    """An Arrow stream as Python's own readers want it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
