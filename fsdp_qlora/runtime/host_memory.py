"""Host memory that a rank uses: pages that several ranks share counted once between them."""

import ctypes
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from fsdp_qlora.runtime import control_groups
from fsdp_qlora.units import GIB


def host_memory_gib() -> float:
    """Return this process's proportional set size, GiB: private pages whole, a page shared by n processes as 1/n.

    The sum over ranks is what the job takes from the machine. Resident set size where the kernel does not tell.
    The kernel walks every mapped page for this: about 10 ms per GiB held in 4 KiB pages."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / GIB
    except OSError:
        pass  # not Linux, or a kernel before 4.14
    return psutil.Process(os.getpid()).memory_info().rss / GIB


def available_host_bytes() -> int:
    """Return the host memory still to be had without swapping: the machine's, or a container's or job's if that is
    less."""
    return int(min(psutil.virtual_memory().available, control_groups.free_bytes()))


def total_host_bytes() -> int:
    """Return all the host memory that the machine has, or that a container or job may have if that is less."""
    return int(min(psutil.virtual_memory().total, control_groups.most_bytes()))


def give_back_freed() -> None:
    """Let the machine have what this process has freed. glibc keeps such memory where anything above it in the heap is
    still in use: 0.4 GiB after loading a small model on a CPU. Elsewhere this does nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class HostMemory:
    """Watches `host_memory_gib` from a thread, loading included, for at most 2 % of one core's time.

    `now` is the latest reading, `peak` the highest. A context manager."""

    def __init__(self, interval: float = 0.5) -> None:
        self.now = self.peak = 0.0
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="host memory")

    def read(self) -> float:
        """Return a fresh reading, GiB; counts for the peak too."""
        now = host_memory_gib()  # not by way of `self.now`: the thread may write an older reading there meanwhile
        self.now = now
        self.peak = max(self.peak, now)
        return now

    def __enter__(self) -> "HostMemory":
        self.read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.read()

    def _watch(self) -> None:
        wait = self._interval
        while not self._done.wait(wait):
            start = time.perf_counter()
            self.read()
            wait = max(self._interval, 50 * (time.perf_counter() - start))
