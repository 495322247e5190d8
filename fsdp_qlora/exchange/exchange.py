"""How ranks exchange adapters' gradients and new values: by collectives, or through host memory by copy engines.

Cards without peer access reach each other through host memory, whoever moves the bytes. NCCL moves them with kernels:
they hold multiprocessors, also while they wait for a slower rank, and matrix products that share the card with one take
up to 1.8 times as long. Here the copy engines do it: each rank copies what it sends into page-locked memory that all
ranks of the node see, and the others copy it from there. What has been written and what has been read is told by
numbers in the same memory, which the streams themselves write and wait for; the hosts run ahead and never wait.
"""

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.memory.host_link import MODE
from fsdp_qlora.memory.shared import HostStore, rounded

SLOTS = 2  # exchanges of which a rank's bytes may wait to be read
LINE = 64  # bytes between two counters: ranks write neighbours at the same time
LET_GO = 1 << 30  # exchanges: later than all that a run makes
PROBE_SECONDS = 10.0  # for one exchange of a few bytes
FAILS = "adapters cannot be exchanged through host memory by copy engines"
INSTEAD = "use --exchange_by nccl, beside which products run slower"

# torch 2.13 has new names for these two, and a warning for who uses the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> object:
        """Let the current stream (without a GPU: the caller) go on only when it is done."""
        ...

    def is_completed(self) -> bool: ...


class Exchange(Protocol):
    """What every rank calls in the same order. Nothing is waited for: the tensors must live until the result is.

    widens: whether `whole` of `reduce_scatter` may have a narrower dtype than the sum, which is exact all the same."""

    widens: bool

    def all_gather(self, whole: Tensor, mine: Tensor) -> Pending:
        """whole [ranks x n] becomes every rank's `mine` [n], in rank order; `mine` may be its own part of `whole`."""
        ...

    def reduce_scatter(self, mine: Tensor, whole: Tensor) -> Pending:
        """mine [n] becomes the sum over the ranks of their part `rank` of `whole` [ranks x n]."""
        ...

    def let_go(self) -> None:
        """A rank is gone: what this one's GPU waits for of it must not hold the GPU any longer."""
        ...


class Collectives:
    """torch.distributed's: NCCL between GPUs, gloo between CPUs."""

    widens = False

    def all_gather(self, whole: Tensor, mine: Tensor) -> Pending:
        work: Pending = all_gather(whole, mine, async_op=True)
        return work

    def reduce_scatter(self, mine: Tensor, whole: Tensor) -> Pending:
        work: Pending = reduce_scatter(mine, whole, async_op=True)
        return work

    def let_go(self) -> None:
        pass


@dataclass(frozen=True)
class _Recorded:
    """A point on a stream."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def is_completed(self) -> bool:
        return bool(self.event.query())


class ThroughHost:
    """Copies through page-locked memory that the ranks of one node share, on a stream of their own.

    Exchange number k (from 1) of a rank uses its slot k % SLOTS. For each rank and peer one counter says how many
    exchanges' bytes are in the rank's slots, and one how many of these the peer has read: nobody but the peer waits for
    the first, nobody but the rank for the second. What is summed crosses in its own dtype and is added in that of the
    sum, in an order that depends on the rank alone.
    """

    widens = True

    def __init__(self, nbytes: int, world: World) -> None:
        """nbytes: of the largest `whole` there will be.

        A collective. Raises UserError where the memory cannot be had."""
        self.world, self.count = world, 0
        self._peers = [rank for rank in range(world.size) if rank != world.rank]
        nbytes = max(nbytes, 8 * world.size)  # the probe's
        piece = -(-nbytes // world.size)
        slot, counters = piece * len(self._peers), LINE * 2 * world.size**2
        store = HostStore(store_bytes(nbytes, world.size), world, FAILS, INSTEAD)
        self._slots = [[store.take(slot) for _ in range(SLOTS)] for _ in range(world.size)]
        self._places: dict[tuple[object, ...], Tensor] = {}
        self._counters = store.take(counters).view(torch.int32)[:: LINE // 4]
        self._refused, self._store = store.refused, store
        # A second peer's part, or one in a dtype that is half as wide as the sum's, waits to be added.
        waits = piece if world.size > 2 else piece // 2
        self._received = torch.empty(waits, dtype=torch.uint8, device=world.device)
        # One stream for what this rank sends and one for what it gets, or one for both; and that of the two in use now.
        self._out: torch.cuda.Stream | None = None
        self._in: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None

    def all_gather(self, whole: Tensor, mine: Tensor) -> Pending:
        parts = whole.view(self.world.size, -1)
        self._begin()
        with self._on(self._out):
            if mine.data_ptr() != parts[self.world.rank].data_ptr():
                parts[self.world.rank].copy_(mine)
            self._send([mine])
        with self._on(self._in):
            for peer in self._peers:
                self._receive(parts[peer], peer, 0)
            return self._pending()

    def reduce_scatter(self, mine: Tensor, whole: Tensor) -> Pending:
        parts = whole.view(self.world.size, -1)
        self._begin()
        with self._on(self._out):
            self._send([parts[peer] for peer in self._peers])
        with self._on(self._in):
            own = parts[self.world.rank]
            for i, peer in enumerate(self._peers):
                direct = i == 0 and mine.dtype == own.dtype
                into = mine if direct else self._received[: own.nbytes].view(own.dtype)
                self._receive(into, peer, self.world.rank - (self.world.rank > peer))
                if i == 0 and not direct:
                    mine.copy_(into)
                mine.add_(own if i == 0 else into)
            return self._pending()

    def let_go(self) -> None:
        for peer in self._peers:
            self._counters[self._written(peer, self.world.rank)] = LET_GO
            self._counters[self._read(self.world.rank, peer)] = LET_GO

    def fault(self) -> str:
        """What keeps bytes from crossing, the same words on every rank; "" where they do. A collective."""
        said = ""
        try:
            self._probe()
        except (RuntimeError, OSError, AttributeError) as error:  # the last two: a driver that lacks these calls
            said = first_line(error)
            self.let_go()
        faults = [""] * self.world.size
        dist.all_gather_object(faults, said)
        return next(filter(None, faults), "")

    def _probe(self) -> None:
        if self._refused:
            raise RuntimeError(f"the system refuses to page-lock memory for it, CUDA error {self._refused}")
        self._open()
        whole = torch.full((self.world.size,), -1, dtype=torch.int64, device=self.world.device)
        whole[self.world.rank] = self.world.rank
        crossing, start = self.all_gather(whole, whole[self.world.rank, None]), time.monotonic()
        while not crossing.is_completed():
            if time.monotonic() > start + PROBE_SECONDS:
                raise RuntimeError(f"nothing came within {PROBE_SECONDS:.0f} s")
            time.sleep(0.001)
        crossing.wait()
        if whole.tolist() != list(range(self.world.size)):
            raise RuntimeError("other bytes came than were sent")

    def _send(self, parts: Sequence[Tensor]) -> None:
        """One part for each peer, or one for all."""
        for peer in self._peers:
            self._await(self._read(self.world.rank, peer), self.count - SLOTS)
        for i, part in enumerate(parts):
            self._place(self.world.rank, i, part).copy_(part, non_blocking=True)
        for peer in self._peers:
            self._tell(self._written(self.world.rank, peer))

    def _receive(self, into: Tensor, peer: int, place: int) -> None:
        self._await(self._written(peer, self.world.rank), self.count)
        into.copy_(self._place(peer, place, into), non_blocking=True)
        self._tell(self._read(peer, self.world.rank))

    def _place(self, rank: int, number: int, like: Tensor) -> Tensor:
        """In the rank's slot of this exchange, the part of that number; parts are as large as `like`."""
        key = rank, self.count % SLOTS, number, like.nbytes, like.dtype
        if key not in self._places:
            slot = self._slots[rank][self.count % SLOTS]
            self._places[key] = slot[number * like.nbytes : (number + 1) * like.nbytes].view(like.dtype)
        return self._places[key]

    def _written(self, rank: int, peer: int) -> int:
        return self.world.size * rank + peer

    def _read(self, rank: int, peer: int) -> int:
        return self.world.size * (self.world.size + rank) + peer

    # What follows is the GPU's.

    def _open(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait_value, self._write_value = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for call in (self._wait_value, self._write_value):  # (stream, address, value, flags)
            call.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
        self._out = self._in = torch.cuda.Stream(self.world.device)
        if MODE == "duplex":
            self._in = torch.cuda.Stream(self.world.device)

    def _begin(self) -> None:
        """Start one exchange, after what is on the current stream now."""
        self.count += 1
        assert self._out is not None
        here = torch.cuda.current_stream(self.world.device).record_event()
        self._out.wait_event(here)
        if self._in is not None and self._in is not self._out:
            self._in.wait_event(here)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Queue there what is queued inside."""
        self._stream = stream
        with torch.cuda.stream(stream):
            yield

    def _pending(self) -> Pending:
        """Mark the end of the exchange: all has come and all has been sent."""
        assert self._in is not None
        assert self._out is not None
        if self._in is not self._out:
            self._in.wait_stream(self._out)
        return _Recorded(self._in.record_event(), self.world.device)

    def _await(self, counter: int, value: int) -> None:
        """The stream goes on when the counter has reached `value` (the driver's default comparison, >=)."""
        if value > 0:
            self._call(self._wait_value, counter, value)

    def _tell(self, counter: int) -> None:
        """The counter becomes `count` when all before this on the stream is done and can be seen by others."""
        self._call(self._write_value, counter, self.count)

    def _call(self, call: Any, counter: int, value: int) -> None:
        assert self._stream is not None
        status = call(self._stream.cuda_stream, self._counters.data_ptr() + LINE * counter, value, 0)
        if status != 0:
            raise RuntimeError(f"{call.__name__}: CUDA error {status}")


def store_bytes(nbytes: int, ranks: int) -> int:
    """Host memory that `ThroughHost` takes of a node."""
    slot = -(-nbytes // ranks) * (ranks - 1)
    return ranks * SLOTS * rounded(slot) + rounded(LINE * 2 * ranks**2)


def through_host(options: MemoryOptions, world: World) -> bool:
    """Whether adapters shall be exchanged through host memory, for all that this rank can see of its machine."""
    if options.exchange_by != "auto":
        return options.exchange_by == "host"
    if world.device.type != "cuda" or world.size == 1 or world.local_size != world.size:
        return False
    return not _peer_access(world)


def check_exchange(options: MemoryOptions, world: World) -> None:
    """Raises UserError where `exchange_by` asks for what this launch cannot do."""
    if options.exchange_by == "auto":
        return
    if world.size == 1 or world.device.type != "cuda":
        where = "without GPUs" if world.device.type != "cuda" else "on one rank"
        raise UserError(f"exchange_by: {options.exchange_by} has no effect {where}; leave it away")
    if options.exchange_by == "host" and world.local_size != world.size:
        raise UserError("exchange_by: host is for ranks of one node, and these are several; take auto or nccl")


def _peer_access(world: World) -> bool:
    """Whether the node's GPUs reach each other's memory: NVLink, or PCI Express where the driver lets them.

    Taken as given where this process sees its own GPU alone."""
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    if torch.cuda.device_count() < world.local_size:
        return True
    here = world.device.index
    return all(torch.cuda.can_device_access_peer(here, other) for other in range(world.local_size) if other != here)


def choose_exchange(nbytes: int, options: MemoryOptions, world: World) -> Exchange:
    """nbytes: of the largest tensor there will be. A collective.

    Where the system refuses what the options ask for raises UserError, what they leave open says so once."""
    if not all(wanted for (wanted,) in world.gather([through_host(options, world)])):
        return Collectives()
    try:
        exchange = ThroughHost(nbytes, world)
        fault = exchange.fault()
    except UserError:
        if options.exchange_by == "host":
            raise
        fault = "no memory that ranks can share"
    if not fault:
        return exchange
    if options.exchange_by == "host":
        raise UserError(f"{FAILS} ({fault}): {INSTEAD}").on_every_rank(world.rank)
    world.say(f"{FAILS} ({fault}): NCCL does it, beside which products run slower")
    return Collectives()
