"""Brings frozen bytes from host memory to the GPU ahead of their use, on a stream of their own, into a few buffers.

A step's order of use is known: the blocks forward, the head, the blocks backward, the next forward. So at each stop the
buffers shall hold the next few units of that order, the one in use included; what is missing is copied over what is
not wanted. Units at the turn of the tide (the last blocks of a forward, the first of the next) are still there when
they are needed again and are not copied twice. Nothing is ever copied back: frozen bytes do not change.

A wrong guess (a forward that no backward follows) costs a copy that is waited for, never a wrong byte.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fsdp_qlora.memory.host_link import HostLink, Transfer
from fsdp_qlora.weights.frozen_bytes import FrozenBytes


@dataclass(frozen=True)
class Staged:
    """A unit's bytes in one of the buffers: as `FrozenBytes.flat` has them, and their way there."""

    flat: nn.Parameter
    transfer: Transfer


@dataclass
class Stop:
    """A unit in the order of use: a block, or the head after the last. source: None where its bytes stay on the GPU."""

    frozen: FrozenBytes
    source: Tensor | None
    here: dict[int, Staged] = field(default_factory=dict)  # by buffer


@dataclass
class _Buffer:
    memory: Tensor  # uint8 on the device
    holds: int = -1  # the stop whose bytes are in it or on their way
    # Of a GPU, both recorded again and again: the last copy into it has ended; the last computation that read it.
    arrived: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None


class Streamer:
    """Moves the bytes of `stops` (the first `blocks` of them used forward and backward, the rest forward alone).

    link_rate: of the copies, bytes per second, if it is known."""

    def __init__(
        self, stops: list[Stop], blocks: int, buffers: int, device: torch.device, link_rate: float | None = None
    ) -> None:
        self.stops, self.device = stops, device
        self.copied = 0  # bytes, so far
        streamed = [i for i, stop in enumerate(stops) if stop.source is not None]
        most = max((stop.frozen.layout.nbytes for stop in stops if stop.source is not None), default=0)
        count = min(buffers, len(streamed))
        self._buffers = [_Buffer(torch.empty(most, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._wanted = [
            [order_of_use(streamed, position, backward, len(stops), blocks)[:count] for position in range(len(stops))]
            for backward in (False, True)
        ]
        self._using: _Buffer | None = None
        self._link = HostLink(device, to_device=True, bytes_per_second=link_rate)
        if device.type == "cuda":
            for buffer in self._buffers:  # its memory was somebody else's, who may not be done with it
                buffer.done = torch.cuda.current_stream(device).record_event()

    def need(self, position: int, backward: bool) -> None:
        """Stop `position` is computed next: its bytes are there for what is queued from now on, the next on their way.

        The computations queued before this were the last to read what the stop before had."""
        if self._using is not None and self._using.done is not None:
            self._using.done.record(torch.cuda.current_stream(self.device))
        self._using = None
        wanted = self._wanted[backward][position]
        stop = self.stops[position]
        if stop.source is not None:
            number = self._bring(position, wanted)
            self._using = buffer = self._buffers[number]
            if buffer.arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(buffer.arrived)
            stop.frozen._parameters["flat"] = stop.here[number].flat
        for one in wanted:
            self._bring(one, wanted)

    def _bring(self, position: int, wanted: list[int]) -> int:
        """The number of the buffer that holds the stop's bytes, or will once its copy has arrived."""
        for number, buffer in enumerate(self._buffers):
            if buffer.holds == position:
                return number
        number, buffer = next((i, b) for i, b in enumerate(self._buffers) if b.holds not in wanted)
        stop = self.stops[position]
        assert stop.source is not None
        if number not in stop.here:
            target = buffer.memory[: stop.source.numel()]
            flat = nn.Parameter(target.view(torch.float32), requires_grad=False)
            stop.here[number] = Staged(flat, self._link.prepare([(target, stop.source)]))
        buffer.holds = -1  # until all of it has been queued: whoever tries again after an error must find no half
        after = () if buffer.done is None else (buffer.done,)
        buffer.arrived = self._link.copy(stop.here[number].transfer, after, buffer.arrived)
        buffer.holds = position
        self.copied += stop.source.numel()
        return number


def order_of_use(streamed: list[int], position: int, backward: bool, stops: int, blocks: int) -> list[int]:
    """The streamed stops in the order of their next use, from `position` on, each once."""
    moving, there, back = set(streamed), list(range(stops)), list(reversed(range(blocks)))
    rest = back[blocks - 1 - position :] + there + back if backward else there[position:] + back + there
    return [i for i in dict.fromkeys(rest) if i in moving]
