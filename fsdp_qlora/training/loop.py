"""The training loop: steps until the end or until a signal; the adapter is saved however it ends."""

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.options import Config
from fsdp_qlora.data.batches import Batches
from fsdp_qlora.distributed.interrupt import Interrupt
from fsdp_qlora.distributed.world import World, peer_is_gone
from fsdp_qlora.errors import TrainingStopped, UserError, first_line, is_out_of_memory, refused_by_system
from fsdp_qlora.export.peft import ADAPTER, TokenizerNotSaved, save_adapter, save_adapter_somewhere, saved_since
from fsdp_qlora.report.callback import Callback
from fsdp_qlora.report.metrics import Metrics
from fsdp_qlora.report.profiler import profiled
from fsdp_qlora.report.records import EvalRecord
from fsdp_qlora.runtime.host_memory import HostMemory
from fsdp_qlora.training.checkpoint import Checkpoints
from fsdp_qlora.training.evaluations import Evaluations
from fsdp_qlora.training.retry import Refit, out_of_memory
from fsdp_qlora.training.stall import StallNotice
from fsdp_qlora.training.step import NotFinite, Ready, Stepper

LAST = "last"  # folder in output_dir for the last step's adapter, where output_dir has the best
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
        evaluations: Evaluations | None = None,
    ) -> None:
        self.config, self.world, self.host, self.metrics = config, world, host, metrics
        self.stepper, self.refit, self.batches, self.steps = stepper, refit, batches, steps
        self.tokenizer, self.folder, self.checkpoints = tokenizer, folder, checkpoints
        self.evaluations = evaluations
        self._taken = 0  # steps, the same on every rank
        self._saved_at: int | None = None  # updates that the adapter in `_last_folder` has, where all ranks saved it
        self.callbacks: list[Callback] = [metrics, checkpoints.best]
        self.started = time.time()
        self._rescuing = threading.Lock()
        self._stall = StallNotice(world)

    def run(self) -> int:
        with Interrupt(self.world, self._rescue) as interrupt, self.metrics:
            try:
                finished = self._steps(interrupt)
            except TrainingStopped as stopped:  # raised on every rank alike: the last good step can be saved in full
                what = TrainingStopped(f"{stopped}{self._save_what_there_is()}")
                raise what.on_every_rank(self.world.rank) from stopped
            except Exception as error:
                if interrupt.requested and not self._taken and peer_is_gone(error):
                    raise KeyboardInterrupt from error  # the peer was asked too, while it was still loading
                self._end_alone(error)
            try:
                saved = self._save_at_end() if self.config.output.save_model else []
                if not finished and self.checkpoints.is_due_at_stop(self._taken):
                    self._checkpoint(self._taken, interrupt)
            except TrainingStopped:  # on every rank alike: the adapter is where it says
                raise
            except Exception as error:
                self._end_alone(error)
            peaks = [peak for (peak,) in self.world.gather([self.host.peak])]
            self.metrics.close(saved, peaks, "" if finished else f"stopped by {interrupt.name}")
        return 0 if finished else interrupt.exit_code

    def _steps(self, interrupt: Interrupt) -> bool:
        """Take the steps; return False if a signal ended them early."""
        first = self._taken = self.stepper.updated  # of this process: what a checkpoint has done is not done again
        if self._is_due(first) and not self._evaluate(first, self.batches.completed(first), interrupt):
            return False
        if first == self.steps or self._is_exhausted():
            return True
        with profiled(self.config.profile, self.world, self.steps - first) as profiler, self._stall:
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
                self._taken = step + 1
                self._stall.ended(step + 1, record.seconds)
                for callback in [*self.callbacks, profiler]:
                    callback.on_step(record)
                if self.stepper.overflowed:
                    self.world.say(
                        f"step {step + 1}: float16 gradients overflowed, so it was left out; "
                        f"the loss scale is {self.stepper.scale.value:g} now"
                    )
                stops = interrupt.agreed(self.checkpoints.requested())
                requested = interrupt.agreed_wish
                if not stops and self._is_due(step + 1):
                    stops = not self._evaluate(step + 1, record.epoch, interrupt)
                is_last = step + 1 == self.steps or self._is_exhausted()
                if requested or self.checkpoints.is_due(step + 1, is_last):
                    self._checkpoint(step + 1, interrupt)
                    stops = stops or interrupt.agreed()  # a signal that came while it was written
                if is_last:
                    return not self._is_due(step + 1)  # a signal came before the last evaluation was done
                if stops:
                    return False
        return True

    def _is_due(self, step: int) -> bool:
        return self.evaluations is not None and self.evaluations.is_due(step)

    def _evaluate(self, step: int, epoch: float, interrupt: Interrupt) -> bool:
        """Evaluate after `step` steps, and save the adapter where it is the best; return False where a signal came."""
        assert self.evaluations is not None
        with self.stepper.between_steps(), self._stall.paused():
            record = self.evaluations.evaluate(step, epoch, interrupt.agreed)
            if record is None:
                return False
            for callback in self.callbacks:
                callback.on_eval(record)
            self.evaluations.answer(step)
            if self.evaluations.is_to_be_kept(record):
                self._save_best(record)
        return True

    def _is_exhausted(self) -> bool:
        """Return whether to stop early, and say so."""
        if self.evaluations is None or not self.evaluations.is_exhausted:
            return False
        best, count = self.evaluations.best, self.evaluations.without_improvement
        lowest = "" if best is None else f" than {best.loss:.4f}, at step {best.step}"
        self.world.say(f"step {self._taken}: stopped early, as {count} evaluations came to no lower loss{lowest}")
        return True

    def _begin(self, ready: Ready, step: int) -> None:
        """Begin a step, again and with less saved for backward as often as a rank has no GPU memory for it."""
        self.stepper.begin(ready)
        while ran_out := self.stepper.ran_out():
            self.stepper.give_back()
            self.stepper.again(self.refit(step, ran_out))

    def _ready(self, step: int) -> Ready:
        return self.stepper.prepare(self.batches.step(*divmod(step, self.batches.steps_per_epoch)))

    def _checkpoint(self, step: int, interrupt: Interrupt) -> None:
        """Write a checkpoint and tell the listeners of it."""
        with self.stepper.between_steps(), self._stall.paused(), interrupt.busy():
            path = self.checkpoints.save(step)
        if path is not None:
            for callback in self.callbacks:
                callback.on_checkpoint(step, path)

    @property
    def _kept(self) -> EvalRecord | None:
        """The evaluation whose adapter is in the run's folder, where one is."""
        return None if self.evaluations is None else self.evaluations.kept

    @property
    def _last_folder(self) -> Path:
        """The folder for the adapter as it is now: the run's own, unless that has the best."""
        return self.folder if self._kept is None else self.folder / LAST

    def _save_at_end(self) -> list[str]:
        """Save the adapter as it is now, unless it is the best and saved; return the places, for the user."""
        if self._kept is None:
            return [str(self._save())]
        places = [f"{self.folder} (of step {self._kept.step}, evaluation loss {self._kept.loss:.4f})"]
        if self._kept.step == self._taken:
            self.world.main_only(self._forget_last)
        else:
            places.append(f"{self._save()} (of step {self._taken}, the last)")
        return places

    def _forget_last(self) -> None:
        """Remove what a run that this one goes on from left as its last adapter."""
        if (self.folder / LAST / ADAPTER).is_file():
            shutil.rmtree(self.folder / LAST, ignore_errors=True)

    def _save_best(self, record: EvalRecord) -> None:
        """Save the adapter of an evaluation in the run's folder. A full disk does not end the run: it is told."""
        tensors = self.stepper.adapters.named_tensors()
        linears = self.stepper.model.linear_paths
        try:
            self.world.main_only(lambda: save_adapter(self.folder, tensors, linears, self.config, self.tokenizer))
        except TokenizerNotSaved as stopped:
            self.world.say(f"step {record.step}: {stopped}")
        except TrainingStopped as stopped:
            self.world.say(f"step {record.step}: {stopped}; training goes on, and this best adapter is not kept")
            return
        assert self.evaluations is not None
        self.evaluations.kept = record

    def _save(self) -> Path:
        """Save the adapter as it is now. Every rank takes part; rank 0 writes."""
        tensors = self.stepper.adapters.named_tensors()
        self.world.main_only(lambda: self._write(tensors))
        self._saved_at = self.stepper.updated
        return self._last_folder

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        linears = self.stepper.model.linear_paths
        save_adapter_somewhere(self._last_folder, tensors, linears, self.config, self.tokenizer)

    def _save_what_there_is(self) -> str:
        if not self._taken or not self.config.output.save_model:  # the same on every rank
            return ""
        try:
            self._save()
        except TrainingStopped as failed:  # on every rank alike; what stopped the run is still to be told
            return f"; {failed}"
        except Exception:  # no GPU memory for the whole of it either, or a peer has ended meanwhile
            return self._rescue_if_possible()
        return f". The adapter as of step {self.stepper.done} is saved in {self._last_folder}"

    def _end_alone(self, error: Exception) -> NoReturn:
        """Rescue the adapter and raise what ends this rank alone, or because a peer is gone: no collective can follow.

        Raises TrainingStopped for what memory, the system or an option refuses, else `error` itself."""
        step, rank = min(self.stepper.done + 1, self.steps), self.world.rank
        said = ""
        if is_out_of_memory(error):
            said = out_of_memory(step, {rank: first_line(error)})
        elif refused := refused_by_system(error):
            said = f"rank {rank}: the system refused what step {step} needs ({refused}); see to that first"
        elif isinstance(error, UserError):  # what has begun is no mistake of the user's any more
            said = f"step {step}: {error}"
        rescued = self._rescue_if_possible()
        if said:
            stopped = TrainingStopped(f"{said}{rescued}")
            stopped.told_elsewhere = isinstance(error, UserError) and error.told_elsewhere
            raise stopped from error
        if rescued:
            tqdm.write(rescued.lstrip("; "), file=sys.stdout)
        raise error

    def _rescue_if_possible(self) -> str:
        """Call `_rescue`, without letting its own failure hide what happened first."""
        try:
            return self._rescue()
        except Exception as error:
            return f"; the adapter could not be saved ({first_line(error)})"

    def _rescue(self) -> str:
        """Save without the other ranks, from this one's working copy: rounded to the compute dtype, but whole.

        Rank 0 does, or another where rank 0 is the one that ended. Safe from another thread while the main one hangs
        in a collective.
        """
        stepper = self.stepper
        if not (stepper.done and self.config.output.save_model):
            return ""
        if self._saved_at == stepper.updated:  # by all ranks: closing the record is what takes long
            return f"; the adapter as of step {stepper.updated} is saved in {self._last_folder}"
        if not self.world.is_main:
            time.sleep(TURN_SECONDS * max(1, self.world.local_rank))
            if saved_since(self._last_folder, self.started):
                return ""
        with self._rescuing:
            self._write(stepper.adapters.working_tensors())
        what = f"as of step {stepper.done}"
        if stepper.publishing:
            what += f", some of it as of step {stepper.done + 1},"
        return f"; the adapter {what} is saved in {self._last_folder}, rounded to {stepper.model.precision.compute}"
