"""Activations that wait for backward in host memory, copied out and back beside the arithmetic, never in its way.

A block parks what it keeps when its forward ends; backward takes the blocks in the opposite order, so when one is
fetched, the copy of the one parked before it is started. Host buffers are page-locked once and used again each step.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fsdp_qlora.host_buffers import page_lock


@dataclass
class _Buffer:
    """A host buffer, and the copy that read it last: it is overwritten only after that."""

    memory: Tensor
    read: torch.cuda.Event | None = None


@dataclass
class Parked:
    """Some tensors of one block, in host memory or on their way."""

    buffers: list[_Buffer]
    going: list[Tensor] = field(default_factory=list)  # being copied out; freed when the next block is parked
    written: torch.cuda.Event | None = None
    back: list[Tensor] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None


class ActivationOffload:
    """One for all blocks of a rank. Without a GPU it copies at once, which is for tests."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free: dict[tuple[torch.Size, torch.dtype], list[_Buffer]] = {}
        self._parked: list[Parked] = []

    def park(self, tensors: list[Tensor]) -> Parked:
        """Start copying contiguous tensors out; the caller may drop them at once."""
        parked = Parked([self._buffer(t) for t in tensors])
        self._parked.append(parked)
        if not self.on_gpu:
            for buffer, tensor in zip(parked.buffers, tensors, strict=True):
                buffer.memory.copy_(tensor)
            return parked
        stream = torch.cuda.current_stream(self.device)
        self._out.wait_stream(stream)
        with torch.cuda.stream(self._out):
            for buffer, tensor in zip(parked.buffers, tensors, strict=True):
                if buffer.read is not None:
                    self._out.wait_event(buffer.read)
                buffer.memory.copy_(tensor, non_blocking=True)
            parked.written = self._out.record_event()
        # Memory is given back in the order of the computing stream, a block later, once that has waited for the copy.
        # `record_stream` would hold it until the GPU is really done, while the host, far ahead, takes new memory.
        parked.going = tensors
        if len(self._parked) > 1:
            self._let_go(self._parked[-2], stream)
        return parked

    def fetch(self, parked: Parked) -> list[Tensor]:
        """The tensors again, on the device; starts the copy of those parked just before."""
        self._start(parked)
        place = next(i for i, p in enumerate(self._parked) if p is parked)
        del self._parked[place]
        if place:
            self._start(self._parked[place - 1])
        if self.on_gpu:
            assert parked.arrived is not None
            torch.cuda.current_stream(self.device).wait_event(parked.arrived)
        for buffer in parked.buffers:
            buffer.read = parked.arrived
            self._free.setdefault((buffer.memory.shape, buffer.memory.dtype), []).append(buffer)
        back, parked.back = parked.back, []  # the caller's alone: the graph, and so `parked`, outlives a backward
        return back

    def _start(self, parked: Parked) -> None:
        if parked.back:
            return
        if not self.on_gpu:
            parked.back = [buffer.memory.clone() for buffer in parked.buffers]
            return
        stream = torch.cuda.current_stream(self.device)
        self._let_go(parked, stream)
        # Allocated in the order of the computing stream, whose memory it becomes; the copy waits for that moment.
        parked.back = [torch.empty_like(buffer.memory, device=self.device) for buffer in parked.buffers]
        self._in.wait_stream(stream)
        with torch.cuda.stream(self._in):
            for buffer, tensor in zip(parked.buffers, parked.back, strict=True):
                tensor.copy_(buffer.memory, non_blocking=True)
            parked.arrived = self._in.record_event()

    def _let_go(self, parked: Parked, stream: torch.cuda.Stream) -> None:
        if parked.going:
            assert parked.written is not None
            stream.wait_event(parked.written)
            parked.going = []

    def _buffer(self, like: Tensor) -> _Buffer:
        free = self._free.get((like.shape, like.dtype))
        if free:
            return free.pop()
        memory = torch.empty(like.shape, dtype=like.dtype)
        return _Buffer(page_lock(memory, "use_activation_cpu_offload") if self.on_gpu else memory)
