"""A GPU that runs what is queued on its streams when it is asked to, in any order that their events allow.

Its tensors are the CPU's. Work queued on a stream really happens only later, so a copy that should have waited brings
or overwrites the wrong bytes.
"""

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fsdp_qlora.memory import host_link
from fsdp_qlora.memory import pinned_pool as host_pool

CUDA = torch.device("cuda", 0)


class Event:
    """Recorded `asked` times; what was queued before a record is over when `reached` has that number."""

    def __init__(self, **_: Any) -> None:
        self.asked = self.reached = 0

    def record(self, stream: "Stream") -> None:
        self.asked += 1
        number = self.asked
        stream.put(lambda: self._reach(number))

    def wait(self, stream: "Stream") -> None:
        number = self.asked  # of now: later records are not waited for
        stream.put(lambda: None, lambda: self.reached >= number)

    def _reach(self, number: int) -> None:
        self.reached = max(self.reached, number)


@dataclass
class Work:
    do: Callable[[], object]
    ready: Callable[[], bool]
    nbytes: int  # of a copy, else 0


@dataclass(eq=False)
class Stream:
    gpu: "SlowGpu"
    cuda_stream: int
    queue: deque[Work] = field(default_factory=deque)

    def put(self, do: Callable[[], object], ready: Callable[[], bool] = lambda: True, nbytes: int = 0) -> None:
        self.queue.append(Work(do, ready, nbytes))

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.gpu.run(until=lambda: not self.queue)


class SlowGpu:
    """streams[0] is the computing stream. seed: of the order in which streams get on; None: as a copy engine takes
    them, each as long as it has copies ready."""

    def __init__(self, seed: int | None = 0) -> None:
        self.random = None if seed is None else random.Random(seed)
        self.streams: list[Stream] = []
        self.copied: list[tuple[int, int]] = []  # (stream, bytes), in order
        self.current = self.new()
        self.status = 0  # of copies that are queued
        self.page_lock: Callable[[torch.Tensor], int] = lambda tensor: 0

    def new(self, device: object = None) -> Stream:
        self.streams.append(Stream(self, len(self.streams) + 1))
        return self.streams[-1]

    def compute(self, do: Callable[[], object]) -> None:
        self.current.put(do)

    def copy(self, to: int, source: int, nbytes: int, handle: int) -> int:
        stream = self.streams[handle - 1]

        def do() -> None:
            self.copied.append((handle, nbytes))
            ctypes.memmove(to, source, nbytes)

        stream.put(do, nbytes=nbytes)
        return self.status

    def run(self, until: Callable[[], bool] = lambda: False, least: int = 0) -> None:
        """Get on until that, or, with `least`, with about as many pieces of work; else with all."""
        done, engine = 0, 0
        while not until() and not (least and done >= least):
            able = [s for s in self.streams if s.queue and s.queue[0].ready()]
            if not able:
                assert not any(s.queue for s in self.streams), "streams wait for each other"
                return
            if self.random is not None:
                stream = self.random.choice(able)
            else:  # all that is no copy takes no time; then the engine's own stream, else the next one's
                order = [s for s in able if not s.queue[0].nbytes] or sorted(
                    able, key=lambda s: (s.cuda_stream - engine) % (len(self.streams) + 1)
                )
                stream = order[0]
            work = stream.queue.popleft()
            engine = stream.cuda_stream if work.nbytes else engine
            work.do()
            done += 1


@contextmanager
def slow_gpu(monkeypatch: pytest.MonkeyPatch, seed: int | None = 0) -> Iterator[SlowGpu]:
    """The program's streams, events and copies are its."""
    gpu, empty = SlowGpu(seed), torch.empty

    def on_host(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return empty(*args, device="meta" if torch.device(device or "cpu").type == "meta" else "cpu", **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", gpu.new)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.current)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(host_pool, "try_page_lock", lambda tensor: gpu.page_lock(tensor))
        patch.setattr(torch, "empty", on_host)
        patch.setattr(host_link, "driver_copy", lambda to_device: gpu.copy)
        yield gpu
