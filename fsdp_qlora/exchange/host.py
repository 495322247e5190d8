"""Exchange through host memory, carried by the copy engines of the GPUs.

Cards without peer access reach each other through host memory in any case. NCCL moves the bytes with kernels: they
occupy multiprocessors, also while they wait for a slower rank, and a matmul that runs at the same time takes up to 1.8
times as long. Copy engines leave the multiprocessors free: each rank copies what it sends into pinned memory that all
ranks of the node map, and its peers copy it from there. Counters in the same memory say what has been written and what
has been read. The streams themselves write them and wait for them, so the hosts run ahead and never wait.
"""

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import first_line
from fsdp_qlora.exchange.base import Pending
from fsdp_qlora.memory.host_link import TRAFFIC, driver_copy
from fsdp_qlora.memory.shared import HostStore, rounded

SLOTS = 2  # exchanges of a rank whose bytes may wait for a peer to read them
LINE = 64  # bytes between two counters: ranks write adjacent ones at the same time
RELEASED = 1 << 30  # a counter's value, in exchanges: more than any run makes
PROBE_SECONDS = 10.0  # for one exchange of a few bytes
FAILS = "adapters cannot be exchanged through host memory by copy engines"
INSTEAD = "use --exchange_by nccl, beside which products run slower"


@dataclass(frozen=True)
class _Recorded:
    """A point on a stream."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def is_completed(self) -> bool:
        return bool(self.event.query())


class HostExchange:
    """Copies through pinned memory that the ranks of one node share, on a stream of their own.

    Exchange number k (from 1) of a rank uses its slot k % SLOTS. For each pair of a rank and a peer there are two
    counters: how many exchanges' bytes the rank has written, for which only the peer waits, and how many of these the
    peer has read, for which only the rank waits. Gradients cross in their own dtype and are added in that of the sum,
    in an order that depends on the rank alone.
    """

    widens = True

    def __init__(self, nbytes: int, world: World) -> None:
        """Map and pin the shared memory. nbytes: of the largest `whole` that will be exchanged.

        A collective. Raises UserError where the memory cannot be had."""
        self.world, self.count = world, 0
        self._peers = [rank for rank in range(world.size) if rank != world.rank]
        nbytes = max(nbytes, 8 * world.size)  # the probe's
        part = -(-nbytes // world.size)
        self._most_bytes = part  # of a rank's part
        slot, counters = part * len(self._peers), LINE * 2 * world.size**2
        store = HostStore(store_bytes(nbytes, world.size), world, FAILS, INSTEAD)
        self._memory = [[store.take(slot) for _ in range(SLOTS)] for _ in range(world.size)]
        self._slots = [[piece.data_ptr() for piece in pieces] for pieces in self._memory]  # addresses
        self._counters = store.take(counters).view(torch.int32)[:: LINE // 4]
        self._first_counter = self._counters.data_ptr()
        self._refused = store.refused
        # Staging for a second peer's part, or for one in a dtype that is half as wide as the sum's.
        staged = part if world.size > 2 else part // 2
        self._received = torch.empty(staged, dtype=torch.uint8, device=world.device)
        self._stream: torch.cuda.Stream | None = None

    def all_gather(self, whole: Tensor, shard: Tensor) -> Pending:
        nbytes, rank, first = self._part_bytes(whole), self.world.rank, whole.data_ptr()
        assert shard.nbytes == nbytes
        assert shard.dtype == whole.dtype
        assert shard.is_contiguous()
        self._begin()
        if shard.data_ptr() != first + rank * nbytes:
            with self._on_stream():
                whole.view(self.world.size, -1)[rank].copy_(shard)
        self._send([shard.data_ptr()], nbytes)
        for peer in self._peers:
            self._receive(first + peer * nbytes, peer, 0, nbytes)
        return self._pending()

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> Pending:
        nbytes, first = self._part_bytes(whole), whole.data_ptr()
        own = whole.view(self.world.size, -1)[self.world.rank]
        assert shard.numel() == own.numel()
        assert shard.is_contiguous()
        assert shard.dtype == own.dtype or nbytes <= self._received.nbytes, "a sum that is narrower than what is summed"
        self._begin()
        self._send([first + peer * nbytes for peer in self._peers], nbytes)
        with self._on_stream():
            for i, peer in enumerate(self._peers):
                direct = i == 0 and shard.dtype == own.dtype
                into = shard if direct else self._received[:nbytes].view(own.dtype)
                self._receive(into.data_ptr(), peer, self.world.rank - (self.world.rank > peer), nbytes)
                if i == 0 and not direct:
                    shard.copy_(into)
                shard.add_(own if i == 0 else into)
            return self._pending()

    def _part_bytes(self, whole: Tensor) -> int:
        """Return the bytes of a rank's part of `whole`, checked here: copies by address check nothing."""
        nbytes = whole.nbytes // self.world.size
        assert whole.is_contiguous()
        assert nbytes * self.world.size == whole.nbytes
        assert nbytes <= self._most_bytes, f"parts of {nbytes} bytes, the exchange was made for {self._most_bytes}"
        return nbytes

    def release_waits(self) -> None:
        for peer in self._peers:
            self._counters[self._written(peer, self.world.rank)] = RELEASED
            self._counters[self._read(self.world.rank, peer)] = RELEASED

    def fault(self) -> str:
        """Return what keeps bytes from crossing, in the same words on every rank; "" where they cross. A collective."""
        found = ""
        try:
            self._probe()
        except (RuntimeError, OSError, AttributeError) as error:  # the last two: a driver that lacks these calls
            found = first_line(error)
            self.release_waits()
            if self._stream is not None:  # what was held up uses memory that is freed from here on
                self._stream.synchronize()
        faults = [""] * self.world.size
        dist.all_gather_object(faults, found)
        return next(filter(None, faults), "")

    def _probe(self) -> None:
        if self._refused:
            raise RuntimeError(f"the system refuses to page-lock memory for it, CUDA error {self._refused}")
        self._open()
        whole = torch.full((self.world.size,), -1, dtype=torch.int64, device=self.world.device)
        whole[self.world.rank] = self.world.rank
        pending, start = self.all_gather(whole, whole[self.world.rank, None]), time.monotonic()
        while not pending.is_completed():
            if time.monotonic() > start + PROBE_SECONDS:
                raise RuntimeError(f"nothing came within {PROBE_SECONDS:.0f} s")
            time.sleep(0.001)
        pending.wait()
        if whole.tolist() != list(range(self.world.size)):
            raise RuntimeError("other bytes came than were sent")

    def _send(self, parts: Sequence[int], nbytes: int) -> None:
        """Queue the copies to this rank's slot: one part for each peer, or one for all of them. parts: addresses."""
        for peer in self._peers:
            self._await(self._read(self.world.rank, peer), self.count - SLOTS)
        slot = self._slots[self.world.rank][self.count % SLOTS]
        for i, part in enumerate(parts):
            self._take_out(slot + i * nbytes, part, nbytes)
            TRAFFIC.from_device += nbytes
        for peer in self._peers:
            self._advance(self._written(self.world.rank, peer))

    def _receive(self, into: int, peer: int, number: int, nbytes: int) -> None:
        """Queue the copy of part `number` from the peer's slot to an address of the GPU."""
        self._await(self._written(peer, self.world.rank), self.count)
        self._bring(into, self._slots[peer][self.count % SLOTS] + number * nbytes, nbytes)
        TRAFFIC.to_device += nbytes
        self._advance(self._read(peer, self.world.rank))

    def _written(self, rank: int, peer: int) -> int:
        """Return the number of the counter of what `rank` has written for `peer`."""
        return self.world.size * rank + peer

    def _read(self, rank: int, peer: int) -> int:
        """Return the number of the counter of what `peer` has read of `rank`."""
        return self.world.size * (self.world.size + rank) + peer

    # The rest needs a GPU; tests replace it.

    def _open(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait_value, self._write_value = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for call in (self._wait_value, self._write_value):  # (stream, address, value, flags)
            call.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
        self._copies = {to_device: driver_copy(to_device) for to_device in (True, False)}
        self._stream = torch.cuda.Stream(self.world.device)
        self._handle = self._stream.cuda_stream

    def _begin(self) -> None:
        """Start one exchange, behind what is queued on the current stream now."""
        self.count += 1
        assert self._stream is not None
        self._stream.wait_event(torch.cuda.current_stream(self.world.device).record_event())

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Queue what is queued inside on this exchange's stream."""
        with torch.cuda.stream(self._stream):
            yield

    def _pending(self) -> Pending:
        """Mark the end of the exchange: everything has been received and sent."""
        assert self._stream is not None
        return _Recorded(self._stream.record_event(), self.world.device)

    def _take_out(self, to: int, source: int, nbytes: int) -> None:
        """Queue a copy from the GPU to host memory, by address: it needs no view."""
        self._check(self._copies[False](to, source, nbytes, self._handle), "cuMemcpyDtoHAsync")

    def _bring(self, to: int, source: int, nbytes: int) -> None:
        """Queue a copy from host memory to the GPU."""
        self._check(self._copies[True](to, source, nbytes, self._handle), "cuMemcpyHtoDAsync")

    def _await(self, counter: int, value: int) -> None:
        """Make the stream wait until the counter has reached `value` (the driver's default comparison, >=)."""
        if value > 0:
            self._call(self._wait_value, counter, value)

    def _advance(self, counter: int) -> None:
        """Set the counter to `count` when all work before this on the stream is done and visible to peers."""
        self._call(self._write_value, counter, self.count)

    def _call(self, call: Any, counter: int, value: int) -> None:
        self._check(call(self._handle, self._first_counter + LINE * counter, value, 0), call.__name__)

    @staticmethod
    def _check(status: int, call: str) -> None:
        if status != 0:
            raise RuntimeError(f"{call}: CUDA error {status}")


def store_bytes(nbytes: int, ranks: int) -> int:
    """Return the host memory that `HostExchange` takes of a node."""
    slot = -(-nbytes // ranks) * (ranks - 1)
    return ranks * SLOTS * rounded(slot) + rounded(LINE * 2 * ranks**2)
