"""The steps and evaluations of metrics.jsonl, in columns: 100,000 steps are a few arrays."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fsdp_qlora.report.page.files import Lines, Missing, count, number, numbers, unreadable
from fsdp_qlora.report.records import STEPS
from fsdp_qlora.report.series import WARM_UP_STEPS, Numbers

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second", "step_retries")


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out rows after so many steps."""

    step: int
    loss: float
    perplexity: float
    seconds: float


@dataclass
class Steps:
    """What a run has recorded so far. Columns have a number for each finished step, in order."""

    columns: dict[str, Numbers]
    evaluations: list[Evaluation]
    failed: tuple[int, str] | None  # the step that ended the run, and what was wrong with it
    allocated_gib: list[float] = field(default_factory=list)  # of each rank, in the last step's record
    reserved_gib: list[float] = field(default_factory=list)
    host_gib: float = math.nan  # all ranks together, the highest reading
    allocator_stops: list[tuple[int, list[float]]] = field(default_factory=list)  # (step, each rank's count so far)
    note: str = ""  # on what could not be read

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, column: str) -> Numbers:
        return self.columns[column]

    @property
    def last(self) -> int:
        """The last finished step; 0 where there is none."""
        return int(self["step"][-1]) if len(self) else 0

    @property
    def speed(self) -> Numbers:
        """Tokens per second of each step, as recorded: seconds are rounded to 0.1 ms there."""
        with np.errstate(divide="ignore", invalid="ignore"):
            computed = np.where(self["seconds"] > 0, self["tokens"] / self["seconds"], np.nan)
        return np.asarray(np.where(np.isfinite(self["tokens_per_second"]), self["tokens_per_second"], computed))

    @property
    def left_out(self) -> Numbers:
        """Steps that updated nothing, as a sum was not finite."""
        return np.asarray(self["step"][~(np.isfinite(self["loss"]) & np.isfinite(self["grad_norm"]))])

    def typical(self, after: int = 0) -> tuple[npt.NDArray[np.intp], bool]:
        """Return (places of steps that tell how fast the run is, whether they come after the first, slow ones).

        after: a step, of which only later ones count."""
        later = np.flatnonzero(self["step"] > after)
        warm = later[WARM_UP_STEPS:]
        return (warm, True) if len(warm) else (later, False)

    def stops(self, starts: Sequence[int]) -> int:
        """Return how often the allocator of the rank with most stopped to give memory back, after each first step.

        starts: steps after which another process began to count."""
        total: list[float] = []
        for (_, before), (step, now) in zip(self.allocator_stops, self.allocator_stops[1:], strict=False):
            if len(before) == len(now) and step - 1 not in starts:
                more = [max(0.0, b - a) for a, b in zip(before, now, strict=True)]
                total = [sum(pair) for pair in zip(total, more, strict=True)] if len(total) == len(more) else more
        return int(max(total, default=0))


def read_steps(folder: Path) -> Steps | Missing:
    """Read a run's metrics.jsonl."""
    lines = Lines(folder / STEPS)
    found = {name: array("d") for name in COLUMNS}
    steps = Steps({}, [], None)
    last: dict[str, Any] = {}
    try:
        for value in lines:
            if not _take(value, found, steps):
                lines.damaged += 1
            elif "loss" in value:
                last = value
    except FileNotFoundError:
        return Missing(f"{STEPS} is not in the folder: no step is recorded.")
    except OSError as error:
        return unreadable(lines.file, error)
    steps.allocated_gib = numbers(last.get("gpu_allocated_gib"))
    steps.reserved_gib = numbers(last.get("gpu_reserved_gib"))
    columns = {name: np.array(values, np.float64) for name, values in found.items()}
    order = np.argsort(columns["step"], kind="stable")
    steps.columns = {name: values[order] for name, values in columns.items()}
    steps.evaluations.sort(key=lambda one: one.step)
    steps.note = lines.note
    return steps


def _take(value: dict[str, Any], found: dict[str, "array[float]"], steps: Steps) -> bool:
    """Take a line; return whether it is one of a run's."""
    step = count(value.get("step"))
    if step is None:
        return False
    if "eval_loss" in value:
        evaluated = (number(value.get(f"eval_{name}")) for name in ("loss", "perplexity", "seconds"))
        steps.evaluations.append(Evaluation(step, *evaluated))
        return True
    if "loss" not in value:
        return False
    if "stopped" in value:
        steps.failed = step, str(value["stopped"])
        return True
    for name in COLUMNS:
        found[name].append(number(value.get(name)))
    host = sum(numbers(value.get("host_rss_gib")))
    steps.host_gib = host if not steps.host_gib >= host else steps.host_gib
    known, retries = steps.allocator_stops, value.get("gpu_retries")
    if retries and (not known or known[-1][1] != retries) and all(map(math.isfinite, numbers(retries))):
        known.append((step, numbers(retries)))
    return True
