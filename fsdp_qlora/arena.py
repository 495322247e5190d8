"""One piece of device memory for all tensors of a step, each at a place that was found before the first step.

A step asks for the same tensors in the same order every time, so when each is born and when it dies is known ahead: a
`Recorder` notes it while the step runs on the meta device. `place` lays them out, the largest first, each in the
tightest gap among those that live at the same time; that takes 0 to 1 % more than is alive at once, where an allocator
that is asked as it goes takes up to 15 % and more from step to step (docs/performance.md). An `Arena` then hands out
the places, in the order of the asking.

A place is used again as soon as the tensor that had it is gone, in the order of the computing stream, as a caching
allocator would do it: whoever lets another stream read or write a tensor keeps it until the computing stream waits.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm import tqdm

from fsdp_qlora.kernels.device import take_from

ALIGN = 512  # bytes: a tensor's place begins on a multiple, as in PyTorch's allocator


class Life(NamedTuple):
    """A tensor of the step: born at request number `birth`, gone before number `death`. width: of its last axis."""

    birth: int
    death: int
    nbytes: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Schedule:
    """The tensors of a step in the order in which they are asked for, the offset of each, and the bytes of all."""

    lives: tuple[Life, ...]
    offsets: tuple[int, ...]
    nbytes: int


class Recorder:
    """Source of meta tensors (`device.take_from`) that notes their lives."""

    def __init__(self) -> None:
        self._born: list[tuple[int, int, torch.dtype]] = []  # bytes, width, dtype of each request
        self._deaths: list[int] = []
        self._alive: dict[int, StorageWeakRef] = {}  # by number of the request

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self._sweep()
        tensor = torch.empty(shape, dtype=dtype, device=device)
        number = len(self._born)
        self._born.append((tensor.nbytes, shape[-1] if shape else 1, dtype))
        self._deaths.append(-1)
        self._alive[number] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def lives(self) -> list[Life]:
        """Return the lives so far; who is still alive dies at the end."""
        self._sweep()
        end = len(self._born)
        deaths = [end if death < 0 else death for death in self._deaths]
        return [Life(i, death, *born) for i, (born, death) in enumerate(zip(self._born, deaths, strict=True))]

    def _sweep(self) -> None:
        gone = [number for number, storage in self._alive.items() if storage.expired()]
        for number in gone:
            del self._alive[number]
            self._deaths[number] = len(self._born)


def most_alive(lives: Sequence[Life]) -> int:
    """Return the most bytes alive at once: no layout takes less."""
    change = numpy.zeros(len(lives) + 1, dtype=numpy.int64)
    for life in lives:
        change[life.birth] += _aligned(life.nbytes)
        change[life.death] -= _aligned(life.nbytes)
    return int(change.cumsum().max(initial=0))


def place(lives: Sequence[Life]) -> Schedule:
    """Lay tensors out: the largest first, ties by birth, each in the tightest gap that is free all its life."""
    births, deaths = (numpy.array([life[i] for life in lives], dtype=numpy.int64) for i in range(2))
    sizes = numpy.array([_aligned(life.nbytes) for life in lives], dtype=numpy.int64)
    order = numpy.lexsort((births, -sizes))
    births, deaths, sizes = births[order], deaths[order], sizes[order]
    starts = numpy.zeros(len(lives), dtype=numpy.int64)
    for i, size in enumerate(sizes):
        beside = (births[:i] < deaths[i]) & (deaths[:i] > births[i])
        starts[i] = _tightest(starts[:i][beside], sizes[:i][beside], int(size))
    offsets = numpy.empty(len(lives), dtype=numpy.int64)
    offsets[order] = starts
    return Schedule(tuple(lives), tuple(offsets.tolist()), int((starts + sizes).max(initial=0)))


def _tightest(starts: numpy.ndarray, sizes: numpy.ndarray, size: int) -> int:
    """Return the start of the smallest gap of `size` between pieces, or the end of the last."""
    if not len(starts):
        return 0
    order = starts.argsort()
    starts, ends = starts[order], numpy.maximum.accumulate((starts + sizes)[order])
    before = numpy.concatenate(([0], ends[:-1]))
    gaps = starts - before
    gaps[gaps < size] = numpy.iinfo(numpy.int64).max
    tightest = int(gaps.argmin())
    fits = gaps[tightest] < numpy.iinfo(numpy.int64).max
    return int(before[tightest]) if fits else int(ends[-1])


class Arena:
    """Memory for a schedule. `start` before each micro-batch, `stop` after the step.

    A micro-batch of fewer or shorter rows asks for smaller tensors in the same order. One that asks for others takes
    them from PyTorch's allocator from there on, and says so once: it needs more memory, and computes the same."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.nbytes, self.device, self.strayed = schedule.nbytes, device, False
        self._memory = torch.empty(schedule.nbytes, dtype=torch.uint8, device=device)
        self._storage = self._memory.untyped_storage()
        self.address = self._memory.data_ptr()
        self._slots = [
            (offset // life.dtype.itemsize, life.nbytes, life.width, life.dtype)
            for life, offset in zip(schedule.lives, schedule.offsets, strict=True)
        ]
        self._next, self._lost = 0, False

    def start(self) -> None:
        self._next, self._lost = 0, False
        take_from(self)

    def stop(self) -> None:
        take_from(None)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.empty(0, dtype=dtype, device=device)
        if not self._lost and self._next < len(self._slots) and device == self.device:
            offset, nbytes, width, planned = self._slots[self._next]
            self._next += 1
            # Of a storage of its own, not a view: autograd gives views of one tensor a common version.
            if planned == dtype and (not shape or shape[-1] == width):
                tensor.set_(self._storage, offset, shape, ())
                if tensor.nbytes <= nbytes:
                    return tensor
        self._stray(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def _stray(self, shape: tuple[int, ...]) -> None:
        self._lost = True
        if not self.strayed:
            self.strayed = True
            tqdm.write(
                f"a step asks for a tensor {list(shape)} that was not planned (request {self._next} of "
                f"{len(self._slots)}): PyTorch's allocator gives it and those after it, in memory that the plan does "
                "not count. Please report this with your options",
                file=sys.stdout,
            )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
