"""Host memory that all ranks of a node share: pinned once by each, as long as anything has it, freed with them.

The memory is a memfd: it has no name, so nothing can be left behind in /dev/shm, whatever kills the ranks, and a
container's small /dev/shm does not limit it. The first rank of the node makes it; its peers open it through /proc,
which needs no more than the same user. Its pages are filled in ahead of use by a thread of each rank, for the kernel
takes longer to clear 35 GB than a disk to read them.
"""

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.memory.pinned import PAGE, POPULATE_STEP, ask_large_pages, populate, try_page_lock
from fsdp_qlora.runtime.background import do_in_order
from fsdp_qlora.units import as_gib

LOCKERS = 2  # threads that page-lock pieces ahead
NAME = "fsdp_qlora"  # seen in /proc alone
MFD_NOEXEC_SEAL = 8  # Linux 6.3 and later; some systems demand it
BASE = "the frozen base cannot be streamed"
INSTEAD = "use --use_cpu_offload true --cpu_offload_by fsdp2, which shares none"


class HostStore:
    """Memory that every rank of a node sees.

    `take` hands out pieces, in the same order on every rank. A piece is page-locked until the last tensor that has its
    memory goes; the store itself may go before.

    refused: 0, or CUDA's error code where the system refused to page-lock: copies from it are then slower, but right.
    """

    def __init__(
        self, nbytes: int, world: World, fails: str = BASE, instead: str = INSTEAD, pieces: Sequence[int] = ()
    ) -> None:
        """Map the memory. fails, instead: what cannot be done without this memory and what can, for messages. pieces:
        bytes of those that will be taken first, in order: threads pin them ahead.

        A collective. Raises UserError on every rank where the memory cannot be had."""
        self.world, self.nbytes, self.refused = world, nbytes, 0
        self._fails, self._instead = fails, instead
        self._taken = 0
        self._ahead: deque[tuple[Tensor, Future[None]]] = deque()  # pieces, and whether they have been page-locked
        descriptor = world.together(lambda: self._make(nbytes) if world.local_rank == 0 else -1)
        pid, number = world.gather([os.getpid(), descriptor])[world.rank - world.local_rank]
        self._map = world.together(lambda: self._open(int(pid), int(number)))
        if descriptor >= 0:
            os.close(descriptor)  # every rank has mapped it
        threading.Thread(target=_populate, args=(self._map, world), daemon=True, name="host store").start()
        if world.device.type == "cuda":
            self._lock_ahead(pieces)

    def take(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes], on pages of its own, pinned for this rank if it has a GPU."""
        assert self._taken + nbytes <= self.nbytes, "the store was made too small"
        start, self._taken = self._taken, self._taken + rounded(nbytes)
        if self._ahead:
            piece, locked = self._ahead.popleft()
            assert piece.nbytes == nbytes, "another piece was page-locked ahead"
            locked.result()
            return piece
        piece = self._piece(start, nbytes)
        if self.world.device.type == "cuda":
            self._lock(piece)
        return piece

    def _piece(self, offset: int, nbytes: int) -> Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)

    def _lock(self, piece: Tensor) -> None:
        if not self.refused and (status := try_page_lock(piece)) != 0:  # threads only ever set it
            self.refused = status

    def _lock_ahead(self, sizes: Sequence[int]) -> None:
        offsets = accumulate(map(rounded, sizes), initial=0)
        pieces = [self._piece(offset, nbytes) for offset, nbytes in zip(offsets, sizes, strict=False)]
        locking = do_in_order([partial(self._lock, piece) for piece in pieces], LOCKERS, self.world.device)
        self._ahead.extend(zip(pieces, locking, strict=True))

    def share(self, nbytes: int) -> slice:
        """Return the part of a piece of `nbytes` that this rank writes where all ranks have its contents."""
        step = rounded(-(-nbytes // self.world.local_size))
        return slice(min(nbytes, step * self.world.local_rank), min(nbytes, step * (self.world.local_rank + 1)))

    def _make(self, nbytes: int) -> int:
        """Return a descriptor of fresh memory; -1 where this rank shares it with none."""
        if self.world.local_size == 1:
            return -1
        if not hasattr(os, "memfd_create"):
            raise UserError(f"{self._fails}: this system has no memory without a name; {self._instead}")
        try:
            try:
                descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | MFD_NOEXEC_SEAL)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a kernel before 6.3
                    raise
                descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
            os.ftruncate(descriptor, nbytes)
        except OSError as error:
            raise self._unavailable(error) from error
        return descriptor

    def _open(self, pid: int, number: int) -> mmap.mmap:
        try:
            if number < 0:
                return mmap.mmap(-1, self.nbytes)
            place = f"/proc/{pid}/fd/{number}"
            if not os.readlink(place).startswith(f"/memfd:{NAME}"):  # a process of another namespace, with that number
                raise FileNotFoundError(errno.ENOENT, "no such memory", place)
            mine = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            try:
                return mmap.mmap(mine, self.nbytes)
            finally:
                os.close(mine)
        except (OSError, ValueError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> UserError:
        full = getattr(error, "errno", None) in (errno.ENOMEM, errno.ENOSPC)
        cure = "free some memory or raise the container's limit" if full else "the system forbids it"
        return UserError(
            f"{self._fails}: {as_gib(self.nbytes, 2)} of host memory cannot be shared among "
            f"the ranks of a node ({first_line(error)}): {cure}, or {self._instead}"
        )


def _populate(memory: mmap.mmap, world: World) -> None:
    """Make the kernel clear this rank's share of the pages, in the order in which they will be written."""
    start, nbytes = torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), len(memory)
    ask_large_pages(start, nbytes)
    for offset in range(world.local_rank * POPULATE_STEP, nbytes, world.local_size * POPULATE_STEP):
        if not populate(start + offset, min(POPULATE_STEP, nbytes - offset)):
            return


def rounded(nbytes: int) -> int:
    """Return the bytes that a piece of `nbytes` takes of a store."""
    return -(-nbytes // PAGE) * PAGE
