"""The pictures over steps: loss with its mean and evaluations, learning rate, tokens per second."""

import math
from collections.abc import Sequence

import numpy as np

from fsdp_qlora.report.page.files import loss_text
from fsdp_qlora.report.page.html import Html, paragraph, section
from fsdp_qlora.report.page.steps import Evaluation, Steps
from fsdp_qlora.report.page.svg import Axis, Plot, axis, legend
from fsdp_qlora.report.series import COLUMNS, Numbers, band, mean_window, running_mean

DOTS = 400  # evaluations that have a dot each
A_COLUMN = "lowest to highest of each column"


def loss_section(steps: Steps) -> Html:
    """Return what the run learnt, and at which learning rate."""
    if not len(steps) and not steps.evaluations and steps.failed is None:
        return section("loss", "Loss", paragraph("No step is finished yet."))
    across = _across(steps)
    return section("loss", "Loss", *_loss(steps, across), *_wrong(steps), *_rate(steps, across))


def speed_picture(steps: Steps) -> list[Html]:
    """Return tokens per second over steps; nothing where none is known."""
    speed = steps.speed
    if not np.isfinite(speed).any():
        return []
    said = f"Tokens per second of {len(steps):,} steps, median {np.nanmedian(speed):,.0f}."
    plot = Plot("speed-plot", "Speed", said, _across(steps), axis(speed, zero=True), "tokens per second", 180)
    return [legend(_series(plot, steps["step"], speed)), plot.svg()]


def _loss(steps: Steps, across: Axis) -> list[Html]:
    losses, evaluations = steps["loss"], [one for one in steps.evaluations if math.isfinite(one.loss)]
    heights = axis([*losses, *(one.loss for one in evaluations)])
    plot = Plot("loss-plot", "Loss", _in_words(steps, evaluations), across, heights, "loss per label token", 300)
    entries = _series(plot, steps["step"], losses)
    if evaluations:
        entries += _evaluated(plot, evaluations)
    if len(steps.left_out) or steps.failed is not None:
        failed = [] if steps.failed is None else [float(steps.failed[0])]
        plot.verticals([*steps.left_out, *failed], "wrong")
        entries.append(("wrong", "a sum was not finite"))
    return [legend(entries), plot.svg()]


def _series(plot: Plot, steps: Numbers, values: Numbers) -> list[tuple[str, str]]:
    """Draw single steps, of many as a band of lowest and highest, and their running mean; return their legend."""
    window = mean_window(len(steps))
    if not len(steps):
        return []
    if not window:
        plot.line(steps, values, "mean")
        said = [f"step {step:,.0f}: {value:.4g}" for step, value in zip(steps, values, strict=True)]
        plot.points(steps, values, "mean", said)
        return [("mean", "each step")]
    if len(steps) > 2 * COLUMNS:
        plot.band(*band(steps, values, COLUMNS), "step")
    else:
        plot.line(steps, values, "step")
    kept = np.unique(np.linspace(0, len(steps) - 1, COLUMNS).astype(np.int64))
    plot.line(steps[kept], running_mean(values, window)[kept], "mean")
    single = A_COLUMN if len(steps) > 2 * COLUMNS else "each step"
    return [("step", single), ("mean", f"mean of {window:,} steps")]


def _evaluated(plot: Plot, evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    steps, losses = np.array([float(one.step) for one in evaluations]), np.array([one.loss for one in evaluations])
    if len(evaluations) > 2 * COLUMNS:
        plot.band(*band(steps, losses, COLUMNS), "eval")
        return [("eval", f"evaluation, {A_COLUMN}")]
    plot.line(steps, losses, "eval")
    if len(evaluations) <= DOTS:
        said = [f"step {one.step:,}: evaluation loss {loss_text(one.loss)}" for one in evaluations]
        plot.points(steps, losses, "eval", said)
    return [("eval", "evaluation")]


def _rate(steps: Steps, across: Axis) -> list[Html]:
    rates = steps["lr"]
    if not np.isfinite(rates).any():
        return []
    kept = np.unique(np.linspace(0, len(steps) - 1, 2 * COLUMNS).astype(np.int64))
    said = f"From {rates[0]:.3g} in the first step to {rates[-1]:.3g} in the last, at most {np.nanmax(rates):.3g}."
    plot = Plot("rate-plot", "Learning rate", said, across, axis(rates, zero=True, most=3), "learning rate", 110)
    plot.line(steps["step"][kept], rates[kept], "mean")
    return [plot.svg()]


def _wrong(steps: Steps) -> list[Html]:
    """Return sentences on steps without a finite loss or gradient."""
    said = []
    if steps.failed is not None:
        step, why = steps.failed
        said.append(paragraph(f"Step {step:,} ended the run: {why}. It updated nothing.", "alarm"))
    if len(steps.left_out):
        few = ", ".join(f"{step:,.0f}" for step in steps.left_out[:20])
        more = ", …" if len(steps.left_out) > 20 else ""
        said.append(paragraph(f"{len(steps.left_out):,} steps were left out, as gradients overflowed: {few}{more}."))
    return said


def _in_words(steps: Steps, evaluations: Sequence[Evaluation]) -> str:
    said = f"Loss of {len(steps):,} steps"
    if len(steps):
        said += f", {loss_text(steps['loss'][0])} in the first and {loss_text(steps['loss'][-1])} in the last"
    if evaluations:
        said += f"; {len(evaluations):,} evaluations, the last {loss_text(evaluations[-1].loss)}"
    return f"{said}."


def _across(steps: Steps) -> Axis:
    """Return the axis of all steps that there is something of."""
    ends = list(steps["step"][[0, -1]]) if len(steps) else []
    ends += [] if steps.failed is None else [steps.failed[0]]
    return axis([*ends, *(one.step for one in steps.evaluations)], whole=True)
