"""Offload of saved activations to host memory until backward; both copies overlap with computation.

A block offloads what it keeps when its forward ends. Backward takes the blocks in the opposite order: when one is
restored, the copy of the one offloaded before it starts, and that of the last one when backward begins. Host buffers
are page-locked once, each large enough for the widest micro-batch, and used again by every later one.

On the meta device nothing is copied and no host memory is needed, and tensors live and die in the same order as on a
GPU: what a step's recording there sees is what the step does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fsdp_qlora.kernels.device import allocate
from fsdp_qlora.memory.host_link import HostLink
from fsdp_qlora.memory.pinned_pool import HostBuffer, HostPool


@dataclass(eq=False)
class Offloaded:
    """Some tensors of one block, in host memory or on their way. On meta without `buffers` and `there`."""

    shapes: list[tuple[torch.Size, torch.dtype]]
    buffers: list[HostBuffer] = field(default_factory=list)
    there: list[Tensor] = field(default_factory=list)  # views of the buffers, shaped as the tensors were
    going: list[Tensor] = field(default_factory=list)  # being copied out; freed when the next block is offloaded
    written: torch.cuda.Event | None = None
    back: list[Tensor] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None


class ActivationOffload:
    """One for all blocks of a rank. Without a GPU it copies at once, which is for tests.

    most_tokens: of a micro-batch, padding included; host buffers are made for as many. link_rate: of the copies, bytes
    per second, if it is known.

    offloaded_sizes: for each block that offloads, in the order of forward, the bytes per token of what it did; for
    `reserve` of another one.
    """

    def __init__(
        self,
        device: torch.device,
        most_tokens: int,
        link_rate: float | None = None,
    ) -> None:
        self.device = device
        self.offloaded_sizes: list[list[int]] = []
        self._pool = None if device.type == "meta" else HostPool(device, most_tokens)
        self._out = HostLink(device, to_device=False, bytes_per_second=link_rate)
        self._in = HostLink(device, to_device=True, bytes_per_second=link_rate)
        self._now = torch.cuda.Event() if device.type == "cuda" else None  # a point of the computing stream
        self._offloaded: list[Offloaded] = []

    def reserve(self, blocks: Sequence[Sequence[int]]) -> None:
        """Start making host buffers ahead of the first step. Returns at once.

        blocks: for each that will offload, in the order of forward, the bytes per token of each tensor."""
        if self._pool is not None:
            self._pool.reserve(blocks)

    def offload(self, tensors: list[Tensor], tokens: int) -> Offloaded:
        """Start copying contiguous tensors, each of `tokens` equal pieces, out; the caller may drop them at once."""
        sizes = [tensor.nbytes // tokens for tensor in tensors]
        if len(self._offloaded) == len(self.offloaded_sizes):
            self.offloaded_sizes.append(sizes)
        offloaded = Offloaded([(tensor.shape, tensor.dtype) for tensor in tensors])
        self._offloaded.append(offloaded)
        if self._pool is not None:
            for size, like in zip(sizes, offloaded.shapes, strict=True):
                offloaded.buffers.append(self._pool.take(size, tokens))
                offloaded.there.append(offloaded.buffers[-1].like(*like))
            transfer = self._out.prepare(zip(offloaded.there, tensors, strict=True))
            # The computing stream has also waited for the last copy back that read these buffers.
            offloaded.written = self._out.copy(transfer, self._here())
        # Memory is given back in the order of the computing stream, a block later, once that has waited for the copy.
        # `record_stream` would hold it until the GPU is really done, while the host, far ahead, takes new memory.
        offloaded.going = tensors
        if len(self._offloaded) > 1:
            self._let_go(self._offloaded[-2])
        return offloaded

    def restore(self, offloaded: Offloaded) -> list[Tensor]:
        """Return the tensors, back on the device, and start the copy of those offloaded just before."""
        self._start(offloaded)
        place = next(i for i, p in enumerate(self._offloaded) if p is offloaded)
        if place:
            self._start(self._offloaded[place - 1])
        del self._offloaded[place]
        if offloaded.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(offloaded.arrived)
        self._give_back(offloaded)
        back, offloaded.back = (
            offloaded.back,
            [],
        )  # the caller's alone: the graph, and so `offloaded`, outlives a backward
        return back

    def prefetch(self) -> None:
        """Start the copy of what was offloaded last: for a backward that begins with blocks that offloaded nothing."""
        if self._offloaded:
            self._start(self._offloaded[-1])

    def reset(self) -> None:
        """Forget what a step that was given up has offloaded: its copies are over and its host buffers free again when
        this returns. What is still to be restored of it is lost."""
        self._out.synchronize()
        self._in.synchronize()
        for offloaded in self._offloaded:
            self._give_back(offloaded)
            offloaded.going, offloaded.back = [], []
        self._offloaded.clear()

    def _start(self, offloaded: Offloaded) -> None:
        if offloaded.back:
            return
        self._let_go(offloaded)
        # Allocated in the order of the computing stream, whose memory it becomes; the copy waits for that moment.
        offloaded.back = [allocate(*like, self.device) for like in offloaded.shapes]
        if self._pool is not None:
            transfer = self._in.prepare(zip(offloaded.back, offloaded.there, strict=True))
            offloaded.arrived = self._in.copy(transfer, self._here())

    def _let_go(self, offloaded: Offloaded) -> None:
        if offloaded.written is not None and offloaded.going:
            torch.cuda.current_stream(self.device).wait_event(offloaded.written)
        offloaded.going = []

    def _give_back(self, offloaded: Offloaded) -> None:
        if self._pool is not None:
            self._pool.give(offloaded.buffers)
        offloaded.buffers, offloaded.there = [], []

    def _here(self) -> list[torch.cuda.Event]:
        """Return an event of this point of the computing stream, on a GPU."""
        if self._now is None:
            return []
        self._now.record(torch.cuda.current_stream(self.device))
        return [self._now]
