"""How far a run is, for a person watching: a bar on a terminal, plain lines everywhere else."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tqdm import tqdm

from fsdp_qlora.report.records import EvalRecord, StepRecord


class Progress(Protocol):
    def show(self, step: StepRecord, so_far: Sequence[StepRecord]) -> None:
        """Show one step. so_far: all steps up to and including this one."""

    def show_eval(self, record: EvalRecord) -> None:
        """Show an evaluation, beside the steps that follow it."""

    def close(self) -> None: ...


class Bar:
    """A tqdm bar. Time left comes from the last steps' median: the first, slow ones would mislead for long."""

    def __init__(self, total_steps: int) -> None:
        self._total, self._evaluated = total_steps, ""
        self._bar = tqdm(
            total=total_steps,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} steps |{bar}| {elapsed}{postfix}",
            smoothing=0,
        )

    def show(self, step: StepRecord, so_far: Sequence[StepRecord]) -> None:
        self._bar.set_postfix_str(_told(step, so_far, self._total) + self._evaluated, refresh=False)
        if self._bar.n == 0:
            self._bar.start_t -= sum(earlier.seconds for earlier in so_far)  # made after the first step had run
        self._bar.update(step.step - self._bar.n)

    def show_eval(self, record: EvalRecord) -> None:
        self._evaluated = f"  eval {record.loss:.4f}"

    def close(self) -> None:
        self._bar.close()


class Lines:
    """A line for the first and the last step and at most one in `every_seconds` between, for logs and pipes."""

    def __init__(self, say: Callable[[str], None], total_steps: int, every_seconds: float = 15.0) -> None:
        self._say, self._total, self._every = say, total_steps, every_seconds
        self._last = -math.inf

    def show(self, step: StepRecord, so_far: Sequence[StepRecord]) -> None:
        now = time.monotonic()
        if now - self._last < self._every and step.step < self._total:
            return
        self._last = now
        width = len(str(self._total))
        self._say(f"step {step.step:>{width}}/{self._total}  {_told(step, so_far, self._total)}")

    def show_eval(self, record: EvalRecord) -> None:
        pass  # it has a line of its own

    def close(self) -> None:
        pass


def as_time(seconds: float) -> str:
    """Return seconds as a clock shows them: 7 -> 0:07, 3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _told(step: StepRecord, so_far: Sequence[StepRecord], total: int) -> str:
    typical = statistics.median(earlier.seconds for earlier in so_far[-20:])
    if step.gpu_reserved_gib:
        memory = f"{max(step.gpu_reserved_gib):.1f} GiB"
    else:
        memory = f"{sum(step.host_rss_gib):.1f} GiB host"
    left = as_time(typical * (total - step.step))
    return f"loss {step.loss:.4f}  lr {step.lr:.2e}  {step.tokens_per_second:,.0f} tok/s  {memory}  {left} left"
