"""The training loop: steps until the end or until a signal; the adapter is saved however it ends."""

import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.options import Config
from fsdp_qlora.data.batches import Batches
from fsdp_qlora.distributed.interrupt import Interrupt
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import TrainingStopped, first_line, is_out_of_memory
from fsdp_qlora.export.peft import save_adapter_somewhere, saved_since
from fsdp_qlora.report.callback import Callback
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.profiler import profiled
from fsdp_qlora.runtime.host_memory import HostMemory
from fsdp_qlora.training.checkpoint import Checkpoints
from fsdp_qlora.training.retry import Refit, out_of_memory
from fsdp_qlora.training.step import NotFinite, Ready, Stepper

TURN_SECONDS = 1.0  # that a rank gives the one before it, when one of them has to save alone


class Loop:
    """One run's steps. `run` returns its exit code: 0, or 130 and 143 where a signal ended it early (adapter saved)."""

    def __init__(
        self,
        config: Config,
        world: World,
        host: HostMemory,
        metrics: Metrics,
        stepper: Stepper,
        refit: Refit,
        batches: Batches,
        steps: int,
        tokenizer: PreTrainedTokenizerBase | None,
        folder: Path,
        checkpoints: Checkpoints,
    ) -> None:
        self.config, self.world, self.host, self.metrics = config, world, host, metrics
        self.stepper, self.refit, self.batches, self.steps = stepper, refit, batches, steps
        self.tokenizer, self.folder, self.checkpoints = tokenizer, folder, checkpoints
        self.callbacks: list[Callback] = [metrics, checkpoints.best]
        self.started = time.time()
        self._rescuing = threading.Lock()

    def run(self) -> int:
        with Interrupt(self.world, self._rescue) as interrupt, self.metrics:
            try:
                finished = self._steps(interrupt)
            except TrainingStopped as stopped:  # raised on every rank alike: the last good step can be saved in full
                what = TrainingStopped(f"{stopped}{self._save_what_there_is()}")
                raise what.on_every_rank(self.world.rank) from stopped
            except RuntimeError as error:  # on this rank alone, or a peer is gone: nothing collective can be done
                if is_out_of_memory(error):
                    said = out_of_memory(self.stepper.done + 1, {self.world.rank: first_line(error)})
                    raise TrainingStopped(f"{said}{self._rescue_if_possible()}") from error
                rescued = self._rescue_if_possible()
                if rescued:
                    tqdm.write(rescued.lstrip("; "), file=sys.stdout)
                raise error
            saved = [self._save()] if self.config.output.save_model else []
            if not finished and self.checkpoints.is_due_at_stop(self.stepper.done):
                self._checkpoint(self.stepper.done)
            peaks = [peak for (peak,) in self.world.gather([self.host.peak])]
            self.metrics.close(saved, peaks)
        return 0 if finished else interrupt.exit_code

    def _steps(self, interrupt: Interrupt) -> bool:
        """Take the steps; return False if a signal ended them early."""
        first = self.stepper.done  # of this process: what a checkpoint has done is not done again
        if first == self.steps:
            return True
        with profiled(self.config.profile, self.world, self.steps - first) as profiler:
            ready = self._ready(first)
            for step in range(first, self.steps):
                self._begin(ready, step + 1)
                if step + 1 < self.steps:
                    ready = self._ready(step + 1)  # while the GPU is at work
                try:
                    record = self.stepper.end(self.batches.completed(step + 1), self.host.now)
                except NotFinite as stopped:
                    for callback in [*self.callbacks, profiler]:
                        callback.on_failed_step(stopped.record)
                    raise
                for callback in [*self.callbacks, profiler]:
                    callback.on_step(record)
                if self.stepper.overflowed:
                    self.world.say(
                        f"step {step + 1}: float16 gradients overflowed, so it was left out; "
                        f"the loss scale is {self.stepper.scale.value:g} now"
                    )
                stops = interrupt.agreed(self.checkpoints.requested()) and step + 1 < self.steps
                if interrupt.agreed_wish or self.checkpoints.is_due(step + 1, step + 1 == self.steps):
                    self._checkpoint(step + 1)
                if stops:
                    return False
        return True

    def _begin(self, ready: Ready, step: int) -> None:
        """Begin a step, again and with less saved for backward as often as a rank has no GPU memory for it."""
        self.stepper.begin(ready)
        while ran_out := self.stepper.ran_out():
            self.stepper.give_back()
            self.stepper.again(self.refit(step, ran_out))

    def _ready(self, step: int) -> Ready:
        return self.stepper.prepare(self.batches.step(*divmod(step, self.batches.steps_per_epoch)))

    def _checkpoint(self, step: int) -> None:
        """Write a checkpoint and tell the listeners of it."""
        path = self.checkpoints.save(step)
        self.stepper.paused()
        if path is not None:
            for callback in self.callbacks:
                callback.on_checkpoint(step, path)

    def _save(self) -> Path:
        """Save the adapter. Every rank takes part; rank 0 writes."""
        tensors = self.stepper.adapters.named_tensors()
        self.world.main_only(lambda: self._write(tensors))
        return self.folder

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        linears = self.stepper.model.linear_paths
        save_adapter_somewhere(self.folder, tensors, linears, self.config, self.tokenizer)

    def _save_what_there_is(self) -> str:
        if not self.stepper.done or not self.config.output.save_model:
            return ""
        try:
            self._save()
        except RuntimeError as error:  # where there is no GPU memory for the whole of it either
            if not is_out_of_memory(error):
                raise
            return self._rescue_if_possible()
        return f". The adapter as of step {self.stepper.done} is saved in {self.folder}"

    def _rescue_if_possible(self) -> str:
        """Call `_rescue`, without letting its own failure hide what happened first."""
        try:
            return self._rescue()
        except (TrainingStopped, RuntimeError) as error:
            return f"; the adapter could not be saved ({error})"

    def _rescue(self) -> str:
        """Save without the other ranks, from this one's working copy: rounded to the compute dtype, but whole.

        Rank 0 does, or another where rank 0 is the one that ended. Safe from another thread while the main one hangs
        in a collective.
        """
        stepper = self.stepper
        if not (stepper.done and self.config.output.save_model):
            return ""
        if not self.world.is_main:
            time.sleep(TURN_SECONDS * max(1, self.world.local_rank))
            if saved_since(self.folder, self.started):
                return ""
        with self._rescuing:
            self._write(stepper.adapters.working_tensors())
        what = f"as of step {stepper.done}"
        if stepper.publishing:
            what += f", some of it as of step {stepper.done + 1},"
        return f"; the adapter {what} is saved in {self.folder}, rounded to {stepper.model.precision.compute}"
