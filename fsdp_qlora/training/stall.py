"""A line for the user where a step takes far longer than those before it: a rank may hang, which no other can tell."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from fsdp_qlora.distributed.world import World

LEAST_SECONDS = 120.0  # that a step may take without a word
TIMES = 20  # and so many times the longest step before it
LOOK_SECONDS = 1.0


class StallNotice:
    """A context manager around the steps of a run; a thread of the first rank of each node looks at its clock."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._left = threading.Event()
        self._step, self._longest = 0, 0.0
        self._since: float | None = None  # None: no step is waited for, or it has been told

    def __enter__(self) -> "StallNotice":
        if self._world.size > 1 and self._world.local_rank == 0:
            threading.Thread(target=self._watch, daemon=True, name="stall notice").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()

    def ended(self, step: int, seconds: float) -> None:
        """Note a step that has ended; the first, which compiles kernels, is only the measure of the next."""
        self._step, self._longest, self._since = step, max(self._longest, seconds), time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for no step meanwhile."""
        self._since = None
        yield
        self._since = time.monotonic()

    def _watch(self) -> None:
        while not self._left.wait(LOOK_SECONDS):
            since = self._since
            if since is None or time.monotonic() - since < max(LEAST_SECONDS, TIMES * self._longest):
                continue
            self._since = None
            tqdm.write(
                f"rank {self._world.rank}: step {self._step + 1} has not ended for {time.monotonic() - since:.0f} s, "
                f"the longest before it took {self._longest:.1f} s: a rank, its node or the network may hang; Ctrl-C "
                "ends the run and saves the adapter",
                file=sys.stderr,
            )
