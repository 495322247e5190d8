"""A unit's file: its bytes as a safetensors file of one tensor, checked piece by piece while they are read.

The check is a CRC-32 for each piece, as of checkpoints, and not only the sum that `FrozenBytes` keeps: a sum stays the
same where two pages have changed places, which is one of the ways in which disks and file systems go wrong. It is
computed while the piece is in the core's cache (`benchmarks/base_cache.py` tells its rate).

The sum of the encoder's own bytes comes from where they were encoded, before they are copied to be written. Each
piece's words are summed up after its CRC, and a file whose sums do not make up that total never gets its name: so what
passes the CRCs is what was encoded, and a bit that flips on the way to the disk costs a file and no later start.

The zeros at the end of a unit, which are as many as ranks ask for, are not in the file, so that any number of ranks can
read it.
"""

import ctypes
import errno
import json
import mmap
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdp_qlora.safetensors_header import Form, header
from fsdp_qlora.weights.base_cache.part import make_part

PIECE = 2 << 20  # bytes that have one checksum; each core's own cache holds them
BLOCK = 4096  # bytes, of which addresses, lengths and places in the file are multiples where a disk reads into memory
LONGEST_HEADER = 1 << 22  # bytes: of 0.6 TB
IN_MEMORY = 0.9  # of a file; then it is not read from the disk
WORDS = 1 << 64  # to which sums of words are taken, as by `frozen_bytes.checksum`


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
    sums: tuple[int, ...]  # of each piece's words

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
            "sums": "".join(f"{words:016x}" for words in self.sums),
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
        crcs, sums = _numbers(notes["crc32"], 8), _numbers(notes["sums"], 16)
        found = Contents(notes["unit"], notes["digest"], int(notes["nbytes"]), int(notes["sum"]), crcs, sums)
    except (ValueError, KeyError, TypeError):
        raise Damaged("its header is damaged") from None
    counts = {len(crcs), len(sums), piece_count(found.nbytes)}
    if found.header() != text or found.digest != digest or len(counts) != 1:
        raise Damaged("its header is damaged")
    if sum(sums) % WORDS != found.total % WORDS:
        raise Damaged("its bytes do not make up the sum of those that were encoded")
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
        self._direct, self.lacks_direct = -1, False  # whether the disk cannot write into the place itself
        if _part_in_memory(self._file, self._start + contents.stored) < IN_MEMORY:
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except (OSError, AttributeError):  # a file system, or a system, without
                self.lacks_direct = True

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
        memory = memory[: self.contents.nbytes - index * PIECE]
        if zlib.crc32(memory) != self.contents.crcs[index] or _sum_of_words(memory) != self.contents.sums[index]:
            raise Damaged(f"the bytes from {index * PIECE} on are not those that were written")

    def _read(self, file: int, memory: memoryview, offset: int, done: int) -> int:
        """Return how much of `memory` is filled, `done` bytes of which are so already."""
        while done < len(memory):
            try:
                count = os.preadv(file, [memory[done:]], offset + done)
            except OSError as error:
                if file == self._direct and error.errno == errno.EINVAL:  # which cannot do that after all
                    self.lacks_direct = True
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
        self._path, empty = path, (0,) * piece_count(nbytes)
        self._contents = Contents(unit, digest, nbytes, total, empty, empty)
        self._crcs, self._sums = list(empty), list(empty)
        self._start = len(self._contents.header())  # the same with any checksums
        self._part, self._file = make_part(path.parent)
        self._whole: object = None  # what tells the file from another run's, once it has its name

    def write(self, index: int, memory: memoryview) -> None:
        """Write piece `index`, whose bytes these are. Raises OSError."""
        self._crcs[index] = zlib.crc32(memory)
        self._sums[index] = _sum_of_words(memory)  # after the CRC: of bytes that change in between, no file is made
        self._write(memory, self._start + index * PIECE)

    def finish(self) -> int:
        """Return the file's length, once all of it is on the disk under its name; 0 where another program has removed
        it meanwhile.

        Raises Damaged where it is not what was encoded, OSError where the disk fails."""
        if sum(self._sums) % WORDS != self._contents.total % WORDS:
            raise Damaged("its bytes were changed on their way to the disk (copy or memory)")
        contents = replace(self._contents, crcs=tuple(self._crcs), sums=tuple(self._sums))
        self._write(memoryview(contents.header()), 0)
        length = self._start + contents.stored
        os.ftruncate(self._file, length)  # zeros up to there
        os.fsync(self._file)
        try:
            self._part.replace(self._path)
        except FileNotFoundError:
            return 0
        self._whole = _identity(os.fstat(self._file))
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

    def take_back(self) -> None:
        """Remove what was written, whole or not; another run's file of the same name stays."""
        self.abandon()
        with suppress(OSError):
            if self._whole is not None and _identity(self._path.stat()) == self._whole:
                self._path.unlink()
        self._whole = None

    def _write(self, memory: memoryview, offset: int) -> None:
        while memory:
            count = os.pwrite(self._file, memory, offset)
            memory, offset = memory[count:], offset + count


def _identity(stat: os.stat_result) -> object:
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def _numbers(text: str, digits: int) -> tuple[int, ...]:
    return tuple(int(text[i : i + digits], 16) for i in range(0, len(text), digits))


def _sum_of_words(memory: memoryview) -> int:
    """Return the sum of the 64-bit words of bytes, as many as a multiple of 8."""
    return int(np.frombuffer(memory, np.uint64).sum(dtype=np.uint64))


def _part_in_memory(file: int, nbytes: int) -> float:
    """Return the part of a file that the system has in memory; 0 where it does not tell.

    Of another user's file it says that all is, whatever there is (Linux since 5.2, for what it would give away)."""
    pages = -(-nbytes // mmap.PAGESIZE)
    if _mincore() is None or os.fstat(file).st_uid != os.geteuid():
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
