"""ZeRO-2 for adapters: every rank computes with all of them and owns 1/ranks of gradients and optimizer state.

The adapters of a block are one flat buffer in the compute dtype, and so are their gradients. When a block's backward is
done, its gradients are reduce-scattered while the block before it computes. Each rank then updates its slice of the
float32 master weights, and the new values are all-gathered once a step, in the order of the next forward and behind it:
a block waits for its own adapters alone. Against ZeRO-3, which gathers the adapters again for each forward and
backward, this moves a third of the bytes, and the optimizer sees plain tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.exchange.base import Exchange
from fsdp_qlora.exchange.collectives import Collectives
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.optim.adapter_group import AdapterGroup, make_groups
from fsdp_qlora.optim.adapter_values import copy_working, draw_values, gather_blocks, gather_masters, load_values
from fsdp_qlora.optim.gradient_reduction import GradientReduction
from fsdp_qlora.optim.parameter_gather import ParameterGather
from fsdp_qlora.optim.rescue import Rescue


class ShardedAdapters:
    """The trainable parameters of a model. `parameters()` is what an optimizer gets: float32 slices with gradients.

    One optimizer step: `begin_micro_batch` and a backward for each micro-batch, `finish` once after the last,
    `update` with the optimizer's step, `publish`, `zero_grad`. Gradients are summed over ranks and micro-batches. The
    gathers of `publish` continue behind the next forward: each block waits for its own adapters before it computes.
    """

    def __init__(
        self, model: CausalModel, world: World, config: Config, *, accumulates: bool, draw: bool = True
    ) -> None:
        """Replace the model's adapters. accumulates: an optimizer step has several micro-batches. draw: give them their
        first values; else all are zero until `draw`, as they must be where these depend on the base."""
        self.world, self._seed = world, config.training.seed
        self._kind = choose_adapter(config.model.train_type)
        self._update_begins: torch.cuda.Event | None = None  # of the last `update`
        self.rescue = Rescue(world)
        by_path = make_groups(model, world)
        self.groups, self.by_block = list(by_path.values()), by_path
        exchange = Collectives()
        self.reduction = GradientReduction(self.groups, exchange, world, config.memory, accumulates)
        self.parameter_gather = ParameterGather(self.groups, exchange, world)
        if world.size > 1:
            for path, group in by_path.items():
                model.blocks[path].before_forward.append(partial(self.parameter_gather.before_forward, group))
        if draw:
            self.draw()

    @property
    def exchange(self) -> Exchange:
        """Set it before the first step; collectives are the default."""
        return self.reduction.exchange

    @exchange.setter
    def exchange(self, exchange: Exchange) -> None:
        self.reduction.exchange = self.parameter_gather.exchange = exchange

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that ranks exchange: a block's adapters, in float32 where they are saved."""
        return max((4 * group.working.numel() for group in self.groups), default=0)

    def parameters(self) -> list[nn.Parameter]:
        """Return this rank's float32 slices, one a block."""
        return [group.master for group in self.groups]

    def gradients(self) -> list[Tensor]:
        """Return this rank's float32 slices of the summed gradients, as `parameters()`; complete after `finish`."""
        return [group.gradient for group in self.groups if group.gradient is not None]

    def begin_micro_batch(self, last: bool) -> None:
        """Prepare for a forward. last: no more micro-batches follow in this optimizer step."""
        self.reduction.begin_micro_batch(last)

    def finish(self) -> None:
        """Finish the last backward: every gradient is reduced when this returns, on the current stream."""
        self.wait()  # for blocks that were left out; what they are gathered into may be written to again
        self.reduction.finish()

    def finish_with_zeros(self, left: int) -> None:
        """Take part with zeros in all that ranks still exchange in this step, so that no rank waits for this one: in
        place of `finish`, where a pass has failed on this rank. left: micro-batches that have not begun."""
        summed = self.reduction.sums_locally(left)
        self.reduction.drop()  # before anything is allocated: the memory is needed
        self.wait()
        self.reduction.send_zeros(left, summed)

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """Return float32 [ranks, n] of each rank's `numbers` [n]; the host does not wait for them. A collective."""
        if self.world.size == 1:
            return numbers[None]
        whole = numbers.new_empty(self.world.size * numbers.numel())
        self.exchange.all_gather(whole, numbers).wait()
        return whole.view(self.world.size, -1)

    def update(self, step: Callable[[], object]) -> None:
        """Call `step`, an optimizer's over `parameters()`, for a few blocks at a time, after `finish`.

        All other blocks have no gradient then, so that it leaves them out, and no float32 copy exists of more than
        these few. The new values are in this rank's slices of the working copies afterwards."""
        self._check_writable()
        self._update_begins = self._record()
        for masters, groups in groupby(self.groups, key=lambda group: group.masters):
            masters.unfold()
            some = list(groups)
            for group in some:
                group.master.grad = group.gradient
            step()
            for group in some:
                group.master.grad = None
            masters.fold()
            updated = self._record()
            for group in some:
                group.updated = updated
                group.values_change()

    def publish(self) -> None:
        """All-gather the new values, rounded to the compute dtype, into every rank's working copies, after `update`.

        Starts the first gathers, each behind the update of its block, and returns; the next forward starts the rest
        ahead of their use. Other readers of working copies than a block's forward must `wait`."""
        self._check_writable()
        if self.world.size > 1:
            self.parameter_gather.start()

    def wait(self) -> None:
        """Make the current stream wait for all that was published."""
        self.parameter_gather.wait()

    def zero_grad(self) -> None:
        self.reduction.zero_grad()

    @property
    def is_update_pending(self) -> bool:
        """Whether the last `update` has been queued and not begun: the working copies are those before it."""
        return self._update_begins is not None and not self._update_begins.query()

    def has_arrived(self) -> bool:
        """Return whether this rank's working copies are wholly those of the last `publish`. Safe from any thread."""
        return self.parameter_gather.has_arrived()

    def check(self) -> None:
        """Raise RuntimeError after `working_tensors`, when reduced gradients are incomplete."""
        self.rescue.check()

    @property
    def reads_norms(self) -> bool:
        """Return whether `draw` needs the norms of the base's rows."""
        return self._kind.reads_norms

    def draw(self, norms: Mapping[str, Tensor] | None = None) -> None:
        """Give every adapter its first values. Safe from any thread.

        norms: of the base's rows [O] on the CPU, by linear, where `reads_norms`."""
        draw_values(self.groups, self._kind, self._seed, self.world, norms or {})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set every adapter from `path.lora_A` -> matrix, as `named_tensors` gives them."""
        self.load_from(tensors.__getitem__)

    def load_from(self, read: Callable[[str], Tensor]) -> None:
        """Set every adapter from a function of its name, which is asked for one block's at a time."""
        self.wait()
        load_values(self.groups, read, self.world)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return `path.lora_A` -> the whole float32 master matrix, on the CPU of every rank. A collective."""
        self.wait()
        return gather_masters(self.groups, self.exchange, self.world)

    def whole_blocks(self) -> Iterator[tuple[AdapterGroup, Tensor]]:
        """Return the blocks one by one: (group, its float32 master weights [padded] on the device). A collective."""
        self.wait()
        return gather_blocks(self.groups, self.exchange, self.world)

    def working_tensors(self) -> dict[str, Tensor]:
        """Return `named_tensors` of this rank's working copy: waits for no peer and no stream that hangs.

        Some are of the step before the last unless all have arrived (`has_arrived`). No step can end after this."""
        if self.is_update_pending or self.has_arrived():  # else what released gathers bring is not worth saving
            self.rescue.begin(self.exchange)
        return copy_working(self.groups, self.world.device)

    def _check_writable(self) -> None:
        self.parameter_gather.check_done()
        self.rescue.check()

    def _record(self) -> torch.cuda.Event | None:
        """Return an event of this point of the current stream."""
        on_gpu = self.world.device.type == "cuda"
        return torch.cuda.current_stream(self.world.device).record_event() if on_gpu else None
