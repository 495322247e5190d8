"""Copies of frozen bytes from host memory to the GPU ahead of their use, on a stream of their own, into a few buffers.

A step's order of use is known: the blocks forward, the head, the blocks backward, the next forward. When a unit is
acquired, the buffers shall hold the next few units of that order, itself included. A missing one is copied over one
that is not wanted. The last blocks of a forward, and the first of the next, are still in a buffer when they are used
again and are not copied twice. Nothing is ever copied back: frozen bytes do not change.

A wrong guess (a forward that no backward follows) costs a copy that is waited for, never a wrong byte.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fsdp_qlora.memory.host_link import HostLink, Transfer
from fsdp_qlora.weights.frozen_bytes import FrozenBytes


@dataclass(frozen=True)
class Staged:
    """A unit's bytes in one of the buffers."""

    flat: nn.Parameter  # as `FrozenBytes.flat`
    transfer: Transfer  # the copy into the buffer


@dataclass
class StreamedUnit:
    """A unit in the order of use: a block, or the head after the last."""

    frozen: FrozenBytes
    source: Tensor | None  # its bytes in host memory; None if they stay on the GPU
    staged: dict[int, Staged] = field(default_factory=dict)  # by the buffer's number


@dataclass
class _StagingBuffer:
    memory: Tensor  # uint8 on the device
    holds: int = -1  # position of the unit whose bytes are in it or being copied; -1: none
    # On a GPU, both recorded again and again.
    arrived: torch.cuda.Event | None = None  # the last copy into it has ended
    done: torch.cuda.Event | None = None  # the last computation that read it has ended


class Streamer:
    """Staging buffers for `units`, of which the first `n_blocks` are used forward and backward, the rest forward alone
    (all of them where nothing trains).

    n_buffers: at most, each as large as the largest streamed unit. link_rate: of the copies, bytes per second, if it
    is known."""

    def __init__(
        self,
        units: list[StreamedUnit],
        n_blocks: int,
        n_buffers: int,
        device: torch.device,
        link_rate: float | None = None,
    ) -> None:
        self.units, self.device = units, device
        self.copied = 0  # bytes, so far
        streamed = [i for i, unit in enumerate(units) if unit.source is not None]
        most = max((unit.frozen.layout.nbytes for unit in units if unit.source is not None), default=0)
        count = min(n_buffers, len(streamed))
        self._buffers = [_StagingBuffer(torch.empty(most, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._wanted = [
            [order_of_use(streamed, i, backward, len(units), n_blocks)[:count] for i in range(len(units))]
            for backward in (False, True)
        ]
        self._using: _StagingBuffer | None = None  # of the unit that is computed now
        self._link = HostLink(device, to_device=True, bytes_per_second=link_rate)
        if device.type == "cuda":
            for buffer in self._buffers:  # kernels queued before may still use the memory that it was allocated from
                buffer.done = torch.cuda.current_stream(device).record_event()

    def acquire(self, position: int, backward: bool) -> None:
        """Make the unit at `position` readable by work queued from now on, and prefetch the next ones.

        The unit acquired before it is released: only computations queued before this call read it."""
        if self._using is not None and self._using.done is not None:
            self._using.done.record(torch.cuda.current_stream(self.device))
        self._using = None
        wanted = self._wanted[backward][position]
        unit = self.units[position]
        if unit.source is not None:
            number = self._prefetch(position, wanted)
            self._using = buffer = self._buffers[number]
            if buffer.arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(buffer.arrived)
            unit.frozen._parameters["flat"] = unit.staged[number].flat
        for one in wanted:
            self._prefetch(one, wanted)

    def _prefetch(self, position: int, wanted: list[int]) -> int:
        """Return the number of the buffer that holds the unit's bytes, or will once its copy has arrived."""
        for number, buffer in enumerate(self._buffers):
            if buffer.holds == position:
                return number
        number, buffer = next((i, b) for i, b in enumerate(self._buffers) if b.holds not in wanted)
        unit = self.units[position]
        assert unit.source is not None
        if number not in unit.staged:
            target = buffer.memory[: unit.source.numel()]
            flat = nn.Parameter(target.view(torch.float32), requires_grad=False)
            unit.staged[number] = Staged(flat, self._link.prepare([(target, unit.source)]))
        buffer.holds = -1  # until all of it has been queued: a retry after an error must not find half a copy
        after = () if buffer.done is None else (buffer.done,)
        buffer.arrived = self._link.copy(unit.staged[number].transfer, after, buffer.arrived)
        buffer.holds = position
        self.copied += unit.source.numel()
        return number


def order_of_use(streamed: list[int], position: int, backward: bool, n_units: int, n_blocks: int) -> list[int]:
    """Return the streamed units in the order of their next use, from `position` on, each once."""
    forward, reverse = list(range(n_units)), list(reversed(range(n_blocks)))
    if backward:
        order = reverse[n_blocks - 1 - position :] + forward + reverse
    else:
        order = forward[position:] + reverse + forward
    moved = set(streamed)
    return [i for i in dict.fromkeys(order) if i in moved]
