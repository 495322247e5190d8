"""One optimizer step: micro-batches, loss over the step's label tokens on all ranks, check for finite sums, update."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.data.batches import Batch
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped, first_line, is_out_of_memory
from fsdp_qlora.kernels.segments import Segments
from fsdp_qlora.memory.arena import Arena
from fsdp_qlora.memory.arena_layout import Schedule
from fsdp_qlora.memory.host_link import TRAFFIC
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.optim.optimizers import OPTIMIZERS, make_optimizer
from fsdp_qlora.optim.schedules import make_schedule
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.report.records import StepRecord
from fsdp_qlora.torch_compat import foreach_norm
from fsdp_qlora.training.async_numbers import AsyncNumbers
from fsdp_qlora.training.loss_scale import LossScale
from fsdp_qlora.training.retry import RandomState, forget, who_ran_out
from fsdp_qlora.training.update import make_update
from fsdp_qlora.units import GIB


class Inputs(NamedTuple):
    """What the model takes of a batch."""

    input_ids: Tensor
    label_positions: Tensor
    labels: Tensor
    segments: Segments | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Inputs":
        """Return a batch's, on the CPU, pinned where the device is a GPU."""
        inputs = cls(batch.input_ids, batch.label_positions, batch.labels, batch.segments)
        if device.type != "cuda":
            return inputs
        ids, positions, labels = (t.pin_memory() for t in inputs[:3])
        return cls(ids, positions, labels, None if batch.segments is None else batch.segments.pinned())

    def loss(self, model: CausalModel, divisor: float, device: torch.device) -> Tensor:
        """Return `model`'s loss on them."""
        ids, positions, labels = (t.to(device, non_blocking=True) for t in self[:3])
        segments = None if self.segments is None else self.segments.to(device)
        loss: Tensor = model(ids, positions, labels, divisor, segments)
        return loss


@dataclass(frozen=True)
class Ready:
    """This rank's micro-batches of an optimizer step."""

    batches: list[Batch]
    inputs: list[Inputs]  # what the model takes of each
    rows: int  # of the step, on all ranks
    label_tokens: int  # the same
    tokens: int  # the same


class NotFinite(TrainingStopped):
    """A step's loss or gradient is NaN or infinite: nothing was updated, on any rank."""

    def __init__(self, text: str, record: StepRecord) -> None:
        super().__init__(text)
        self.record = record  # of the step


class Stepper:
    """Runs optimizer steps; owns the optimizer and its schedule over `steps` of them.

    A step is `begin` and `end`. Between the two the GPU computes and the host is free to `prepare` the next step.
    Before `end` all ranks ask what `ran_out`; if anything has, they `give_back`, save less and begin `again`."""

    def __init__(
        self,
        model: CausalModel,
        adapters: ShardedAdapters,
        options: TrainingOptions,
        steps: int,
        world: World,
        arena: Arena | None = None,
    ) -> None:
        self.model, self.adapters, self.world, self.arena = model, adapters, world, arena
        if OPTIMIZERS[options.optimizer].host_bytes and world.device.type != "cuda":
            world.say(f"optimizer {options.optimizer}: without a GPU nothing is paged; the state is in memory anyway")
        self.optimizer = make_optimizer(options, adapters.parameters(), world.device)
        self.schedule = make_schedule(options, self.optimizer, steps)
        self.scale = LossScale(model.precision.scale_loss)
        self.update = make_update(options, self.optimizer, adapters, self.scale, world.device)
        self.steps = steps
        self._begun = 0  # optimizer steps of which the update has begun, or that were left out
        self._updated = 0  # of these, the ones whose new values are published
        self._start = 0.0  # when the current step began, for its record
        self._moved = TRAFFIC.to_device, TRAFFIC.from_device  # bytes, at the end of the last step
        self._ended: float | None = None  # when the last step ended: the seconds of a step count from there
        # The step between `begin` and `end`: its batches, and each rank's loss and squared norm.
        self._current: tuple[Ready, AsyncNumbers] | None = None
        # Ranks that gather shards of blocks in their passes cannot abandon a pass and stay in step.
        self._may_abandon = world.size == 1 or not isinstance(model, FSDPModule)
        self._ran_out = ""  # the error of this rank's passes, if GPU memory ran out in them
        self._retries = 0  # of the current step
        self.overflowed = False  # float16 gradients did, so the last step was left out and the loss scale shrunk

    @property
    def publishing(self) -> bool:
        """Whether working copies may partly be of the step after `done`: see `ShardedAdapters.has_arrived`."""
        return not self.adapters.is_update_pending and (self._begun != self._updated or not self.adapters.has_arrived())

    @property
    def done(self) -> int:
        """Optimizer steps that this rank's working copies have in full."""
        return self._begun - (self.adapters.is_update_pending or self.publishing)

    @property
    def updated(self) -> int:
        """Optimizer steps that the master weights have, the same on every rank between two steps.

        Working copies may be behind (`done`): gathers of the last update start in the next forward."""
        return self._updated

    def go_on_from(self, step: int) -> None:
        """Count from a step that another process has done: before the first one here."""
        self._begun = self._updated = step

    def prepare(self, batches: list[Batch]) -> Ready:
        """Return the micro-batches (as many as every rank's) ready for `begin`. A collective, on the host."""
        each = [(len(batch.rows), batch.labels.numel(), batch.tokens) for batch in batches]
        counts = [sum(column) for column in zip(*each, strict=True)]
        totals = [int(sum(column)) for column in zip(*self.world.gather(counts), strict=True)]
        return Ready(batches, [Inputs.of(batch, self.world.device) for batch in batches], *totals)

    def begin(self, ready: Ready) -> None:
        """Launch forward and backward over the micro-batches, and the update where it can be queued."""
        self._start = self._ended or time.perf_counter()
        self._random, self._retries = RandomState(self.world.device), 0
        self._begin(ready)

    def ran_out(self) -> dict[int, str]:
        """Return rank -> error, of the ranks that ran out of GPU memory in what was begun: no rank updates then.

        A collective, on the host, while the GPU computes."""
        return who_ran_out(self._ran_out, self.world)

    def give_back(self) -> None:
        """Forget a step in which a rank `ran_out`, and release its memory. Called on every rank."""
        assert self._current is not None, "no step was begun"
        self._current[1].wait()  # the GPU is done with it, or a rank is gone
        self.adapters.check()
        self._begun = self._updated
        self.adapters.zero_grad()
        self._drop_arena()
        gc.collect()  # frames and errors of the failed pass may form cycles
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
            torch.cuda.empty_cache()

    def again(self, arena: Arena | None) -> None:
        """Begin the same step after `give_back`, with the same batches and the same random numbers.

        arena: for what the blocks save now."""
        assert self._current is not None, "no step was begun"
        self.arena = arena
        self._random.restore()
        self._retries += 1
        self._begin(self._current[0])

    def end(self, epoch: float, host_gib: float) -> StepRecord:
        """Wait for the sums of the current step, and update, if that has not been queued.

        epoch: epochs completed after this step. host_gib: this rank's host memory, for the record.
        Raises NotFinite on every rank, with nothing updated, when a loss or a gradient is not finite.
        """
        assert self._current is not None, "no step was begun"
        (ready, sums), self._current = self._current, None
        memory = self._memory()  # all of the step has been allocated, if not yet computed
        losses, squares = map(list, zip(*sums.wait(), strict=True))  # the step's one wait for the GPU
        self.adapters.check()
        loss, norm = sum(losses) / self.scale.value, math.sqrt(sum(squares)) / self.scale.value
        lr = float(self.schedule.get_last_lr()[0])
        stop = self._must_stop(loss, norm)
        if stop:
            self._begun = self._updated
            if self.arena is not None:
                self.arena.stop()  # what is saved now was not planned there
        else:
            self.overflowed = not self._finish_update(loss, norm)
        numbers = self.world.gather([*memory, *self._link(), host_gib])
        allocated, reserved, retries, to_gpu, from_gpu, host = map(list, zip(*numbers, strict=True))
        self._ended = time.perf_counter()
        on_gpu = self.world.device.type == "cuda"
        record = StepRecord(
            step=self._updated + stop,
            epoch=epoch,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            rows=ready.rows,
            tokens=ready.tokens,
            label_tokens=ready.label_tokens,
            seconds=self._ended - self._start,
            gpu_allocated_gib=allocated if on_gpu else [],
            gpu_reserved_gib=reserved if on_gpu else [],
            gpu_retries=[int(count) for count in retries] if on_gpu else [],
            host_rss_gib=host,
            link_to_gpu_gib=to_gpu if on_gpu else [],
            link_from_gpu_gib=from_gpu if on_gpu else [],
            step_retries=self._retries,
        )
        if stop:
            self._stop(record, ready.batches, losses)
        return record

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Let the seconds and copies of what runs inside count for no step."""
        yield
        self._link()
        self._ended = None  # the seconds of the next step count from its own beginning

    def lend(self, schedule: Schedule | None) -> Arena | None:
        """Return the arena's memory for other tensors between two steps; None where there is none, or too little."""
        return None if self.arena is None or schedule is None else self.arena.lend(schedule)

    def _begin(self, ready: Ready) -> None:
        self._ran_out, self._passed = "", 0
        try:
            sums = self._sums(ready)
        except RuntimeError as error:
            if not (self._may_abandon and is_out_of_memory(error)):
                raise
            self._ran_out = first_line(error)
            forget(error, self.model)
        if self._ran_out:  # the error is gone, and with it all that it held
            sums = self._sums_without(len(ready.inputs))
        self._current = ready, AsyncNumbers(sums)
        if self.update.is_queued and not self._ran_out:
            self._begun += 1
            self.update.queue(sums)

    def _sums(self, ready: Ready) -> Tensor:
        """Compute each rank's loss and the squared norm of its gradients: [ranks, 2]."""
        losses = self._passes(ready.inputs, ready.label_tokens / self.scale.value)
        norms = foreach_norm(self.adapters.gradients())
        return self.adapters.gather_numbers(torch.stack([losses, torch.stack(norms).square().sum()]))

    def _drop_arena(self) -> None:
        if self.arena is not None:
            self.arena.stop()
            self.arena = None

    def _sums_without(self, micro_batches: int) -> Tensor:
        """Finish `_sums` where memory ran out in it, with NaN from this rank, so that no rank updates."""
        self._drop_arena()  # it has no place for what ranks exchange now, which needs memory
        gc.collect()
        self.adapters.finish_with_zeros(micro_batches - self._passed)
        return self.adapters.gather_numbers(torch.full((2,), torch.nan, device=self.world.device))

    def _passes(self, inputs: list[Inputs], divisor: float) -> Tensor:
        total = torch.zeros((), device=self.world.device)
        for i, batch in enumerate(inputs):
            if self.arena is not None:
                self.arena.start()
            self.adapters.begin_micro_batch(last=i == len(inputs) - 1)
            self._passed += 1
            loss = batch.loss(self.model, divisor, self.world.device)
            loss.backward()
            total += loss.detach()
        self.adapters.finish()
        return total

    def _must_stop(self, loss: float, norm: float) -> bool:
        """Return whether a sum is not finite and a lower loss scale would not help."""
        may_shrink = self.scale.enabled and self.scale.value > 1
        return not math.isfinite(loss) or not (math.isfinite(norm) or may_shrink)

    def _finish_update(self, loss: float, norm: float) -> bool:
        """Update, unless that has been queued, and publish; or neither, and return False."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not self.update.is_queued:
            self._begun += 1
        if finite:
            self.update.apply(norm)
            self.adapters.publish()
            if self._begun == self.steps:
                self.adapters.wait()  # no forward follows that would
            self.scale.grow()
            self.schedule.step()
        else:
            self.scale.shrink()
        self._updated = self._begun
        self.adapters.zero_grad()
        if self.arena is not None:
            self.arena.stop()
        return finite

    def _stop(self, record: StepRecord, batches: list[Batch], losses: list[float]) -> NoReturn:
        rows: list[list[int]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(rows, [row for batch in batches for row in batch.rows])
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(value)] or range(self.world.size)
        finite = math.isfinite(record.loss)
        what = f"the gradient's norm is {record.grad_norm}" if finite else f"the loss is {record.loss}"
        where = "; ".join(f"rank {rank}: {', '.join(map(str, rows[rank])) or 'none'}" for rank in bad)
        wider = self.model.precision.wider
        advice = f"lower lr, or try --precision {wider}" if wider else "or lower lr"
        damaged = "" if self._updated else "; so early the checkpoint itself may be damaged"
        stopped = NotFinite(
            f"step {record.step}: {what}, so nothing was updated. Rows of the dataset in it (counted from 0): "
            f"{where}. Look at these rows, {advice}{damaged}",
            record,
        )
        raise stopped.on_every_rank(self.world.rank)

    def _link(self) -> tuple[float, float]:
        """Return GiB to and from the GPU that were queued since the last call."""
        now = TRAFFIC.to_device, TRAFFIC.from_device
        moved = (now[0] - self._moved[0]) / GIB, (now[1] - self._moved[1]) / GIB
        self._moved = now
        return moved

    def _memory(self) -> tuple[float, float, float]:
        """Return the peaks of allocated and reserved GiB, and the allocator's retries, so far."""
        if self.world.device.type != "cuda":
            return 0.0, 0.0, 0.0
        stats = torch.cuda.memory_stats()
        peaks = (stats[f"{what}_bytes.all.peak"] / GIB for what in ("allocated", "reserved"))
        return *peaks, stats["num_alloc_retries"]
