"""A unit's file: its bytes as a safetensors file of one tensor, checked piece by piece while they are read.

The check is a CRC-32 for each piece, as of checkpoints, and not the sum that `FrozenBytes` keeps: a sum stays the same
where two pages have changed places, which is one of the ways in which disks and file systems go wrong. It is computed
while the piece is in the core's cache, at 3 to 4 GB/s of a core (`benchmarks/base_cache.py`). The sum is in the file
too and goes with the bytes: it is compared when they are first used, as of bytes that were encoded in this run.

The zeros at the end of a unit, which are as many as ranks ask for, are not in the file, so that any number of ranks can
read it.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import secrets
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdp_qlora.safetensors_header import Form, header

PIECE = 2 << 20  # bytes that have one checksum; each core's own cache holds them
BLOCK = 4096  # bytes, of which addresses, lengths and places in the file are multiples where a disk reads into memory
PART = ".part-"  # begins the name of a file that is being written
LONGEST_HEADER = 1 << 22  # bytes: of 0.6 TB
IN_MEMORY = 0.9  # of a file; then it is not read from the disk
ABANDONED = 86400  # seconds after which a part is nobody's, where that cannot be told


class Damaged(Exception):
    """A file that cannot be taken: one line saying why."""


@dataclass(frozen=True)
class Contents:
    """What the header of a unit's file says."""

    unit: str
    digest: str  # of the unit's layout and of what it is made from
    nbytes: int  # that the unit's tensors take
    total: int  # `frozen_bytes.checksum` of them
    crcs: tuple[int, ...]  # of each piece

    @property
    def stored(self) -> int:
        """The bytes that follow the header: `nbytes` and zeros."""
        return -(-self.nbytes // BLOCK) * BLOCK

    def header(self) -> bytes:
        notes = {
            "unit": self.unit,
            "digest": self.digest,
            "nbytes": str(self.nbytes),
            "sum": str(self.total),
            "crc32": "".join(f"{crc:08x}" for crc in self.crcs),
        }
        notes["check"] = f"{zlib.crc32(json.dumps(notes).encode()):08x}"
        return header({"bytes": Form(torch.uint8, (self.stored,))}, notes, BLOCK)


def piece_count(nbytes: int) -> int:
    return -(-nbytes // PIECE)


def read_contents(path: Path, digest: str) -> Contents:
    """Return what a file's header says. Raises Damaged unless it and the file's length are what was written for
    `digest`, FileNotFoundError or another OSError where it cannot be read."""
    with path.open("rb", buffering=0) as file:
        length = 8 + int.from_bytes(file.read(8), "little")
        if length % BLOCK or length > LONGEST_HEADER:
            raise Damaged("its header is damaged")
        file.seek(0)
        text = file.read(length)
        size = os.fstat(file.fileno()).st_size
    try:
        notes = json.loads(text[8:])["__metadata__"]
        crcs = tuple(int(notes["crc32"][i : i + 8], 16) for i in range(0, len(notes["crc32"]), 8))
        found = Contents(notes["unit"], notes["digest"], int(notes["nbytes"]), int(notes["sum"]), crcs)
    except (ValueError, KeyError, TypeError):
        raise Damaged("its header is damaged") from None
    if found.header() != text or found.digest != digest or len(crcs) != piece_count(found.nbytes):
        raise Damaged("its header is damaged")
    if size != length + found.stored:
        raise Damaged(f"it has {size} bytes in place of {length + found.stored}")
    return found


class Reading:
    """A unit's file open for reading, by several threads at once.

    What the system has of it in memory is copied from there. Otherwise the disk writes into the place itself where the
    file system can do that: no core copies the bytes, and no memory of the system's is filled with them."""

    def __init__(self, path: Path, contents: Contents) -> None:
        self.contents, self._start = contents, len(contents.header())
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = -1
        if _part_in_memory(self._file, self._start + contents.stored) < IN_MEMORY:
            with suppress(OSError, AttributeError):  # a file system, or a system, without
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def close(self) -> None:
        os.close(self._file)
        if self._direct >= 0:
            os.close(self._direct)

    def read(self, index: int, memory: memoryview, aligned: bool) -> None:
        """Fill `memory` with piece `index` as it is stored. aligned: its address is a multiple of BLOCK.

        Raises Damaged where these are not the bytes that were written, OSError where the disk fails."""
        offset, done = self._start + index * PIECE, 0
        if aligned and self._direct >= 0:
            done = self._read(self._direct, memory, offset, 0)
        done = self._read(self._file, memory, offset, done)
        if done < len(memory):
            raise Damaged("it is cut short")
        if zlib.crc32(memory[: self.contents.nbytes - index * PIECE]) != self.contents.crcs[index]:
            raise Damaged(f"the bytes from {index * PIECE} on are not those that were written")

    def _read(self, file: int, memory: memoryview, offset: int, done: int) -> int:
        """Return how much of `memory` is filled, `done` bytes of which are so already."""
        while done < len(memory):
            try:
                count = os.preadv(file, [memory[done:]], offset + done)
            except OSError as error:
                if file == self._direct and error.errno == errno.EINVAL:  # which cannot do that after all
                    return done
                raise
            done += count
            if count == 0 or (file == self._direct and count % BLOCK):  # the rest is not aligned any more
                return done
        return done


class Writing:
    """A unit's file while it is written, by several threads at once. It has its name once it is whole.

    The part is locked as long as its writer lives, so that others can tell what a killed run has left (`sweep`)."""

    def __init__(self, path: Path, unit: str, digest: str, nbytes: int, total: int) -> None:
        """Make the part. The rest is as in `Contents`. Raises OSError."""
        self._path = path
        self._contents = Contents(unit, digest, nbytes, total, (0,) * piece_count(nbytes))
        self._crcs = list(self._contents.crcs)
        self._start = len(self._contents.header())  # the same with any checksums
        self._part = path.with_name(f"{PART}{secrets.token_hex(8)}")
        self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, index: int, memory: memoryview) -> None:
        """Write piece `index`, whose bytes these are. Raises OSError."""
        self._crcs[index] = zlib.crc32(memory)
        self._write(memory, self._start + index * PIECE)

    def finish(self) -> int:
        """Return the file's length, once all of it is on the disk under its name. Raises OSError."""
        contents = replace(self._contents, crcs=tuple(self._crcs))
        self._write(memoryview(contents.header()), 0)
        length = self._start + contents.stored
        os.ftruncate(self._file, length)  # zeros up to there
        os.fsync(self._file)
        self._part.replace(self._path)
        file, self._file = self._file, -1
        os.close(file)
        return length

    def abandon(self) -> None:
        """Remove the part, if the file is not whole."""
        if self._file >= 0:
            with suppress(OSError):
                self._part.unlink()
            with suppress(OSError):
                os.close(self._file)
            self._file = -1

    def _write(self, memory: memoryview, offset: int) -> None:
        while memory:
            count = os.pwrite(self._file, memory, offset)
            memory, offset = memory[count:], offset + count


def sweep(folder: Path) -> None:
    """Remove what killed runs have left of files in `folder`: parts that nobody holds a lock on."""
    for part in folder.glob(f"{PART}*"):
        with suppress(OSError):
            file = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            except BlockingIOError:  # its writer lives
                pass
            except OSError:  # a file system without locks
                if os.fstat(file).st_mtime < time.time() - ABANDONED:
                    part.unlink()
            finally:
                os.close(file)


def _part_in_memory(file: int, nbytes: int) -> float:
    """Return the part of a file that the system has in memory; 0 where it does not tell."""
    pages = -(-nbytes // mmap.PAGESIZE)
    if _mincore() is None:
        return 0.0
    with suppress(OSError, ValueError), mmap.mmap(file, nbytes, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as mapped:
        seen = np.zeros(pages, np.uint8)
        if _mincore()(np.frombuffer(mapped, np.uint8).ctypes.data, nbytes, seen.ctypes.data) == 0:
            return float(np.count_nonzero(seen & 1)) / pages
    return 0.0


@cache
def _mincore() -> Any:
    """Return the system's function of that name; None where it has none."""
    try:
        found = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    return found
