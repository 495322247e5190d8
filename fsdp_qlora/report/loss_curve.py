"""The picture of a run: loss and its running mean, evaluations, the learning rate, and where a number was not finite.

Of a long run the single losses are drawn as a band from the lowest to the highest of each column of pixels: 100 000
steps take a second and no spike is lost."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora.report.records import EvalRecord, StepRecord
from fsdp_qlora.report.series import COLUMNS, band, mean_window, running_mean

LOSS, MEAN, EVAL, RATE, WRONG = "#9db8d9", "#1f5fa8", "#c4641c", "#8a8a8a", "#b3202c"


def draw_loss_curve(
    path: Path,
    title: str,
    records: Sequence[StepRecord],
    evaluations: Sequence[EvalRecord] = (),
    failed: StepRecord | None = None,
) -> None:
    """Write a PNG of the steps. failed: a step that was not finite and ended the run."""
    # Only here: importing matplotlib takes half a second and no rank but the first draws, once.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    handles = _draw_losses(axes, records) if records else []
    known = [one for one in evaluations if math.isfinite(one.loss)]
    if known:
        places = [one.step for one in known], [one.loss for one in known]
        handles += axes.plot(*places, color=EVAL, linewidth=1.5, marker="o", markersize=4, label="evaluation")
    if records:
        handles += _draw_rates(axes.twinx(), records)
    left_out = [record for record in records if not is_finite(record)]
    for record in left_out:
        line = axes.axvline(record.step, color=WRONG, linewidth=0.8, linestyle=":")
    if left_out:
        line.set_label(f"{len(left_out)} left out: gradients overflowed")
        handles.append(line)
    if failed is not None:
        label = f"step {failed.step}: {what_is_wrong(failed)}"
        handles.append(axes.axvline(failed.step, color=WRONG, linewidth=1.5, label=label))
    shown = {record.step for record in [*records, *([failed] if failed is not None else [])]} | {e.step for e in known}
    if len(shown) == 1:
        axes.set_xlim(min(shown) - 1, min(shown) + 1)
    axes.legend(handles=handles, frameon=False, loc="best")
    axes.set(xlabel="optimizer step", ylabel="loss per label token", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path)


def is_finite(record: StepRecord) -> bool:
    """Return whether the step's sums are: others updated nothing."""
    return math.isfinite(record.loss) and math.isfinite(record.grad_norm)


def _draw_losses(axes: Any, records: Sequence[StepRecord]) -> list[Any]:
    steps = np.array([record.step for record in records], dtype=np.float64)
    losses = np.array([record.loss for record in records], dtype=np.float64)
    window = mean_window(len(records))
    if len(records) > 2 * COLUMNS:
        handles = [axes.fill_between(*band(steps, losses, COLUMNS), color=LOSS, linewidth=0.5, label="step")]
    else:
        style = {"color": LOSS} if window else {"color": MEAN, "marker": "."}
        handles = axes.plot(steps, losses, linewidth=1, label="step", **style)
    if window:
        means = running_mean(losses, window)
        handles += axes.plot(steps, means, color=MEAN, linewidth=2, label=f"mean of {window} steps")
    return list(handles)


def _draw_rates(axes: Any, records: Sequence[StepRecord]) -> list[Any]:
    kept = records[:: max(1, len(records) // (2 * COLUMNS))]
    axes.set(ylabel="learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.tick_params(axis="y", colors=RATE)
    axes.yaxis.label.set_color(RATE)
    handles = axes.plot(
        [record.step for record in kept], [record.lr for record in kept], color=RATE, linewidth=1, linestyle="--",
        label="learning rate",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    return list(handles)


def what_is_wrong(record: StepRecord) -> str:
    """Return which sum of a step is not finite, and what it is."""
    if not math.isfinite(record.loss):
        return f"the loss is {record.loss}"
    return f"the gradient's norm is {record.grad_norm}"
