"""The top of the page: which run it is, how far it came, and its figures at a glance."""

import math
from datetime import UTC, datetime

from fsdp_qlora.report.page.files import Missing, loss_text
from fsdp_qlora.report.page.html import Html, text
from fsdp_qlora.report.page.memory import size
from fsdp_qlora.report.page.pace import duration, how_it_ended, median, steps_done, total
from fsdp_qlora.report.page.public import public
from fsdp_qlora.report.page.run import Run
from fsdp_qlora.report.page.steps import Steps
from fsdp_qlora.units import GIB

Figure = tuple[str, str, str]  # name, value, what else there is to know of it


def header(run: Run) -> Html:
    """Return the page's title, a line on the run's state and its figures."""
    ended = how_it_ended(run.steps, run.parts, run.going_on)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    cells = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>"
        for name, value, more in _figures(run)
    )
    state = f"{steps_done(run.steps, run.parts)} steps, {ended}. Written {written}."
    folder = public(str(run.folder))
    figures = f'<dl class="figures">{cells}</dl>' if cells else ""
    return Html(
        f"<header>\n<h1>{text(run.name)}</h1>\n"
        f'<p class="lead">Training run in <code>{text(folder)}</code>: {text(state)}</p>\n{figures}\n</header>'
    )


def _figures(run: Run) -> list[Figure]:
    if isinstance(run.steps, Missing):
        return []
    return [*_losses(run.steps), *_speeds(run.steps), *_memory(run, run.steps)]


def _losses(steps: Steps) -> list[Figure]:
    found: list[Figure] = []
    losses = steps["loss"]
    if len(steps):
        found.append(
            ("loss, last step", loss_text(losses[-1]), f"{loss_text(losses[0])} in step {steps['step'][0]:,.0f}")
        )
    finite = [one for one in steps.evaluations if math.isfinite(one.loss)]
    if finite:
        best = min(finite, key=lambda one: one.loss)
        lowest = f"lowest {loss_text(best.loss)} at step {best.step:,}"
        found.append(("evaluation loss", loss_text(finite[-1].loss), lowest))
    return found


def _speeds(steps: Steps) -> list[Figure]:
    if not len(steps):
        return []
    which, is_warm = steps.typical()
    warm = "after warm-up" if is_warm else "with warm-up"
    return [
        ("tokens per second", f"{median(steps.speed[which]):,.0f}", f"median {warm}"),
        ("time in steps", duration(total(steps["seconds"])), f"{median(steps['seconds'][which]):.3f} s a step"),
    ]


def _memory(run: Run, steps: Steps) -> list[Figure]:
    if steps.allocated_gib:
        told = [] if isinstance(run.plan, Missing) else [f"planned {size(run.plan.device_bytes)}"]
        told += [f"after step {run.begun:,}"] if run.begun else []
        return [("GPU memory, peak", size(max(steps.allocated_gib) * GIB), ", ".join(told))]
    if math.isfinite(steps.host_gib):
        return [("host memory, peak", size(steps.host_gib * GIB), "all ranks together")]
    return []
