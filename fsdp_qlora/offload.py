"""Activations that wait for backward in host memory, copied out and back beside the arithmetic, never in its way.

A block parks what it keeps when its forward ends; backward takes the blocks in the opposite order, so when one is
fetched, the copy of the one parked before it is started, and that of the last one when backward begins. Host buffers
are page-locked once, each large enough for the widest micro-batch, and used again by every later one.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from fsdp_qlora.host_buffers import large_pages, try_page_lock


@dataclass
class _Buffer:
    """Host memory, uint8, and the copy that read it last: it is overwritten only after that."""

    memory: Tensor
    per_token: int  # bytes
    read: torch.cuda.Event | None = None

    def like(self, tensor: Tensor) -> Tensor:
        """Its beginning, in the dtype and shape of `tensor`."""
        nbytes = tensor.numel() * tensor.element_size()
        return self.memory[:nbytes].view(tensor.dtype).view(tensor.shape)


@dataclass
class Parked:
    """Some tensors of one block, in host memory or on their way."""

    buffers: list[_Buffer]
    there: list[Tensor]  # views of the buffers, shaped as the tensors were
    going: list[Tensor] = field(default_factory=list)  # being copied out; freed when the next block is parked
    written: torch.cuda.Event | None = None
    back: list[Tensor] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None


class ActivationOffload:
    """One for all blocks of a rank. Without a GPU it copies at once, which is for tests.

    most_tokens: of a micro-batch, padding included; host buffers are made for as many.
    """

    def __init__(self, device: torch.device, most_tokens: int) -> None:
        self.device, self.most_tokens = device, most_tokens
        self.on_gpu = device.type == "cuda"
        self.refused = 0  # CUDA's error code, once the system has refused to page-lock
        if self.on_gpu:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free: dict[int, list[_Buffer]] = {}  # by bytes per token
        self._parked: list[Parked] = []

    def park(self, tensors: list[Tensor], tokens: int) -> Parked:
        """Start copying contiguous tensors, each of `tokens` equal pieces, out; the caller may drop them at once."""
        buffers = [self._buffer(t.numel() * t.element_size() // tokens, tokens) for t in tensors]
        parked = Parked(buffers, [b.like(t) for b, t in zip(buffers, tensors, strict=True)])
        self._parked.append(parked)
        if not self.on_gpu:
            for there, tensor in zip(parked.there, tensors, strict=True):
                there.copy_(tensor)
            return parked
        stream = torch.cuda.current_stream(self.device)
        self._out.wait_stream(stream)
        with torch.cuda.stream(self._out):
            for buffer, there, tensor in zip(parked.buffers, parked.there, tensors, strict=True):
                if buffer.read is not None:
                    self._out.wait_event(buffer.read)
                there.copy_(tensor, non_blocking=True)
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
            self._free.setdefault(buffer.per_token, []).append(buffer)
        back, parked.back = parked.back, []  # the caller's alone: the graph, and so `parked`, outlives a backward
        return back

    def ahead(self) -> None:
        """Start the copy of what was parked last: for a backward that begins with blocks that parked nothing."""
        if self._parked:
            self._start(self._parked[-1])

    def forget(self) -> None:
        """Let go of all that is parked, where no backward will fetch it. Its host buffers are not used again."""
        if self.on_gpu and self._parked:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._out)  # memory that is still being copied from or to is given back in its order
            stream.wait_stream(self._in)
        self._parked.clear()

    def _start(self, parked: Parked) -> None:
        if parked.back:
            return
        if not self.on_gpu:
            parked.back = [there.clone() for there in parked.there]
            return
        stream = torch.cuda.current_stream(self.device)
        self._let_go(parked, stream)
        # Allocated in the order of the computing stream, whose memory it becomes; the copy waits for that moment.
        parked.back = [torch.empty_like(there, device=self.device) for there in parked.there]
        self._in.wait_stream(stream)
        with torch.cuda.stream(self._in):
            for there, tensor in zip(parked.there, parked.back, strict=True):
                tensor.copy_(there, non_blocking=True)
            parked.arrived = self._in.record_event()

    def _let_go(self, parked: Parked, stream: torch.cuda.Stream) -> None:
        if parked.going:
            assert parked.written is not None
            stream.wait_event(parked.written)
            parked.going = []

    def _buffer(self, per_token: int, tokens: int) -> _Buffer:
        free = self._free.get(per_token)
        if free:
            return free.pop()
        memory = large_pages(per_token * max(tokens, self.most_tokens))
        if self.on_gpu and not self.refused:
            self.refused = try_page_lock(memory)
            if self.refused:
                tqdm.write(
                    f"the system refuses to page-lock host memory for what blocks keep (CUDA error {self.refused}): it "
                    "is copied by way of the driver's own buffers, which waits. Raise `ulimit -l`, or use "
                    "--use_activation_cpu_offload false",
                    file=sys.stdout,
                )
        return _Buffer(memory, per_token)
