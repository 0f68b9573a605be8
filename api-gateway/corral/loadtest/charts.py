"""Charts as inline SVG: lines and stacked bars, readable without scripts, in colours that the page defines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 600, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 26, 14, 40
COLOURS = 8

Format = Callable[[float], str]
Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """A series; a point whose second value is None breaks it. ``dashed``: of the other of two results."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """``low`` and ``high`` widen what the data span."""

    label: str
    form: Format
    low: float | None = None
    high: float | None = None
    log: bool = False


class _Scale:
    """From values to pixels, and the ticks between."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float, ticks: int) -> None:
        known = [value for value in values if not axis.log or value > 0]
        low = min([*known, *([axis.low] if axis.low is not None else [])], default=0.0)
        high = max([*known, *([axis.high] if axis.high is not None else [])], default=1.0)
        self.log = axis.log and low > 0
        if high <= low:
            low, high = (low * 0.9, low * 1.1) if low else (0.0, 1.0)
        self.ticks = _log_ticks(low, high, ticks) if self.log else _ticks(low, high, ticks)
        # Up to the next tick, so that the greatest value is between two numbers.
        if not self.log and axis.high is None and self.ticks[-1] < high:
            self.ticks.append(self.ticks[-1] + self.ticks[1] - self.ticks[0])
            high = self.ticks[-1]
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high = self._low, self._high
        value = min(high, max(low, value))
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return self._start + share * (self._end - self._start)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + at) * step, 12) for at in range(int((high - first * step) / step + 1e-9) + 1)] or [low]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) <= wanted + 2:
            break
    return found if len(found) >= 2 else _ticks(low, high, wanted)


def lines(title: str, series: Sequence[Line], x: Axis, y: Axis) -> str:
    """A figure with lines; empty where there is nothing to draw."""
    points = [(at, value) for line in series for at, value in line.points if value is not None]
    if not points:
        return ""
    across = _Scale(x, [at for at, _ in points], _LEFT, WIDTH - _RIGHT, 6)
    up = _Scale(y, [value for _, value in points], HEIGHT - _BOTTOM, _TOP, 5)
    drawn = [_path(line, across, up, x, y) for line in series]
    legend = [(line.name, line.colour, line.dashed) for line in series] if len(series) > 1 else []
    return _figure(title, "".join([_grid(across, up, x, y), *drawn]), legend)


def _path(line: Line, across: _Scale, up: _Scale, x: Axis, y: Axis) -> str:
    parts: list[str] = []
    marks: list[str] = []
    dots: list[str] = []
    values = [value for _, value in line.points]
    for number, (at, value) in enumerate(line.points):
        if value is None:
            continue
        begins = number == 0 or values[number - 1] is None
        ends = number + 1 == len(values) or values[number + 1] is None
        cx, cy = f"{across(at):.1f}", f"{up(value):.1f}"
        parts.append(f"{'M' if begins else 'L'}{cx} {cy}")
        said = escape(f"{line.name}: {y.form(value)} at {x.form(at)}")
        # A point that no line leads to is drawn itself.
        where, radius = (dots, 2.5) if begins and ends else (marks, 5)
        where.append(f'<circle cx="{cx}" cy="{cy}" r="{radius}"><title>{said}</title></circle>')
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    drawn = f'<path class="line c{line.colour}" d="{"".join(parts)}"{dash}/>'
    return f'{drawn}<g class="dot c{line.colour}">{"".join(dots)}</g><g class="hit">{"".join(marks)}</g>'


def bars(title: str, slots: Sequence[tuple[float, float, dict[str, int]]], x: Axis, y: Axis) -> str:
    """A figure with stacked bars; each slot is (start, width, name → value)."""
    names = sorted({name for _, _, parts in slots for name in parts})
    if not names:
        return ""
    across = _Scale(x, [edge for at, width, _ in slots for edge in (at, at + width)], _LEFT, WIDTH - _RIGHT, 6)
    up = _Scale(y, [0.0, *(float(sum(parts.values())) for _, _, parts in slots)], HEIGHT - _BOTTOM, _TOP, 5)
    drawn = []
    for at, width, parts in slots:
        left, right, below = across(at), across(at + width), 0.0
        for name in (name for name in names if parts.get(name)):
            top, bottom = up(below + parts[name]), up(below)
            below += parts[name]
            said = escape(f"{name}: {y.form(parts[name])} at {x.form(at)}")
            drawn.append(
                f'<rect class="c{names.index(name) % COLOURS}" x="{left + 0.5:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, right - left - 1):.1f}" height="{max(0.5, bottom - top):.1f}">'
                f"<title>{said}</title></rect>"
            )
    legend = [(name, number % COLOURS, False) for number, name in enumerate(names)]
    return _figure(title, _grid(across, up, x, y) + "".join(drawn), legend)


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> str:
    parts = []
    for tick in up.ticks:
        at = up(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{escape(y.form(tick))}</text>')
    for tick in across.ticks:
        at = across(tick)
        parts.append(f'<path class="tick" d="M{at:.1f} {HEIGHT - _BOTTOM}v4"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(x.form(tick))}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x.label)}</text>')
    return "".join(parts)


def _figure(title: str, content: str, legend: Sequence[tuple[str, int, bool]]) -> str:
    keys = "".join(
        f'<li><span class="key c{colour}{" dashed" if dashed else ""}"></span>{escape(name)}</li>'
        for name, colour, dashed in legend
    )
    listed = f"<ul class=legend>{keys}</ul>" if keys else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{listed}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{content}</svg></figure>'
    )
