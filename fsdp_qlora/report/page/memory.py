"""Memory: what the plan expected of a GPU by part, beside what was measured of each."""

import math
from collections.abc import Sequence

from fsdp_qlora.report.page.files import Missing
from fsdp_qlora.report.page.html import Html, join, paragraph, section, table, text
from fsdp_qlora.report.page.plan import Plan
from fsdp_qlora.report.page.steps import Steps
from fsdp_qlora.units import GIB

MIB = 2**20  # bytes
COLORS = 7  # classes part-0 to part-6 of the style sheet: as many as a plan has parts
TOTALS = "Parts are the plan's. PyTorch's allocator knows none: what was measured is the peak of all of them together."
HOST = (
    "Planned host memory is frozen weights, the embedding and saved activations of a node. What was measured is all "
    "that the processes take, with Python and libraries: the highest reading of a step, shared pages counted once."
)
ON_CPU = (
    "What was measured is all that the processes take, with Python and libraries: the highest reading of a step. The "
    "plan counts tensors alone."
)


def memory_section(plan: Plan | Missing, steps: Steps | Missing, begun: int) -> Html:
    """Return planned beside measured memory, as bars and as tables. begun: step after which the last part began."""
    planned = None if isinstance(plan, Missing) else plan
    measured = None if isinstance(steps, Missing) or not len(steps) else steps
    parts = [_bars(planned, measured)]
    if isinstance(plan, Missing):
        parts.append(paragraph(f"{plan.why} What was planned is not known."))
    else:
        parts += [_parts(plan), *([paragraph(TOTALS, "note")] if plan.on_gpus else [])]
    parts.append(_measured(planned, measured, begun))
    return section("memory", "Memory", *parts)


def size(nbytes: float) -> str:
    """Return bytes in three digits or so: 22.9 GiB, 84.0 MiB, 0."""
    if not nbytes:
        return "0"
    number, unit = (nbytes / GIB, "GiB") if nbytes >= GIB / 10 else (nbytes / MIB, "MiB")
    return f"{number:.1f} {unit}" if number >= 10 else f"{number:.2f} {unit}"


def _bars(plan: Plan | None, steps: Steps | None) -> Html:
    """Return a bar of the plan's parts above one for each GPU, all in one scale."""
    allocated, reserved = ([], []) if steps is None else (steps.allocated_gib, steps.reserved_gib)
    parts = [] if plan is None else [nbytes if 0 < nbytes < math.inf else 0.0 for nbytes in plan.parts.values()]
    ends = [sum(parts), *(gib * GIB for gib in [*allocated, *reserved])]
    scale = max((end for end in ends if math.isfinite(end)), default=0.0) or 1.0
    rows = []
    if plan is not None:
        place = "on each GPU" if plan.on_gpus else "for each rank"
        pieces = [
            _piece(sum(parts[:i]) / scale, nbytes / scale, f"part-{i % COLORS}", f"{name}: {size(nbytes)}")
            for i, (name, nbytes) in enumerate(zip(plan.parts, parts, strict=True))
            if nbytes
        ]
        rows.append(_row(f"planned, {place}", size(plan.device_bytes), pieces))
    for rank, gib in enumerate(allocated):
        held = reserved[rank] if rank < len(reserved) else gib
        said = f"peak {gib:.2f} GiB allocated, {held:.2f} GiB reserved"
        pieces = [_piece(0, held * GIB / scale, "reserved", said), _piece(0, gib * GIB / scale, "measured", said)]
        rows.append(_row(f"measured, rank {rank}", said, pieces))
    return Html(f'<div class="bars">{join(rows)}</div>' if rows else "")


def _row(name: str, value: str, pieces: Sequence[Html]) -> Html:
    label = text(f"{name}: {value}")
    return Html(
        f'<div class="bar"><p><span>{text(name)}</span> <span>{text(value)}</span></p>'
        f'<svg role="img" aria-label="{label}" width="100%" height="22">{"".join(pieces)}</svg></div>'
    )


def _piece(left: float, width: float, kind: str, said: str) -> Html:
    """Return a piece of a bar, nothing where its width is not known."""
    if math.isnan(width):
        return Html("")
    place = f'x="{left:.2%}" width="{min(max(width, 0), 1):.2%}" y="0" height="22"'
    return Html(f'<rect class="{kind}" {place}><title>{text(said)}</title></rect>')


def _parts(plan: Plan) -> Html:
    rows = [
        (_named(name, f"part-{i % COLORS}"), text(size(nbytes)), text(_part_of(nbytes, plan)))
        for i, (name, nbytes) in enumerate(plan.parts.items())
    ]
    rows.append((Html("<strong>all at the peak</strong>"), text(size(plan.device_bytes)), text("100 %")))
    if plan.loading_bytes > plan.device_bytes:
        rows.append((text("while it loads, which is more"), text(size(plan.loading_bytes)), Html("")))
    if plan.host_bytes > 0:
        rows.append((text("in host memory, per node"), text(size(plan.host_bytes)), Html("")))
    return table("Planned memory by part", ("planned part", "size", "share"), rows, numbers=(1, 2))


def _named(name: str, kind: str) -> Html:
    return Html(f'<span class="key {kind}"></span>{text(name)}')


def _part_of(nbytes: float, plan: Plan) -> str:
    return f"{nbytes / plan.device_bytes:.1%}".replace("%", " %") if plan.device_bytes > 0 else ""


def _measured(plan: Plan | None, steps: Steps | None, begun: int) -> Html:
    if steps is None:
        return paragraph("Nothing was measured: no step is recorded.")
    found: list[Html] = []
    if steps.allocated_gib:
        rows = [
            (text(rank), text(f"{gib:.2f} GiB"), text(f"{held:.2f} GiB"), text(_beside(gib * GIB, plan)))
            for rank, (gib, held) in enumerate(zip(steps.allocated_gib, steps.reserved_gib, strict=False))
        ]
        head = ("rank", "peak allocated", "peak reserved", "allocated, beside the plan")
        found.append(table("Measured GPU memory", head, rows, numbers=(1, 2, 3)))
        if begun:
            found.append(paragraph(f"These peaks are of the steps after {begun:,}, where the run was resumed.", "note"))
    if math.isfinite(steps.host_gib):
        found.append(paragraph(f"Host memory of all ranks: {steps.host_gib:.2f} GiB measured."))
        found.append(paragraph(HOST if steps.allocated_gib else ON_CPU, "note"))
    return join(found)


def _beside(nbytes: float, plan: Plan | None) -> str:
    if plan is None or not plan.device_bytes > 0:
        return "not known"
    return f"{nbytes / plan.device_bytes - 1:+.1%}".replace("%", " %").replace("-", "\N{MINUS SIGN}")
