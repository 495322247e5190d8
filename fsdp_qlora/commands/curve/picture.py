"""The picture of a curve: accuracy and loss by rows, with their 95 % intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdp_qlora.commands.curve.figures import SHARES, Figure, Point, measures_of

COLORS = {"loss": "#c4641c", "exact": "#1f5fa8", "choice": "#2d7d46", "choice_per_token": "#7a4fa3"}
LABELS = {"loss": "loss", "exact": "exact answers", "choice": "choices", "choice_per_token": "choices, per token"}


def draw(path: Path, title: str, points: Sequence[Point]) -> None:
    """Write a PNG of finished points, at least one. Shares are on the left axis, the loss is on the right one."""
    # Only here: importing matplotlib takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    names = measures_of(points)
    shares = [name for name in SHARES if name in names]
    handles = [_line(axes, name, points, 100) for name in shares]
    if shares:
        axes.set(ylabel="right, %", ylim=(0, None))
    if "loss" in names:
        beside = axes.twinx() if shares else axes
        beside.set(ylabel="loss per label token")
        handles.append(_line(beside, "loss", points, 1))
    axes.set(xlabel="training rows", title=title)
    axes.set_xticks([point.rows for point in points])
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, frameon=False, loc="best")
    canvas.savefig(path, format="png")


def _line(axes: Any, name: str, points: Sequence[Point], scale: float) -> Any:
    found = [(point.rows, point.figures[name]) for point in points if name in point.figures]
    values = [figure.value * scale for _, figure in found]
    apart = [_apart(figure) for _, figure in found]
    errors = [[low * scale for low, _ in apart], [high * scale for _, high in apart]]
    return axes.errorbar(
        [rows for rows, _ in found], values, errors, color=COLORS[name], marker="o", markersize=4, linewidth=1.8,
        elinewidth=1, capsize=3, label=LABELS[name],
    )  # fmt: skip


def _apart(figure: Figure) -> tuple[float, float]:
    """Return how far the ends of the interval are from the value; 0 where there is none."""
    low = figure.value if figure.low is None else figure.low
    high = figure.value if figure.high is None else figure.high
    return max(0.0, figure.value - low), max(0.0, high - figure.value)
