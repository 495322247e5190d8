"""How far a run is, for a person watching: a bar on a terminal, plain lines everywhere else."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tqdm import tqdm

from fsdp_qlora.report.records import EvalRecord, StepRecord
from fsdp_qlora.units import as_time


class Progress(Protocol):
    def show(self, step: StepRecord, so_far: Sequence[StepRecord]) -> None:
        """Show one step. so_far: all steps up to and including this one."""

    def show_eval(self, record: EvalRecord) -> None:
        """Show an evaluation, beside the steps that follow it."""

    def close(self) -> None: ...


class Pace:
    """How long steps take, and what lies between them: evaluations, answers, checkpoints, displays."""

    def __init__(self) -> None:
        self.beside = 0.0  # seconds since the first step that was noted, those of steps not counted
        self._last: float | None = None
        self._steps = 0

    def note(self, step_seconds: float = 0.0) -> None:
        """Count the time since the last call, of which a step took so much, if one did."""
        now = time.monotonic()
        if self._last is not None:
            self.beside += max(0.0, now - self._last - step_seconds)
            self._steps += step_seconds > 0
        self._last = now

    def left(self, so_far: Sequence[StepRecord], steps: int) -> float:
        """Return the seconds of so many steps more, by the median of the last: the first, slow ones would mislead for
        long. What lies between steps is spread over them evenly."""
        typical = statistics.median(earlier.seconds for earlier in so_far[-20:])
        return steps * (typical + self.beside / max(self._steps, 1))


class Bar:
    """A tqdm bar."""

    def __init__(self, total_steps: int, pace: Pace) -> None:
        self._total, self._pace, self._evaluated = total_steps, pace, ""
        self._bar = tqdm(
            total=total_steps,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} steps |{bar}| {elapsed}{postfix}",
            smoothing=0,
        )

    def show(self, step: StepRecord, so_far: Sequence[StepRecord]) -> None:
        told = _told(step, self._pace.left(so_far, self._total - step.step))
        self._bar.set_postfix_str(told + self._evaluated, refresh=False)
        if self._bar.n == 0:
            self._bar.start_t -= sum(earlier.seconds for earlier in so_far)  # made after the first step had run
        self._bar.update(step.step - self._bar.n)

    def show_eval(self, record: EvalRecord) -> None:
        self._evaluated = f"  eval {record.loss:.4f}"

    def close(self) -> None:
        self._bar.close()


class Lines:
    """A line for the first and the last step and at most one in `every_seconds` between, for logs and pipes."""

    def __init__(self, say: Callable[[str], None], total_steps: int, pace: Pace, every_seconds: float = 15.0) -> None:
        self._say, self._total, self._pace, self._every = say, total_steps, pace, every_seconds
        self._last = -math.inf

    def show(self, step: StepRecord, so_far: Sequence[StepRecord]) -> None:
        now = time.monotonic()
        if now - self._last < self._every and step.step < self._total:
            return
        self._last = now
        width = len(str(self._total))
        left = self._pace.left(so_far, self._total - step.step)
        self._say(f"step {step.step:>{width}}/{self._total}  {_told(step, left)}")

    def show_eval(self, record: EvalRecord) -> None:
        pass  # it has a line of its own

    def close(self) -> None:
        pass


def _told(step: StepRecord, left: float) -> str:
    if step.gpu_reserved_gib:
        memory = f"{max(step.gpu_reserved_gib):.1f} GiB"
    else:
        memory = f"{sum(step.host_rss_gib):.1f} GiB host"
    return (
        f"loss {step.loss:.4f}  lr {step.lr:.2e}  {step.tokens_per_second:,.0f} tok/s  {memory}  {as_time(left)} left"
    )
