"""Copies between pinned host memory and a GPU that leave the link to other copies in between.

A copy engine stays with a stream for as long as that has copies ready, in pieces or not: a small copy of another stream
waits behind all of them (docs/LOG.md, 2026-11-25). So the pieces of a `HostLink` take turns on two streams, and each
waits for the piece before it on the other. No stream has a second copy ready, so the engine may switch after each.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PIECE = 32 << 20  # bytes of one turn at most: 0.6 ms at 51 GiB/s
LEAST_PIECE = 8 << 20  # bytes; a turn costs the link some microseconds
TURN_SECONDS = 6e-4  # of one turn, where the link's rate is known

Piece = tuple[int, int, int]  # (to, from, bytes)
Copy = Callable[[int, int, int, int], int]  # (to, from, bytes, stream) -> CUDA error code


@dataclass
class Traffic:
    """Bytes between host memory and this process's GPU, as queued so far by streamed blocks, offloaded
    activations and the exchange through host memory. Collectives of NCCL and FSDP2's own offload are not counted."""

    to_device: int = 0
    from_device: int = 0


TRAFFIC = Traffic()


@dataclass(frozen=True)
class Transfer:
    """Tensors to copy, made ready once. turns: the pieces that go together, by address; only a GPU needs them."""

    pairs: list[tuple[Tensor, Tensor]]  # (to, from)
    turns: list[list[Piece]]
    nbytes: int


class HostLink:
    """Copies in one direction, one after the other. Without a GPU it copies at once.

    bytes_per_second: of the link, if that is known; a slow one gets smaller pieces."""

    def __init__(self, device: torch.device, to_device: bool, bytes_per_second: float | None = None) -> None:
        self.piece = piece_bytes(bytes_per_second)
        self._to_device = to_device
        self._streams: list[torch.cuda.Stream] = []
        self._turn = 0
        if device.type != "cuda":
            return
        self._copy = driver_copy(to_device)
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self._handles = [stream.cuda_stream for stream in self._streams]
        self._passed = [stream.record_event() for stream in self._streams]  # its last turn, recorded again and again

    def prepare(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Transfer:
        """Cut the copies of (to, from) into turns. Each pair is contiguous and of equal bytes."""
        pairs = list(pairs)
        transfer = Transfer(pairs, [], sum(to.nbytes for to, _ in pairs))
        if not self._streams:
            return transfer
        room = 0
        for to, source in transfer.pairs:
            assert to.nbytes == source.nbytes
            assert to.is_contiguous()
            assert source.is_contiguous()
            start, there = to.data_ptr(), source.data_ptr()
            for offset in range(0, to.nbytes, self.piece):
                nbytes = min(self.piece, to.nbytes - offset)
                if nbytes > room:
                    transfer.turns.append([])
                    room = self.piece
                transfer.turns[-1].append((start + offset, there + offset, nbytes))
                room -= nbytes
        return transfer

    def copy(
        self,
        transfer: Transfer,
        after: Sequence[torch.cuda.Event] = (),
        done: torch.cuda.Event | None = None,
    ) -> torch.cuda.Event | None:
        """Queue the copies behind those before them and the events `after`; the event of their end, None without a GPU.

        done: an event to record again for that, once every wait for its last use has been queued. The tensors
        must live until the copies are over."""
        if self._to_device:
            TRAFFIC.to_device += transfer.nbytes
        else:
            TRAFFIC.from_device += transfer.nbytes
        if not self._streams:
            for target, tensor in transfer.pairs:
                target.copy_(tensor)
            return None
        turn, streams, passed = self._turn, self._streams, self._passed
        for event in after:
            event.wait(streams[turn])
        for pieces in transfer.turns:
            # The turn before is over, and so, one by one, are all before that.
            passed[1 - turn].wait(streams[turn])
            for to, source, nbytes in pieces:
                status = self._copy(to, source, nbytes, self._handles[turn])
                if status != 0:
                    raise RuntimeError(f"a copy between host memory and the GPU: CUDA error {status}")
            passed[turn].record(streams[turn])
            turn = 1 - turn
        self._turn = turn
        done = torch.cuda.Event() if done is None else done
        done.record(streams[1 - turn])
        return done

    def synchronize(self) -> None:
        """Return when every copy queued so far is over."""
        for stream in self._streams:
            stream.synchronize()


def piece_bytes(bytes_per_second: float | None) -> int:
    """Return the bytes of a turn on such a link."""
    if bytes_per_second is None:
        return PIECE
    return int(min(PIECE, max(LEAST_PIECE, bytes_per_second * TURN_SECONDS))) // 4096 * 4096


@cache
def driver_copy(to_device: bool) -> Copy:
    """Return the driver's own call: unlike `Tensor.copy_` it takes addresses, so that a piece needs no view."""
    driver = ctypes.CDLL("libcuda.so.1")
    call = driver.cuMemcpyHtoDAsync_v2 if to_device else driver.cuMemcpyDtoHAsync_v2
    call.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    call.restype = ctypes.c_int
    return call
