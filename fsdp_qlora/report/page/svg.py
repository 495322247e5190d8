"""Pictures as inline SVG that fit any width: places are shares of the box, letters and lines keep their size.

Colors come from the style sheet by class, so that one picture serves both themes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fsdp_qlora.report.page.html import Html, text
from fsdp_qlora.report.series import Numbers

UNIT = 1000  # the box inside a plot, in which lines are drawn, is so wide and so high
NARROW = 1e-6  # of a number, or below TINY: numbers so close are drawn as equal, for labels that a phone has room for
TINY = 1e-100


@dataclass(frozen=True)
class Axis:
    """A range of numbers with round ones to write beside it."""

    low: float
    high: float
    ticks: Sequence[float]

    @property
    def labels(self) -> list[str]:
        """The ticks as they are written."""
        apart = min((b - a for a, b in pairwise(self.ticks)), default=math.inf)
        return [label(tick, apart) for tick in self.ticks]

    def share(self, value: float) -> float:
        """Return where a number is, from 0 at the low end to 1."""
        return (value - self.low) / (self.high - self.low)


def axis(values: Iterable[float], whole: bool = False, zero: bool = False, most: int = 5) -> Axis:
    """Return the axis of the finite ones of these values. whole: ticks are whole numbers. zero: it begins there.

    most: ticks, at most."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    if high - low <= max(TINY, NARROW * max(abs(low), abs(high))):
        apart = 1.0 if whole or abs(low) <= TINY else abs(low) / 10
        low, high = (low, high + apart) if zero or (whole and low == 0) else (low - apart, high + apart)
    elif not whole:
        margin = (high - low) / 20
        low, high = (low if zero else low - margin), high + margin
    return Axis(low, high, ticks(low, high, most, whole))


def ticks(low: float, high: float, most: int, whole: bool) -> list[float]:
    """Return at most so many round numbers between two, apart by 1, 2 or 5 times a power of 10."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, apart: float = math.inf) -> str:
    """Return a number as an axis has it: 100,000, 0.25, 2e-4. apart: from the next one, which looks different."""
    if value == 0:
        return "0"
    places = math.floor(math.log10(apart) + 1e-9) if math.isfinite(apart) else 0  # of its last digit, as a power of 10
    if 1e-3 <= abs(value) < 1e7:
        return f"{value:,.{max(6, -places)}f}".rstrip("0").rstrip(".")
    digits = math.floor(math.log10(abs(value))) - places + 1 if math.isfinite(apart) else 0
    mantissa, _, exponent = f"{value:.{max(3, digits)}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


class Plot:
    """A plot over steps; what is drawn later lies above.

    name: of no other picture of the page. title, description: for who cannot see it. height: pixels."""

    def __init__(self, name: str, title: str, description: str, x: Axis, y: Axis, y_label: str, height: int) -> None:
        self.name, self.title, self.description = name, title, description
        self.x, self.y, self.y_label, self.height = x, y, y_label, height
        self._inside: list[str] = []  # drawn in units of the box
        self._above: list[str] = []

    def band(self, steps: Numbers, low: Numbers, high: Numbers, kind: str) -> None:
        """Draw an area between two lines. kind: the class of its color."""
        there = [i for i in range(len(steps)) if math.isfinite(low[i]) and math.isfinite(high[i])]
        edge = [(steps[i], high[i]) for i in there] + [(steps[i], low[i]) for i in reversed(there)]
        if edge:
            path = "L".join(self._point(x, y) for x, y in edge)
            self._inside.append(f'<path class="area {kind}" d="M{path}Z"/>')

    def line(self, steps: Numbers, values: Numbers, kind: str) -> None:
        """Draw a line, with gaps where a value is not finite."""
        path, pen = [], "M"
        for x, y in zip(steps, values, strict=True):
            if not math.isfinite(y):
                pen = "M"
                continue
            path.append(f"{pen}{self._point(x, y)}" + ("h0" if pen == "M" else ""))
            pen = "L"
        if path:
            self._inside.append(f'<path class="line {kind}" d="{"".join(path)}"/>')

    def points(self, steps: Iterable[float], values: Iterable[float], kind: str, said: Sequence[str]) -> None:
        """Draw a dot for each finite value; said: what each shows under the pointer."""
        for x, y, one in zip(steps, values, said, strict=True):
            if math.isfinite(y):
                left, top = self._share(x, y)
                place = f'cx="{left:.2%}" cy="{top:.2%}" r="3"'
                self._above.append(f'<circle class="dot {kind}" {place}><title>{text(one)}</title></circle>')

    def verticals(self, steps: Iterable[float], kind: str) -> None:
        """Draw a line from bottom to top at each of these steps; as many as can be told apart."""
        for left in sorted({round(self.x.share(step), 3) for step in steps}):
            self._inside.append(f'<path class="line {kind}" d="M{_short(left * UNIT)} 0V{UNIT}"/>')

    def svg(self) -> Html:
        """Return the picture in its box."""
        grid = [f'<line class="grid" x1="0" x2="100%" y1="{y:.2%}" y2="{y:.2%}"/>' for y in self._heights()]
        marks = [
            f'<text x="0" dx="-8" y="{y:.2%}" dy="0.35em" text-anchor="end">{written}</text>'
            for written, y in zip(self.y.labels, self._heights(), strict=True)
        ]
        marks += [
            f'<text x="{self.x.share(tick):.2%}" y="100%" dy="1.5em" text-anchor="middle">{written}</text>'
            for tick, written in zip(self.x.ticks, self.x.labels, strict=True)
        ]
        name, whole = self.name, 'width="100%" height="100%"'
        return Html(
            f'<div class="plot"><svg role="img" width="100%" height="{self.height}" '
            f'aria-labelledby="{name}-title {name}-says"><title id="{name}-title">{text(self.title)}</title>'
            f'<desc id="{name}-says">{text(self.description)}</desc>\n{"".join(grid)}\n'
            f'<svg viewBox="0 0 {UNIT} {UNIT}" preserveAspectRatio="none" {whole}>'
            f"{''.join(self._inside)}</svg>\n{''.join(self._above)}\n"
            f'<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>\n{"".join(marks)}\n'
            f'<text x="0" y="0" dx="-48" dy="-0.9em">{text(self.y_label)}</text>'
            '<text x="100%" y="100%" dy="3em" text-anchor="end">optimizer step</text></svg></div>'
        )

    def _heights(self) -> list[float]:
        return [1 - self.y.share(tick) for tick in self.y.ticks]

    def _share(self, x: float, y: float) -> tuple[float, float]:
        return self.x.share(x), 1 - self.y.share(y)

    def _point(self, x: float, y: float) -> str:
        left, top = self._share(x, y)
        return f"{_short(left * UNIT)} {_short(top * UNIT)}"


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Return a list of (class of a color, its meaning)."""
    items = "".join(f'<li><span class="key {kind}"></span>{text(said)}</li>' for kind, said in entries)
    return Html(f'<ul class="legend">{items}</ul>')


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
