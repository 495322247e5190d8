"""Adapters over several ranks: each computes with all of them and owns 1/world of master copy and optimizer state.

The adapters of a block lie in one flat buffer in compute dtype, and so do their gradients. When a block's backward is
done, its gradients are reduce-scattered while the block before it computes; a rank updates its slice of the float32
master copy, and the new values are all-gathered once a step, in the order of the next forward and behind it: a block
waits for its own adapters alone. Against sharding the adapters like the base (gathering them again for each forward
and backward) this moves a third of the bytes, and the optimizer sees plain tensors.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from fsdp_qlora.adapters.lora import draw_
from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Exchange, Pending
from fsdp_qlora.exchange.collectives import Collectives
from fsdp_qlora.kernels.device import empty
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.generic_block import Block, FrozenLinear
from fsdp_qlora.optim.master_weights import Masters
from fsdp_qlora.runtime.launcher import usable_cores

IN_FLIGHT = 2  # reductions whose buffers are alive at once; each is one block's gradients in the reduce dtype
GATHERS_AHEAD = 8  # that `publish` starts itself; each block's forward starts one more, while the GPU has work
ARRIVAL_SECONDS = 1.0  # after which new values that are not here never come (1.7 GB at 70B and rank 64: 0.1 s)
TOGETHER = 4  # blocks that are updated at a time
DRAWERS = 8  # threads that draw first values, at most
MATRICES = ("lora_A", "lora_B")


@dataclass(eq=False)
class Group:
    """The adapters of one block.

    working: all of them, compute dtype [padded]; mine: this rank's slice of it. masters: has this rank's master copy,
    float32 [padded / world], at index. gradient: float32, as that, from the block's backward to `zero_grad`: between
    the passes, where the blocks keep most, there is none.
    """

    working: Tensor
    mine: Tensor
    masters: Masters
    index: int
    names: list[str] = field(default_factory=list)  # PEFT's order: linear by linear, lora_A before lora_B
    params: list[nn.Parameter] = field(default_factory=list)
    gradient: Tensor | None = None
    unreduced: Tensor | None = None  # float32 [padded], with no_sync: this rank's own sum over micro-batches
    waiting: int = 0
    updated: torch.cuda.Event | None = None  # this rank's new values are in `mine`
    gather: Pending | None = None  # of new working values, which nobody has waited for yet

    def wait(self) -> None:
        """Let the current stream (without a GPU: the caller) go on only when the new working values are here."""
        if self.gather is not None:
            self.gather.wait()
            self.gather = None

    @property
    def master(self) -> nn.Parameter:
        """With a gradient while `update` is at it, and with values then, if not always."""
        return self.masters.parameters[self.index]


class ShardedAdapters:
    """The trainable parameters of a model. `parameters()` is what an optimizer gets: float32 slices with gradients.

    One optimizer step: `begin_micro_batch` and a backward for each micro-batch, `finish` once after the last,
    `update` with the optimizer's step, `publish`, `zero_grad`. Gradients are summed over ranks and micro-batches. What
    `publish` starts goes on behind the next forward: each block waits for its own adapters before it computes.
    """

    def __init__(self, model: CausalModel, world: World, config: Config, draw: bool = True) -> None:
        """draw: give them their first values. Without, all are zero until `draw` is called."""
        self.exchange: Exchange = Collectives()
        self.world, self.no_sync = world, config.memory.no_sync
        self._accumulates = config.training.gradient_accumulation_steps > 1
        self._seed = config.training.seed
        self.reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.memory.reduce_dtype]
        self.groups: list[Group] = []
        self._flying: deque[tuple[Pending, Group, Tensor, Tensor]] = deque()
        self._gathers: list[Pending] = []  # that the last `publish` has started
        self._unsent: deque[Group] = deque()  # whose new values it has not
        self._published = 0.0  # when that was
        self._next = -1
        self._reducing = True
        self._reached: torch.cuda.Event | None = None  # the last `update` has begun
        self._abandoned = False
        on_gpu = world.device.type == "cuda"
        self._halt = torch.zeros((), pin_memory=on_gpu)  # as `_abandoned`, for streams to read
        self._side = torch.cuda.Stream(world.device) if on_gpu and world.size > 1 else None
        adapted = {path: linears for path, block in model.blocks.items() if (linears := _adapted(path, block))}
        numbers = [sum(p.numel() for m in linears.values() for p in _matrices(m)) for linears in adapted.values()]
        rooms = self._rooms(numbers, model.precision.compute)
        for (path, linears), (working, masters, index) in zip(adapted.items(), rooms, strict=True):
            group = Group(working, masters.mine[index], masters, index)
            self._make(group, linears, len(self.groups))
            self.groups.append(group)
            if world.size > 1:
                model.blocks[path].before_forward.append(partial(self._before_forward, group))
        if draw:
            self.draw()

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that ranks exchange: a block's adapters, in float32 where they are saved."""
        return max((4 * group.working.numel() for group in self.groups), default=0)

    def parameters(self) -> list[nn.Parameter]:
        """This rank's float32 slices, one a block."""
        return [group.master for group in self.groups]

    def gradients(self) -> list[Tensor]:
        """This rank's float32 slices of the summed gradients, as `parameters()`; complete after `finish`."""
        return [group.gradient for group in self.groups if group.gradient is not None]

    def begin_micro_batch(self, last: bool) -> None:
        """Before each forward. last: no more micro-batches follow in this optimizer step."""
        while self._flying:  # in the arena, whose places this micro-batch takes from the beginning again
            self._land()
        self._reducing = last or not self.no_sync
        self._next = len(self.groups) - 1
        for group in self.groups:
            group.waiting = len(group.params)

    def finish(self) -> None:
        """After the last backward: every gradient is reduced and in place when this returns (on the current stream)."""
        self.wait()  # for those of blocks that were left out; what they are gathered into may be written to again
        while self._next >= 0:  # adapters that took no part in the loss have no gradient and count as zero
            self._reduce_next()
        while self._flying:
            self._land()

    def finish_without(self, left: int) -> None:
        """Take part with zeros in all that ranks still exchange in this step, so that no rank waits for this one: in
        place of `finish`, where a pass has failed here. No gradient is left. left: micro-batches that have not begun.
        """
        summed = self.no_sync and (left > 0 or any(group.unreduced is not None for group in self.groups))
        for group in self.groups:
            for p in group.params:
                p.grad = None
        while self._flying:
            self._flying.popleft()[0].wait()
        self.zero_grad()  # before anything is allocated: the memory is needed
        self.wait()
        remaining = self.groups[self._next :: -1] if self._reducing and self._next >= 0 else []
        remaining += self.groups[::-1] * (min(left, 1) if self.no_sync else left)
        self._next = -1
        for group in remaining if self.world.size > 1 else ():
            dtype = self.reduce_dtype if summed else self._crossing(group)
            self._send(group, torch.zeros(group.working.numel(), dtype=dtype, device=self.world.device))
            while len(self._flying) > IN_FLIGHT:
                self._land()
        while self._flying:
            self._land()
        self.zero_grad()

    def everyones(self, numbers: Tensor) -> Tensor:
        """float32 [ranks, n] from each rank's `numbers` [n]; the host does not wait for them. A collective."""
        if self.world.size == 1:
            return numbers[None]
        whole = numbers.new_empty(self.world.size * numbers.numel())
        self.exchange.all_gather(whole, numbers).wait()
        return whole.view(self.world.size, -1)

    def halted(self) -> Tensor:
        """float32 [], not 0 if `working_tensors` has been called by the time the current stream comes here: what is
        summed after that is not what it should be."""
        return self._halt.to(self.world.device, non_blocking=True)

    def update(self, step: Callable[[], object]) -> None:
        """After `finish`: `step`, an optimizer's over `parameters()`, for a few blocks at a time. All others have no
        gradient then, so that it leaves them out, and no float32 copy is there of more than these few. This rank's
        slices of the working copies are new from then on."""
        self._may_be_written()
        self._reached = self._here()
        for masters, groups in groupby(self.groups, key=lambda group: group.masters):
            masters.unfold()
            some = list(groups)
            for group in some:
                group.master.grad = group.gradient
            step()
            for group in some:
                group.master.grad = None
            masters.fold()
            updated = self._here()
            for group in some:
                group.updated = updated

    def publish(self) -> None:
        """After `update`: every rank's new values, rounded to the compute dtype, go to all working copies.

        In forward order, one after the other, each when it has been updated. Returns when the first are under way; the
        next forward starts the others ahead of their use. Who reads working copies, other than in a block's forward,
        must `wait`."""
        self._may_be_written()
        if self.world.size == 1:
            return
        self._gathers, self._unsent, self._published = [], deque(self.groups), time.monotonic()
        for _ in range(min(GATHERS_AHEAD, len(self.groups))):
            self._start_next()

    @property
    def untouched(self) -> bool:
        """Whether the last `update` has been queued and not begun: the working copies are those before it."""
        return self._reached is not None and not self._reached.query()

    def check(self) -> None:
        """Raises RuntimeError where `working_tensors` has been called, after which gradients are no sums."""
        if self._abandoned:
            raise RuntimeError("remote process exited, so the adapter is being saved without it")

    def _may_be_written(self) -> None:
        still = self._unsent or any(group.gather is not None for group in self.groups)
        assert not still, "what is still being gathered would be overwritten"
        self.check()

    def _here(self) -> torch.cuda.Event | None:
        """This point of the current stream."""
        on_gpu = self.world.device.type == "cuda"
        return torch.cuda.current_stream(self.world.device).record_event() if on_gpu else None

    def wait(self) -> None:
        """Let the current stream go on only when all that was published is there."""
        while self._unsent:
            self._start_next()
        for group in self.groups:
            group.wait()

    def _before_forward(self, group: Group) -> None:
        if self._unsent:
            self._start_next()
        while group in self._unsent:  # where blocks before it were left out
            self._start_next()
        group.wait()

    def _start_next(self) -> None:
        group = self._unsent.popleft()
        with self._behind(group.updated):
            group.gather = self.exchange.all_gather(group.working, group.mine)
        self._gathers.append(group.gather)

    @contextmanager
    def _behind(self, point: torch.cuda.Event | None) -> Iterator[None]:
        """What is queued inside goes on from there, whatever else is on the current stream by now."""
        if self._side is None or point is None:
            yield
            return
        self._side.wait_event(point)
        with torch.cuda.stream(self._side):
            yield

    def arrived(self) -> bool:
        """Whether this rank's working copies are wholly those of the last `publish`, for when a rank may be gone.

        From any thread. Waits where what is on its way may still come, `ARRIVAL_SECONDS` from its start."""
        while self._unsent or not all(work.is_completed() for work in self._gathers):
            if time.monotonic() > self._published + ARRIVAL_SECONDS:
                return False
            time.sleep(0.01)
        try:
            for work in self._gathers:
                work.wait()  # at once, as it is over: with an error where that is how it ended
        except RuntimeError:
            return False
        return True

    def zero_grad(self) -> None:
        for group in self.groups:
            group.gradient = group.unreduced = None

    def named_tensors(self) -> dict[str, Tensor]:
        """`path.lora_A` -> the whole float32 master matrix, on the CPU. A collective; the result is on every rank."""
        self.wait()
        tensors: dict[str, Tensor] = {}
        for group in self.groups:
            whole = torch.empty(group.working.numel(), dtype=torch.float32, device=self.world.device)
            if self.world.size == 1:
                whole.copy_(group.masters.values(group.index))
            else:
                self.exchange.all_gather(whole, group.masters.values(group.index)).wait()
            tensors |= _named(group, whole.cpu())
        return tensors

    def working_tensors(self) -> dict[str, Tensor]:
        """As `named_tensors`, from this rank's copy in compute dtype: no other rank is asked, nor a hung stream.

        Some are of the step before the last where not all has `arrived`. No step can end after this."""
        if self.untouched or self.arrived():  # else what this rank would be given for the rest is not worth saving
            self._abandoned = True
            self._halt.fill_(1.0)
            self.exchange.release_waits()
        tensors: dict[str, Tensor] = {}
        on_gpu = self.world.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self.world.device)) if on_gpu else nullcontext():
            for group in self.groups:
                tensors |= _named(group, group.working.detach().cpu())
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set every adapter from `path.lora_A` -> matrix, as `named_tensors` gives them."""
        self.wait()
        for group in self.groups:
            flat = torch.zeros(group.working.numel(), dtype=torch.float32)
            for name, view in zip(group.names, _split(flat, group.params), strict=True):
                view.copy_(tensors[name])
            self._fill(group, flat)

    def _rooms(self, numbers: list[int], dtype: torch.dtype) -> Iterator[tuple[Tensor, Masters, int]]:
        """For each block with so many adapter parameters: working copies [padded], where its master copy is."""
        for size, alike in groupby(numbers):
            padded, blocks = -(-size // self.world.size) * self.world.size, len(list(alike))
            for first in range(0, blocks, TOGETHER):
                count = min(TOGETHER, blocks - first)
                working = torch.zeros(count, padded, dtype=dtype, device=self.world.device)
                masters = Masters(working.view(count, self.world.size, -1)[:, self.world.rank])
                yield from ((row, masters, i) for i, row in enumerate(working))

    def _make(self, group: Group, linears: dict[str, FrozenLinear], index: int) -> None:
        """The linears' adapters are pieces of the group's working copy."""
        offset = 0
        for path, linear in linears.items():
            for matrix, meta in zip(MATRICES, _matrices(linear), strict=True):
                parameter = nn.Parameter(group.working[offset : offset + meta.numel()].view(meta.shape))
                setattr(linear, matrix, parameter)
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))
                group.names.append(f"{path}.{matrix}")
                group.params.append(parameter)
                offset += meta.numel()

    def draw(self) -> None:
        """Give every adapter its first values. From any thread; others draw for it, a few blocks at a time."""
        count = max(1, min(DRAWERS, usable_cores(None) // self.world.local_size))
        with ThreadPoolExecutor(count) as pool:
            for first in range(0, len(self.groups), count):
                some = self.groups[first : first + count]
                for group, flat in zip(some, pool.map(self._drawn, some), strict=True):
                    self._fill(group, flat)

    def _drawn(self, group: Group) -> Tensor:
        """First values of a block, float32 [padded] on the CPU."""
        flat = torch.zeros(group.working.numel())
        for name, view in zip(group.names, _split(flat, group.params), strict=True):
            path, _, matrix = name.rpartition(".")
            if matrix == "lora_A":
                draw_(view, path, self._seed)
        return flat

    def _fill(self, group: Group, flat: Tensor) -> None:
        """All of a block's adapters, from float32 [padded] on the CPU."""
        group.working.copy_(flat)
        group.masters.set(group.index, self._mine(flat).to(self.world.device))

    def _mine(self, flat: Tensor) -> Tensor:
        length = flat.numel() // self.world.size
        return flat[self.world.rank * length : (self.world.rank + 1) * length]

    def _arrived(self, index: int, _: Tensor) -> None:
        self.groups[index].waiting -= 1
        # The same order on every rank, whatever arrives first.
        while self._next >= 0 and self.groups[self._next].waiting == 0:
            self._reduce_next()

    def _reduce_next(self) -> None:
        """Keep the gradients of the next block's adapters (no_sync), or start their reduction.

        `_next` says at all times what has been sent, also where memory runs out in here: see `finish_without`."""
        group = self.groups[self._next]
        whole = self._taken(group)
        if whole is not None and self.world.size > 1:
            self._send(group, whole)
        self._next -= 1
        if whole is not None and self.world.size == 1:
            self._keep(group, whole)
        while len(self._flying) > IN_FLIGHT:
            self._land()

    def _taken(self, group: Group) -> Tensor | None:
        """Take the gradients that autograd left on a block's adapters: [padded]; None where they are summed up here."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.params]
        for p in group.params:
            p.grad = None
        if not self._reducing or group.unreduced is not None:
            if group.unreduced is None:
                group.unreduced = torch.zeros(group.working.numel(), dtype=torch.float32, device=self.world.device)
            torch._foreach_add_(_split(group.unreduced, group.params), gradients)
            return group.unreduced.to(self.reduce_dtype) if self._reducing else None
        whole = empty(group.working.shape, group.working, self._crossing(group))
        torch._foreach_copy_(_split(whole, group.params), gradients)
        whole[sum(p.numel() for p in group.params) :].zero_()
        return whole

    def _send(self, group: Group, whole: Tensor) -> None:
        """Start a reduction."""
        if (
            self.no_sync and self._accumulates
        ):  # once a step, where all that has a place is asked for in each micro-batch
            mine = torch.empty(group.mine.shape, dtype=self.reduce_dtype, device=group.mine.device)
        else:
            mine = empty(group.mine.shape, group.mine, self.reduce_dtype)
        work = self.exchange.reduce_scatter(mine, whole)
        self._flying.append((work, group, mine, whole))

    def _crossing(self, group: Group) -> torch.dtype:
        """In which gradients go to other ranks: that which they have, where the exchange sums in a wider one."""
        narrower = group.working.dtype.itemsize < self.reduce_dtype.itemsize
        return group.working.dtype if self.exchange.widens and narrower else self.reduce_dtype

    def _land(self) -> None:
        work, group, mine, _ = self._flying.popleft()
        work.wait()
        self._keep(group, mine)

    def _keep(self, group: Group, mine: Tensor) -> None:
        if group.gradient is not None:
            group.gradient.add_(mine)
        elif self._accumulates:  # it outlives the micro-batch, and with it the memory of `mine`
            group.gradient = mine.to(torch.float32, copy=True)
        elif mine.dtype == torch.float32:
            group.gradient = mine
        else:
            group.gradient = empty(mine.shape, mine, torch.float32).copy_(mine)


def _adapted(path: str, block: Block) -> dict[str, FrozenLinear]:
    """Path -> linear, of those that have an adapter."""
    return {f"{path}.{name}": m for name, m in block.linears().items() if m.lora_A is not None}


def _matrices(linear: FrozenLinear) -> list[nn.Parameter]:
    return [getattr(linear, matrix) for matrix in MATRICES]


def _split(flat: Tensor, params: Iterable[nn.Parameter]) -> list[Tensor]:
    views, offset = [], 0
    for p in params:
        views.append(flat[offset : offset + p.numel()].view(p.shape))
        offset += p.numel()
    return views


def _named(group: Group, flat: Tensor) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in zip(group.names, _split(flat, group.params), strict=True)}
