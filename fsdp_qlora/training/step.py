"""One optimizer step: micro-batches, loss over the step's label tokens on all ranks, finite check, clip, update."""

import gc
import math
import time
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.data.batches import IGNORE, Batch
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped, first_line, is_out_of_memory
from fsdp_qlora.memory.arena import Arena
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.optim.optimizers import make_optimizer, make_schedule, scales_and_skips
from fsdp_qlora.optim.sharded_adapters import ShardedAdapters
from fsdp_qlora.report.step_record import StepRecord
from fsdp_qlora.torch_compat import foreach_mul_, foreach_norm
from fsdp_qlora.training.loss_scale import LossScale
from fsdp_qlora.training.retry import RandomState, forget, who_ran_out
from fsdp_qlora.units import GIB


@dataclass(frozen=True)
class Ready:
    """This rank's micro-batches of an optimizer step.

    inputs: what the model takes of each, in memory that a GPU copies from. label_tokens, tokens: of the step, on all
    ranks."""

    batches: list[Batch]
    inputs: list[tuple[Tensor, Tensor, Tensor]]
    label_tokens: int
    tokens: int


class Stepper:
    """Runs optimizer steps; owns the optimizer and its schedule over `steps` of them.

    A step is `begin` and `end`. Between the two a GPU is at work and the host free: the time to `prepare` the next.
    Before `end` all ranks ask what `ran_out`; if anything has, they `give_back`, save less and begin `again`.
    ahead: the update is queued in `begin`, where the optimizer can do without the host's word. It is the same update,
    and a GPU need not wait, with nothing to do, for a host that reads the sums and launches it."""

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
        if options.optimizer.startswith("paged_") and world.device.type != "cuda":
            world.say(f"optimizer {options.optimizer}: without a GPU nothing is paged; the state is in memory anyway")
        self.optimizer = make_optimizer(options, adapters.parameters(), world.device)
        self.ahead = scales_and_skips(self.optimizer)
        self.schedule = make_schedule(options, self.optimizer, steps)
        self.max_norm = options.grad_norm if options.apply_gradient_clipping else None
        self.scale = LossScale(model.precision.scale_loss)
        self.steps = steps
        self._begun = 0  # optimizer steps of which the update has begun, or that were left out
        self._updated = 0  # of these, the ones whose new values are on their way to every rank
        self._start = 0.0  # when the step at work began, for its record
        self._ended: float | None = None  # the last one: a step's seconds begin there, so that what lies between counts
        self._at_work: tuple[Ready, OnItsWay] | None = None  # a step begun: its batches; each rank's loss, squared norm
        # Ranks that gather blocks of each other in their passes cannot leave one and keep in step.
        self._may_leave = world.size == 1 or not isinstance(model, FSDPModule)
        self._ran_out = ""  # what this rank's passes met, if GPU memory ran out in them
        self._retries = 0  # of the step at work
        self.overflowed = False  # float16 gradients did, so the last step was left out and the loss scale shrunk

    @property
    def publishing(self) -> bool:
        """Whether working copies may be in part of the step after `done`: see `ShardedAdapters.has_arrived`."""
        return not self.adapters.is_update_pending and (self._begun != self._updated or not self.adapters.has_arrived())

    @property
    def done(self) -> int:
        """Optimizer steps that this rank's working copies have in full."""
        return self._begun - (self.adapters.is_update_pending or self.publishing)

    def prepare(self, batches: list[Batch]) -> Ready:
        """Micro-batches (as many as every rank's) for `begin`. A collective, on the host."""
        mine = [sum(int((b.labels[:, 1:] != IGNORE).sum()) for b in batches), sum(b.tokens for b in batches)]
        label_tokens, tokens = (int(sum(column)) for column in zip(*self.world.gather(mine), strict=True))
        return Ready(batches, [_inputs(batch, self.world.device) for batch in batches], label_tokens, tokens)

    def begin(self, ready: Ready) -> None:
        """Forward and backward over the micro-batches, and the update where that needs no word of the host; on a GPU it
        returns when they have been launched."""
        self._start = self._ended or time.perf_counter()
        self._random, self._retries = RandomState(self.world.device), 0
        self._begin(ready)

    def ran_out(self) -> dict[int, str]:
        """Return rank -> error, of the ranks that ran out of GPU memory in what was begun: no rank updates then.

        A collective, on the host, beside the GPU's work."""
        return who_ran_out(self._ran_out, self.world)

    def give_back(self) -> None:
        """Forget a step in which a rank `ran_out`, and give its memory back to the card. Called on every rank."""
        assert self._at_work is not None, "no step was begun"
        self._at_work[1].wait()  # the GPU is done with it, or a rank is gone
        self.adapters.check()
        self._begun = self._updated
        self.adapters.zero_grad()
        self._drop_arena()
        gc.collect()  # of what failed, frames and errors may hold one another
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
            torch.cuda.empty_cache()

    def again(self, arena: Arena | None) -> None:
        """Begin the same step after `give_back`, with the same batches and the same random numbers.

        arena: of what the blocks keep now."""
        assert self._at_work is not None, "no step was begun"
        self.arena = arena
        self._random.restore()
        self._retries += 1
        self._begin(self._at_work[0])

    def end(self, epoch: float, host_gib: float) -> StepRecord:
        """Wait for the sums of what was begun, and update, if that has not been queued.

        epoch: epochs completed after this step. host_gib: this rank's host memory, for the record.
        Raises TrainingStopped on every rank, with nothing updated, when a loss or a gradient is not finite.
        """
        assert self._at_work is not None, "no step was begun"
        (ready, sums), self._at_work = self._at_work, None
        memory = self._memory()  # all of the step has been allocated, if not yet computed
        losses, squares = map(list, zip(*sums.wait(), strict=True))  # the step's one wait for the GPU
        self.adapters.check()
        loss, norm = sum(losses) / self.scale.value, math.sqrt(sum(squares)) / self.scale.value
        lr = float(self.schedule.get_last_lr()[0])
        self.overflowed = not self._update(loss, norm, ready.batches, losses)
        allocated, reserved, retries, host = map(list, zip(*self.world.gather([*memory, host_gib]), strict=True))
        self._ended = time.perf_counter()
        on_gpu = self.world.device.type == "cuda"
        return StepRecord(
            step=self._updated,
            epoch=epoch,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=ready.tokens,
            label_tokens=ready.label_tokens,
            seconds=self._ended - self._start,
            gpu_allocated_gib=allocated if on_gpu else [],
            gpu_reserved_gib=reserved if on_gpu else [],
            gpu_retries=[int(count) for count in retries] if on_gpu else [],
            host_rss_gib=host,
            step_retries=self._retries,
        )

    def _begin(self, ready: Ready) -> None:
        self._ran_out, self._passed = "", 0
        try:
            sums = self._sums(ready)
        except RuntimeError as error:
            if not (self._may_leave and is_out_of_memory(error)):
                raise
            self._ran_out = first_line(error)
            forget(error, self.model)
        if self._ran_out:  # the error is gone, and with it all that it held
            sums = self._sums_without(len(ready.inputs))
        self._at_work = ready, OnItsWay(sums)
        if self.ahead and not self._ran_out:
            self._update_ahead(sums)

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
        self._drop_arena()  # what ranks exchange now has no place in it, and needs memory
        gc.collect()
        self.adapters.finish_with_zeros(micro_batches - self._passed)
        return self.adapters.gather_numbers(torch.full((2,), torch.nan, device=self.world.device))

    def _passes(self, inputs: list[tuple[Tensor, Tensor, Tensor]], divisor: float) -> Tensor:
        total = torch.zeros((), device=self.world.device)
        for i, tensors in enumerate(inputs):
            if self.arena is not None:
                self.arena.start()
            self.adapters.begin_micro_batch(last=i == len(inputs) - 1)
            self._passed += 1
            loss = self.model(*(t.to(self.world.device, non_blocking=True) for t in tensors), divisor)
            loss.backward()
            total += loss.detach()
        self.adapters.finish()
        return total

    def _update_ahead(self, sums: Tensor) -> None:
        """Queue the update behind what `sums` [ranks, 2] (loss, squared norm) comes of: the GPU goes on while the host
        still waits for them. The optimizer's kernel scales the gradients, or leaves all as it is where a sum is not
        finite."""
        self.optimizer.grad_scale = self._divisor(sums)  # type: ignore[attr-defined]
        skip = torch.maximum(1.0 - sums.isfinite().all().float(), self.adapters.rescue.flag())
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self._begun += 1
        self.adapters.update(self.optimizer.step)

    def _divisor(self, sums: Tensor) -> Tensor | None:
        """float32 []: the loss scale over what clipping leaves of the gradients; None where neither is asked for."""
        if self.max_norm is not None:
            norm = sums[:, 1].double().sum().sqrt() / self.scale.value
            return (self.scale.value / (self.max_norm / (norm + 1e-6)).clamp(max=1.0)).float()
        return sums.new_full((), self.scale.value) if self.scale.enabled else None

    def _update(self, loss: float, norm: float, batches: list[Batch], losses: list[float]) -> bool:
        """Update, unless that has been queued, and publish; or neither, and False."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and not (self.scale.enabled and math.isfinite(loss) and self.scale.value > 1):
            self._begun = self._updated
            self._stop(loss, norm, batches, losses)
        if not self.ahead:
            self._begun += 1
        if finite:
            if not self.ahead:
                clip = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
                if clip != self.scale.value:
                    foreach_mul_(self.adapters.gradients(), clip / self.scale.value)
                self.adapters.update(self.optimizer.step)
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

    def _stop(self, loss: float, norm: float, batches: list[Batch], losses: list[float]) -> NoReturn:
        rows: list[list[int]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(rows, [row for batch in batches for row in batch.rows])
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(value)] or range(self.world.size)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        where = "; ".join(f"rank {rank}: {', '.join(map(str, rows[rank])) or 'none'}" for rank in bad)
        damaged = "" if self._updated else "; so early the checkpoint itself may be damaged"
        stopped = TrainingStopped(
            f"step {self._updated + 1}: {what}, so nothing was updated. Rows of the dataset in it (counted from 0): "
            f"{where}. Look at these rows, lower lr, or try --precision bf16_autocast (float32 residual stream)"
            f"{damaged}"
        )
        raise stopped.on_every_rank(self.world.rank)

    def _memory(self) -> tuple[float, float, float]:
        """Peaks of what is allocated and reserved, GiB, and the allocator's retries, so far."""
        if self.world.device.type != "cuda":
            return 0.0, 0.0, 0.0
        stats = torch.cuda.memory_stats()
        peaks = (stats[f"{what}_bytes.all.peak"] / GIB for what in ("allocated", "reserved"))
        return *peaks, stats["num_alloc_retries"]


class OnItsWay:
    """Numbers that go to the host when the GPU has them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def wait(self) -> list[list[float]]:
        """On an event: a copy to ordinary memory would hold a lock of the driver while it waits, and with it whoever
        saves the adapter from another thread when a peer is gone."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


def _inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids [B, S], places [L], labels [L]), on the CPU: only positions whose next token is a label go through the
    head, and are found where the batch is, so that the GPU's stream is never waited for."""
    following = torch.full_like(batch.labels, IGNORE)
    following[:, :-1] = batch.labels[:, 1:]
    places = (following.flatten() != IGNORE).nonzero().squeeze(1)
    tensors = (batch.input_ids, places, following.flatten()[places])
    if device.type != "cuda":
        return tensors
    ids, places, labels = (t.pin_memory() for t in tensors)
    return ids, places, labels
