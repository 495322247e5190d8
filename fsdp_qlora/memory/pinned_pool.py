"""A pool of pinned host buffers; threads make those of a plan ahead of their first use.

Page-locking takes seconds a gigabyte, so what a run is known to need is made while the model is loaded, in the order
in which it will be needed. One region has the buffers of one block: fewer calls of the driver than a buffer each, and
the first ones are ready long before the last.
"""

import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from fsdp_qlora.memory.pinned import PAGE, large_pages, populate, try_page_lock
from fsdp_qlora.runtime.background import do_in_order

THREADS = 4  # at most; page-locking itself hardly gains by them, clearing the pages does


@dataclass(eq=False)
class HostBuffer:
    """Host memory, uint8."""

    memory: Tensor
    per_token: int  # bytes

    def like(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return its beginning, in that shape and dtype."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[:nbytes].view(dtype).view(shape)


class HostPool:
    """Buffers by their bytes per token, each large enough for a micro-batch of `most_tokens`.

    refused: 0, or CUDA's error code once the system has refused to page-lock, which is said once."""

    def __init__(self, device: torch.device, most_tokens: int) -> None:
        self.device, self.most_tokens, self.refused = device, most_tokens, 0
        self._free: defaultdict[int, list[HostBuffer]] = defaultdict(list)
        self._changed = threading.Condition()  # of what follows, and of `_free`
        self._coming: Counter[int] = Counter()  # buffers that threads will have made
        self._error: Exception | None = None  # that kept a thread from making some

    def reserve(self, blocks: Sequence[Sequence[int]]) -> None:
        """Start making buffers: for each block, in the order of use, the bytes per token of what it offloads."""
        with self._changed:
            for sizes in blocks:
                self._coming.update(sizes)
        do_in_order([partial(self._make_ahead, sizes) for sizes in blocks], THREADS, self.device)

    def take(self, per_token: int, tokens: int) -> HostBuffer:
        """Return a buffer for `tokens`: a free one, the next that a thread makes of that size, or one made now."""
        with self._changed:
            self._changed.wait_for(lambda: self._free[per_token] or not self._coming[per_token] or self._error)
            if self._free[per_token]:
                return self._free[per_token].pop()
            if self._error is not None:
                raise self._error
        return self._made([per_token], max(tokens, self.most_tokens))[0]

    def give(self, buffers: Sequence[HostBuffer]) -> None:
        """Take buffers back."""
        with self._changed:
            for buffer in buffers:
                self._free[buffer.per_token].append(buffer)

    @property
    def free(self) -> int:
        """Buffers that are not in use."""
        return sum(map(len, self._free.values()))

    def _make_ahead(self, sizes: Sequence[int]) -> None:
        try:
            made = self._made(sizes, self.most_tokens, ahead=True)
        except Exception as error:  # raised in the thread that waits for these
            with self._changed:
                self._error = error
                self._changed.notify_all()
            return
        with self._changed:
            for buffer in made:
                self._free[buffer.per_token].insert(0, buffer)  # after those that are there
            self._coming.subtract(sizes)
            self._changed.notify_all()

    def _made(self, sizes: Sequence[int], tokens: int, ahead: bool = False) -> list[HostBuffer]:
        """Make buffers for `tokens` each, in one region. ahead: its pages are filled in first, by several threads at
        once (where the kernel does not know how, page-locking does it)."""
        lengths = [-(-size * tokens // PAGE) * PAGE for size in sizes]
        region = large_pages(sum(lengths))
        if ahead:
            populate(region.data_ptr(), region.nbytes)
        if self.device.type == "cuda" and not self.refused:
            status = try_page_lock(region)
            if status != 0:
                self._say_refused(status)
        return [HostBuffer(part, size) for part, size in zip(region.split(lengths), sizes, strict=True)]

    def _say_refused(self, status: int) -> None:
        with self._changed:
            if self.refused:
                return
            self.refused = status
        tqdm.write(
            f"the system refuses to page-lock host memory for what blocks keep (CUDA error {status}): it "
            "is copied by way of the driver's own buffers, which waits. Raise `ulimit -l`, or use "
            "--use_activation_cpu_offload false",
            file=sys.stdout,
        )
