"""Threads that bring pieces of a unit between its file and the memory that it is in, on the host or on a GPU."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fsdp_qlora.memory.pinned import large_pages, try_page_lock
from fsdp_qlora.weights.base_cache.unit_file import BLOCK, PIECE, Reading, Writing, piece_count

MOST, LEAST = 16, 4  # threads: so many reads a fast disk wants to have at once, and so many a slow one


class _Lane(threading.local):
    """What a thread has for itself, made when it first needs it."""

    bounce: Tensor | None = None  # uint8 [PIECE] in host memory, pinned where there is a GPU
    stream: "torch.cuda.Stream | None" = None


class Lanes:
    """The threads of one rank. A context manager; what has not been begun at its end is left undone."""

    def __init__(self, threads: int, device: torch.device) -> None:
        self._device, self._lane = device, _Lane()
        self.lacks_pinned = False  # whether the system refused to pin a bounce buffer
        start = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="base cache", initializer=start)

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def fetch(self, file: Reading, memory: Tensor, start: int) -> list[Future[None]]:
        """Begin to fill `memory` with a unit's bytes from `start` on; those after its tensors are zeros.

        memory: uint8 [n], contiguous, on the CPU or the lanes' GPU. It is filled once every result is there; results
        raise Damaged and OSError."""
        ready, end = self._event(memory), min(file.contents.nbytes, start + memory.numel())
        memory[max(0, end - start) :].zero_()
        pieces = range(start // PIECE, piece_count(end)) if start < end else ()
        return [self._pool.submit(self._read, file, index, memory, start, ready) for index in pieces]

    def store(self, file: Writing, whole: Tensor, nbytes: int) -> None:
        """Return once the first `nbytes` of a unit's bytes are written. Raises OSError.

        whole: uint8 [nbytes or more], contiguous, on the CPU or the lanes' GPU."""
        ready = self._event(whole)
        results([self._pool.submit(self._write, file, i, whole[:nbytes], ready) for i in range(piece_count(nbytes))])

    def _read(self, file: Reading, index: int, memory: Tensor, start: int, ready: "torch.cuda.Event | None") -> None:
        first = index * PIECE
        stored, last = min(PIECE, file.contents.stored - first), min(first + PIECE, file.contents.nbytes)
        low, high = max(first, start), min(last, start + memory.numel())
        target = memory[low - start : high - start]
        if ready is None and high - low == stored and target.data_ptr() % BLOCK == 0:
            file.read(index, memoryview(target.numpy()), aligned=True)  # type: ignore[arg-type]
            return
        bounce = self._bounce()
        file.read(index, memoryview(bounce[:stored].numpy()), aligned=True)  # type: ignore[arg-type]
        self._copy(target, bounce[low - first : high - first], ready)

    def _write(self, file: Writing, index: int, whole: Tensor, ready: "torch.cuda.Event | None") -> None:
        piece = whole[index * PIECE : (index + 1) * PIECE]
        if ready is not None:
            bounce = self._bounce()[: piece.numel()]
            self._copy(bounce, piece, ready)
            piece = bounce
        file.write(index, memoryview(piece.numpy()))  # type: ignore[arg-type]

    def _copy(self, target: Tensor, source: Tensor, ready: "torch.cuda.Event | None") -> None:
        if ready is None:
            np.copyto(target.numpy(), source.numpy())  # on this thread alone
            return
        stream = self._lane.stream = self._lane.stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            target.copy_(source, non_blocking=True)
        stream.synchronize()

    def _bounce(self) -> Tensor:
        if self._lane.bounce is None:
            self._lane.bounce = large_pages(PIECE)
            if self._device.type == "cuda" and try_page_lock(self._lane.bounce) != 0:
                self.lacks_pinned = True
        return self._lane.bounce

    def _event(self, memory: Tensor) -> "torch.cuda.Event | None":
        """Return what the lanes' streams have to wait for: the memory may be in use up to now. None on the CPU."""
        return torch.cuda.current_stream(self._device).record_event() if memory.is_cuda else None


def results(futures: Iterable[Future[None]]) -> None:
    """Return once all have ended. Raises what one of them did."""
    errors = [error for error in [future.exception() for future in futures] if error is not None]
    if errors:
        raise errors[0]
