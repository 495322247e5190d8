"""Time: how many steps in how many seconds, beside what was planned, and what was lost on the way."""

import math

import numpy as np

from fsdp_qlora.report.page.charts import speed_picture
from fsdp_qlora.report.page.environment import Part
from fsdp_qlora.report.page.files import Missing
from fsdp_qlora.report.page.html import Html, paragraph, section, table, text
from fsdp_qlora.report.page.plan import Plan
from fsdp_qlora.report.page.steps import Steps
from fsdp_qlora.report.records import STEPS
from fsdp_qlora.report.series import Numbers
from fsdp_qlora.units import as_time


def time_section(steps: Steps | Missing, plan: Plan | Missing, parts: list[Part] | Missing, going_on: str) -> Html:
    """Return what the steps took, as a table and over steps. going_on: on which machine, as `taken` says."""
    title = "Time and speed"
    if isinstance(steps, Missing):
        return section("time", title, paragraph(steps.why))
    rows = [(text(name), text(said)) for name, said in _rows(steps, plan, parts, going_on)]
    return section("time", title, table(title, ("what", "how much"), rows), *speed_picture(steps))


def how_it_ended(steps: Steps | Missing, parts: list[Part] | Missing, going_on: str) -> str:
    """Return in words how far the run is and what ended it."""
    known = [] if isinstance(parts, Missing) else parts
    last = known[-1] if known else None
    if last is not None and last.ended:
        return last.ended
    if going_on:
        return "still going on" if going_on == "here" else "still going on on another machine, or killed there"
    if not isinstance(steps, Missing) and steps.failed is not None:
        return f"step {steps.failed[0]:,}: {steps.failed[1]}"
    if last is None:
        return "how it ended is not recorded"
    return "how it ended is not recorded: it is still going on, or was killed"


def steps_done(steps: Steps | Missing, parts: list[Part] | Missing) -> str:
    """Return `120 of 300`, or `120` where the steps of the whole run are not recorded."""
    done = 0 if isinstance(steps, Missing) else steps.last
    of = 0 if isinstance(parts, Missing) else parts[-1].steps
    done = done if isinstance(parts, Missing) else max(done, parts[-1].last_step)
    return f"{done:,} of {of:,}" if of else f"{done:,}"


def unrecorded(steps: Steps | Missing, parts: list[Part] | Missing) -> str:
    """Return a sentence on steps that were done and are not in the record, "" where there are none."""
    if isinstance(steps, Missing) or isinstance(parts, Missing) or parts[-1].last_step <= steps.last:
        return ""
    return (
        f"{STEPS} ends at step {steps.last:,} and the run at step {parts[-1].last_step:,}: what is below is of the "
        "steps that were recorded (a full disk ends the record, not the run)."
    )


def since(steps: Steps, parts: list[Part] | Missing) -> int:
    """Return the step after which the plan in the folder is that of the run: its last part began, or a step was tried
    again with less saved."""
    again = steps["step"][steps["step_retries"] > 0]
    begun = 0 if isinstance(parts, Missing) else parts[-1].from_step
    return max(begun, int(again[-1]) if len(again) else 0)


def median(values: Numbers) -> float:
    """Return the median of the finite ones; NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def duration(seconds: float) -> str:
    """Return seconds with their unit: 12.3 s, 5:07 min, 1:02:05 h."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{as_time(seconds)} {'min' if round(seconds) < 3600 else 'h'}"


def total(values: Numbers) -> float:
    """Return the sum of the finite ones."""
    return float(values[np.isfinite(values)].sum())


def _rows(steps: Steps, plan: Plan | Missing, parts: list[Part] | Missing, going_on: str) -> list[tuple[str, str]]:
    found = [("steps", steps_done(steps, parts)), ("ended", how_it_ended(steps, parts, going_on))]
    if len(steps):
        found += [("time in steps", duration(total(steps["seconds"])))]
        found += [("tokens", f"{total(steps['tokens']):,.0f}")]
        found += _speeds(steps, plan, parts)
    if steps.evaluations:
        seconds = total(np.array([one.seconds for one in steps.evaluations]))
        found.append(("evaluations", f"{len(steps.evaluations):,}, in {duration(seconds)} beside the steps"))
    return [*found, *_losses(steps, parts)]


def _speeds(steps: Steps, plan: Plan | Missing, parts: list[Part] | Missing) -> list[tuple[str, str]]:
    which, is_warm = steps.typical()
    warm = "after warm-up" if is_warm else "with warm-up"
    found = [("median speed", f"{median(steps.speed[which]):,.0f} tok/s {warm}")]
    first = since(steps, parts)
    which, is_warm = steps.typical(first)
    of = f" of the steps after {first:,}" if first else ""
    if len(which):
        measured = median(steps["seconds"][which])
        found.append(("measured step", f"median {measured:.3f} s{of}, {'after' if is_warm else 'with'} warm-up"))
    if isinstance(plan, Missing) or not math.isfinite(plan.seconds):
        found.append(("planned step", "not known: a plan has times only where a GPU was measured"))
    else:
        apart = f"; measured {measured / plan.seconds - 1:+.1%}" if len(which) and plan.seconds > 0 else ""
        found.append(("planned step", f"{plan.seconds:.3f} s{apart}".replace("%", " %")))
    return found


def _losses(steps: Steps, parts: list[Part] | Missing) -> list[tuple[str, str]]:
    """Return what did not go as it should."""
    again = steps["step_retries"] > 0
    times = total(steps["step_retries"])
    tried = f"{times:,.0f} times, as GPU memory ran out in step {_few(steps['step'][again])}"
    starts = [] if isinstance(parts, Missing) else [part.from_step for part in parts]
    stops = steps.stops(starts)
    left_out = steps.left_out
    overflowed = f"{len(left_out):,}, as gradients overflowed: {_few(left_out)}"
    return [
        ("steps tried again", tried if again.any() else "none"),
        ("steps left out", overflowed if len(left_out) else "none"),
        *([("allocator's stops", f"{stops:,}: a lower --gpu_memory_gib may be faster")] if stops else []),
    ]


def _few(steps: Numbers) -> str:
    return ", ".join(f"{step:,.0f}" for step in steps[:10]) + (", …" if len(steps) > 10 else "")
