"""All-gather of new adapter values, behind the next forward: each block waits for its own adapters alone."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Exchange, Pending
from fsdp_qlora.optim.adapter_group import AdapterGroup

INITIAL_GATHERS = 8  # all-gathers started by `start`; each block's forward starts one more, while the GPU has work
ARRIVAL_SECONDS = 1.0  # after which values that have not arrived never will (1.7 GB at 70B and rank 64: 0.1 s)


class ParameterGather:
    """The all-gathers of one step's new values, in forward order."""

    def __init__(self, groups: Sequence[AdapterGroup], exchange: Exchange, world: World) -> None:
        self.groups, self.exchange, self.world = groups, exchange, world
        self._started: list[Pending] = []  # since the last `start`
        self._unsent: deque[AdapterGroup] = deque()  # whose new values are still to be gathered
        self._start_time = 0.0  # of the last `start`
        on_gpu = world.device.type == "cuda"
        self._side = torch.cuda.Stream(world.device) if on_gpu and world.size > 1 else None

    def start(self) -> None:
        """Start the gathers of the first blocks."""
        self._started, self._unsent, self._start_time = [], deque(self.groups), time.monotonic()
        for _ in range(min(INITIAL_GATHERS, len(self.groups))):
            self._start_next()

    def before_forward(self, group: AdapterGroup) -> None:
        """Start one more gather, and make the current stream wait for the group's own."""
        if self._unsent:
            self._start_next()
        while group in self._unsent:  # where blocks before it were left out
            self._start_next()
        group.wait()

    def wait(self) -> None:
        """Start all gathers that are left, and make the current stream wait for all of them."""
        while self._unsent:
            self._start_next()
        for group in self.groups:
            group.wait()

    def check_done(self) -> None:
        still = self._unsent or any(group.gather is not None for group in self.groups)
        assert not still, "what is still being gathered would be overwritten"

    def has_arrived(self) -> bool:
        """Return whether all values of the last `start` are in the working copies, for when a peer may be gone.

        Safe from any thread. Waits for gathers that may still complete, until `ARRIVAL_SECONDS` after their start."""
        while self._unsent or not all(pending.is_completed() for pending in self._started):
            if time.monotonic() > self._start_time + ARRIVAL_SECONDS:
                return False
            time.sleep(0.01)
        try:
            for pending in self._started:
                pending.wait()  # returns at once, as it is over: with an error where that is how it ended
        except RuntimeError:
            return False
        return True

    def _start_next(self) -> None:
        group = self._unsent.popleft()
        with self._behind(group.updated):
            group.gather = self.exchange.all_gather(group.working, group.shard)
        self._started.append(group.gather)

    @contextmanager
    def _behind(self, point: torch.cuda.Event | None) -> Iterator[None]:
        """Queue what is queued inside behind that point alone, whatever else is on the current stream by now."""
        if self._side is None or point is None:
            yield
            return
        self._side.wait_event(point)
        with torch.cuda.stream(self._side):
            yield
