"""Reduce-scatter of adapter gradients, block by block, while backward computes the block before.

Every rank reduces the blocks in the same order, that of backward, whichever gradient is computed first.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Exchange, Pending
from fsdp_qlora.kernels.device import empty
from fsdp_qlora.optim.adapter_group import AdapterGroup
from fsdp_qlora.torch_compat import foreach_add_, foreach_copy_

IN_FLIGHT = 2  # reductions whose buffers are alive at once; each is one block's gradients in the wire dtype


class GradientReduction:
    """The gradients of the groups, from backward to this rank's float32 slices of their sums."""

    def __init__(
        self, groups: Sequence[AdapterGroup], exchange: Exchange, world: World, memory: MemoryOptions, accumulates: bool
    ) -> None:
        """accumulates: an optimizer step has several micro-batches."""
        self.groups, self.exchange, self.world = groups, exchange, world
        self.reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[memory.reduce_dtype]
        self._no_sync = memory.no_sync  # sum over micro-batches on each rank, reduce once a step
        self._accumulates = accumulates
        # (reduction, its group, its output, its input: to be kept alive)
        self._in_flight: deque[tuple[Pending, AdapterGroup, Tensor, Tensor]] = deque()
        self._next = -1  # the group that is reduced next; -1: none
        self._reduces = True  # in this micro-batch
        for index, group in enumerate(groups):
            for parameter in group.params:
                parameter.register_post_accumulate_grad_hook(partial(self._computed, index))

    def begin_micro_batch(self, last: bool) -> None:
        """Expect gradients of all groups. last: no more micro-batches follow in this optimizer step."""
        self.finish()  # in the arena, whose places this micro-batch takes from the beginning again
        self._reduces = last or not self._no_sync
        self._next = len(self.groups) - 1
        for group in self.groups:
            group.n_missing = len(group.params)

    def finish(self) -> None:
        """Reduce what is left of a micro-batch, so that every rank reduces every block in each.

        Every gradient is in place on the current stream when this returns."""
        while self._next >= 0:  # adapters that took no part in the loss have no gradient and count as zero
            self._reduce_next()
        while self._in_flight:
            self._finish_first()

    def drop(self) -> None:
        """Drop all gradients, once the reductions in flight are done."""
        for group in self.groups:
            for p in group.params:
                p.grad = None
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
        self.zero_grad()

    def sums_locally(self, left: int) -> bool:
        """Return whether the next reduction sends a sum over micro-batches. left: those that have not begun."""
        return self._no_sync and (left > 0 or any(group.unreduced is not None for group in self.groups))

    def send_zeros(self, left: int, summed: bool) -> None:
        """Take part with zeros in all reductions that this step still has. No gradient is left.

        left: micro-batches that have not begun. summed: what `sums_locally` said before the gradients were dropped."""
        remaining = list(self.groups[self._next :: -1]) if self._reduces and self._next >= 0 else []
        remaining += list(self.groups[::-1]) * (min(left, 1) if self._no_sync else left)
        self._next = -1
        for group in remaining if self.world.size > 1 else ():
            dtype = self.reduce_dtype if summed else self._wire_dtype(group)
            self._send(group, torch.zeros(group.working.numel(), dtype=dtype, device=self.world.device))
            while len(self._in_flight) > IN_FLIGHT:
                self._finish_first()
        while self._in_flight:
            self._finish_first()
        self.zero_grad()

    def zero_grad(self) -> None:
        for group in self.groups:
            group.gradient = group.unreduced = None

    def _computed(self, index: int, _: Tensor) -> None:
        self.groups[index].n_missing -= 1
        # The same order on every rank, whichever gradient is computed first.
        while self._next >= 0 and self.groups[self._next].n_missing == 0:
            self._reduce_next()

    def _reduce_next(self) -> None:
        """Sum the next block's gradients here (no_sync), or start their reduction.

        `_next` says at all times what has been sent, also where memory runs out in here: see `send_zeros`."""
        group = self.groups[self._next]
        whole = self._take(group)
        if whole is not None and self.world.size > 1:
            self._send(group, whole)
        self._next -= 1
        if whole is not None and self.world.size == 1:
            self._accumulate(group, whole)
        while len(self._in_flight) > IN_FLIGHT:
            self._finish_first()

    def _take(self, group: AdapterGroup) -> Tensor | None:
        """Take the gradients that autograd left on a block's adapters: [padded]; None where they are summed here."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.params]
        for p in group.params:
            p.grad = None
        if not self._reduces or group.unreduced is not None:
            if group.unreduced is None:
                group.unreduced = torch.zeros(group.working.numel(), dtype=torch.float32, device=self.world.device)
            foreach_add_(group.views(group.unreduced), gradients)
            return group.unreduced.to(self.reduce_dtype) if self._reduces else None
        whole = empty(group.working.shape, group.working, self._wire_dtype(group))
        foreach_copy_(group.views(whole), gradients)
        whole[sum(p.numel() for p in group.params) :].zero_()
        return whole

    def _send(self, group: AdapterGroup, whole: Tensor) -> None:
        """Start a reduction."""
        if self._no_sync and self._accumulates:  # once a step: the arena has places for what each micro-batch asks for
            shard = torch.empty(group.shard.shape, dtype=self.reduce_dtype, device=group.shard.device)
        else:
            shard = empty(group.shard.shape, group.shard, self.reduce_dtype)
        pending = self.exchange.reduce_scatter(shard, whole)
        self._in_flight.append((pending, group, shard, whole))

    def _wire_dtype(self, group: AdapterGroup) -> torch.dtype:
        """Return the compute dtype if that is narrower and the exchange accumulates wider, else the reduce dtype."""
        narrower = group.working.dtype.itemsize < self.reduce_dtype.itemsize
        return group.working.dtype if self.exchange.widens and narrower else self.reduce_dtype

    def _finish_first(self) -> None:
        """Wait for the oldest reduction in flight and take its sum."""
        pending, group, shard, _ = self._in_flight.popleft()
        pending.wait()
        self._accumulate(group, shard)

    def _accumulate(self, group: AdapterGroup, shard: Tensor) -> None:
        if group.gradient is not None:
            group.gradient.add_(shard)
        elif self._accumulates:  # it outlives the micro-batch, and with it the memory of `shard`
            group.gradient = shard.to(torch.float32, copy=True)
        elif shard.dtype == torch.float32:
            group.gradient = shard
        else:
            group.gradient = empty(shard.shape, shard, torch.float32).copy_(shard)
