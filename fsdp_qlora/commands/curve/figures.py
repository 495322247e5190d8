"""The figures of a curve's points: read from their evaluations, as a table, as CSV, as numbers to draw."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.commands.evaluate_rows import FILE
from fsdp_qlora.generation.scores import Loss, Share

SHARES = ("exact", "choice", "choice_per_token")


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval, where there is one."""

    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Point:
    """A finished point: rows trained on, and measure -> figure. record: evaluation.json's figures of this state."""

    rows: int
    record: dict[str, Any]

    @property
    def figures(self) -> dict[str, Figure]:
        made = {}
        if "loss" in self.record:
            mean = math.nan if self.record["loss"] is None else self.record["loss"]
            low, high = self.record["loss_interval"] or (None, None)  # none of a single row
            half = None if low is None else mean - low
            loss = Loss(mean, self.record["label_tokens"], self.record["loss_rows"], half)
            made["loss"] = Figure(mean, low, high, str(loss))
        for name in SHARES:
            if name in self.record:
                share = Share(self.record[name]["right"], self.record[name]["rows"])
                made[name] = Figure(share.share, *share.interval, str(share))
        return made


def read_point(folder: Path, rows: int) -> Point | None:
    """Return a point's figures, None where it has not been measured, or its file is no evaluation."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        point = Point(rows, record["adapter" if rows else "base"])
        return point if point.figures else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measures_of(points: Sequence[Point]) -> list[str]:
    """Return all measures of the points, in the order in which they are told."""
    return list(dict.fromkeys(name for point in points for name in point.figures))


def table(points: Sequence[Point]) -> list[str]:
    """Return lines of a table: a row for each point, a column for each measure."""
    names = measures_of(points)
    cells = [["rows", *names]]
    for point in points:
        figures = point.figures
        cells.append([f"{point.rows:,}", *(figures[name].text if name in figures else "" for name in names)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        padded = [cell.ljust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.rjust(widths[0]), *padded]).rstrip())
    return lines


def csv(points: Sequence[Point]) -> str:
    """Return a table of comma-separated values: rows, and of each measure value, low and high of its interval."""
    names = measures_of(points)
    lines = [",".join(["rows", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))])]
    for point in points:
        numbers: list[Any] = [point.rows]
        for name in names:
            figure = point.figures.get(name)
            numbers += ["", "", ""] if figure is None else [figure.value, figure.low, figure.high]
        lines.append(",".join("" if number is None else str(number) for number in numbers))
    return "\n".join(lines) + "\n"
