"""Curves over steps, as SVG.

A run may have 100,000 steps and a chart has 600 pixels: steps are put together in buckets, of which a line
shows the mean and a band the range.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 26
BUCKETS = 280
COLOURS = 6
"""Colours that the page's style defines, as c0, c1, ..."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: (step, value) by rising step, all finite."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Marks:
    """Steps at which something happened, in all charts of a run."""

    restarts: Sequence[int] = ()
    skips: Sequence[int] = ()


@dataclass(frozen=True)
class _Bucket:
    step: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    first: float
    last: float
    low: float
    high: float
    logarithmic: bool

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / max(self.last - self.first, 1e-9) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._warp(self.low), self._warp(self.high)
        place = (self._warp(value) - low) / max(high - low, 1e-12)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, place)) * (HEIGHT - TOP - BOTTOM)

    def _warp(self, value: float) -> float:
        return math.log10(max(value, 1e-30)) if self.logarithmic else value


def draw_chart(curves: Sequence[Curve], marks: Marks, logarithmic: bool = False) -> str:
    """The chart as an `<svg>` element; empty where no curve has a point.

    Args:
        logarithmic: of the value axis, where all values are positive.
    """
    buckets = [_put_together(curve.points) for curve in curves if curve.points]
    names = [curve.name for curve in curves if curve.points]
    if not buckets:
        return ""
    scale = _scale(buckets, logarithmic)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(", ".join(names))}">',
        *_axes(scale),
        *_drawn_marks(scale, marks),
    ]
    for number, series in enumerate(buckets):
        parts += _drawn_curve(scale, series, number % COLOURS)
    return "\n".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Names of a chart's curves in their colours, as HTML; empty where there is only one."""
    if len(names) < 2:
        return ""
    items = (
        f'<span class="key k{number % COLOURS}">{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{" ".join(items)}</p>'


def _put_together(points: Sequence[Point]) -> list[_Bucket]:
    size = max(1, math.ceil(len(points) / BUCKETS))
    buckets = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part]
        step = sum(step for step, _ in part) / len(part)
        buckets.append(_Bucket(step, sum(values) / len(values), min(values), max(values)))
    return buckets


def _scale(curves: Sequence[Sequence[_Bucket]], logarithmic: bool) -> _Scale:
    """Fits all means and nearly all of the bands: a few spikes are cut off and do not flatten the rest."""
    buckets = [bucket for curve in curves for bucket in curve]
    lows, highs = sorted(b.low for b in buckets), sorted(b.high for b in buckets)
    few = len(buckets) // 20
    low = min(lows[few], *(b.mean for b in buckets))
    high = max(highs[-1 - few], *(b.mean for b in buckets))
    logarithmic = logarithmic and low > 0
    if logarithmic:
        low, high = low / 1.15, high * 1.15
    else:
        span = high - low if high - low > 1e-6 * abs(high) else 0.1 * abs(high) or 1.0
        low, high = (0.0 if 0 <= low < span / 3 else low - 0.08 * span), high + 0.08 * span
    steps = [bucket.step for bucket in buckets]
    return _Scale(min(steps), max(steps), low, high, logarithmic)


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for value in _ticks(scale.low, scale.high, 5):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="value" x="{LEFT - 6}" y="{y + 3.5:.1f}">{short(value)}</text>')
    for step in _ticks(scale.first, scale.last, 6):
        if step == int(step):
            parts.append(f'<text class="step" x="{scale.x(step):.1f}" y="{HEIGHT - 8}">{short(step)}</text>')
    return parts


def _drawn_marks(scale: _Scale, marks: Marks) -> list[str]:
    bottom = HEIGHT - BOTTOM
    inside = [
        (kind, step)
        for kind, steps in (("restart", marks.restarts), ("skip", marks.skips))
        for step in steps
        if scale.first <= step <= scale.last
    ]
    parts = []
    for kind, step in inside:
        x, top = f"{scale.x(step):.1f}", TOP if kind == "restart" else bottom - 9
        title = f"<title>{kind} at step {step}</title>"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}">{title}</line>')
    return parts


def _drawn_curve(scale: _Scale, buckets: Sequence[_Bucket], colour: int) -> list[str]:
    upper = [f"{scale.x(b.step):.1f},{scale.y(b.high):.1f}" for b in buckets]
    lower = [f"{scale.x(b.step):.1f},{scale.y(b.low):.1f}" for b in reversed(buckets)]
    line = " ".join(f"{scale.x(b.step):.1f},{scale.y(b.mean):.1f}" for b in buckets)
    parts = []
    if any(b.low != b.high for b in buckets):
        parts.append(f'<polygon class="band c{colour}" points="{" ".join(upper + lower)}"/>')
    if len(buckets) == 1:
        x, y = line.split(",")
        parts.append(f'<circle class="dot c{colour}" cx="{x}" cy="{y}" r="3"/>')
    return [*parts, f'<polyline class="curve c{colour}" points="{line}"/>']


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high, some `about` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999), default=10 * power)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 12k, 0.35, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
