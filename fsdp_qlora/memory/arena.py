"""One piece of device memory for all tensors of a step, each at a place that was found before the first step.

A step asks for the same tensors in the same order every time, so when each is born and when it dies is known ahead: a
`Recorder` notes it while the step runs on the meta device. `layout.place` finds places that take 0 to 2 % more than is
alive at once, where an allocator that is asked as it goes takes up to 15 % and more from step to step
(docs/LOG.md). An `Arena` then hands out the places, in the order of the asking.

A place is used again as soon as the tensor that had it is gone, in the order of the computing stream, as a caching
allocator would do it: code that lets another stream read or write a tensor keeps it until the computing stream waits.
"""

import sys

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm import tqdm

from fsdp_qlora.kernels.device import take_from
from fsdp_qlora.memory.arena_layout import Life, Schedule


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
        """Return the lives so far; what is still alive dies at the end."""
        self._sweep()
        end = len(self._born)
        deaths = [end if death < 0 else death for death in self._deaths]
        return [Life(i, death, *born) for i, (born, death) in enumerate(zip(self._born, deaths, strict=True))]

    def _sweep(self) -> None:
        gone = [number for number, storage in self._alive.items() if storage.expired()]
        for number in gone:
            del self._alive[number]
            self._deaths[number] = len(self._born)


class Arena:
    """Memory for a schedule. `start` before each micro-batch, `stop` after the step.

    A micro-batch of fewer or shorter rows asks for smaller tensors in the same order. One that asks for others takes
    them from PyTorch's allocator from there on, and says so once: it needs more memory, and computes the same."""

    def __init__(self, schedule: Schedule, device: torch.device, memory: Tensor | None = None) -> None:
        """memory: uint8, of at least the schedule's bytes, that it shares; None: it allocates its own."""
        self.nbytes, self.device, self.strayed = schedule.nbytes, device, False
        self._memory = torch.empty(schedule.nbytes, dtype=torch.uint8, device=device) if memory is None else memory
        self._storage = self._memory.untyped_storage()
        self.address = self._memory.data_ptr()
        self._slots = [
            (offset // life.dtype.itemsize, life.nbytes, life.width, life.dtype)
            for life, offset in zip(schedule.lives, schedule.offsets, strict=True)
        ]
        self._next, self._lost = 0, False

    def lend(self, schedule: Schedule) -> "Arena | None":
        """Return an arena for another schedule in the same memory, for between two steps; None if it has not enough."""
        return Arena(schedule, self.device, self._memory) if schedule.nbytes <= self.nbytes else None

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
