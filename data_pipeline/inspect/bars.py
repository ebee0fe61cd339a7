"""Bars as SVG: histograms upright, named bars lying."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 560, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 10, 26
ROW, NAME_WIDTH, NUMBER_WIDTH, CHARACTERS = 24, 230, 100, 36
STYLE = """
.bar { fill: var(--c0); } .name { text-anchor: end; }
"""


def draw_histogram(edges: NDArray[np.float64], counts: NDArray[np.int64], name: str) -> str:
    """Upright bars over a number line.

    Args:
        edges: `[n + 1]`, rising.
        counts: `[n]`, not all zero.
        name: plain text for those who don't see it.
    """
    inner, highest = WIDTH - LEFT - RIGHT, int(counts.max())
    low, high = float(edges[0]), float(edges[-1])
    bottom = HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * inner

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}">']
    for share in (0.5, 1.0):
        y = bottom - share * (bottom - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="value" x="{LEFT - 6}" y="{y + 3.5:.1f}">{share * highest:,.4g}</text>')
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        height = count / highest * (bottom - TOP)
        title = f"<title>{start:.4g} to {end:.4g}: {count:,}</title>"
        parts.append(
            f'<rect class="bar" x="{x(start):.1f}" y="{bottom - height:.1f}" height="{height:.1f}" '
            f'width="{max(0.5, x(end) - x(start) - 0.5):.1f}">{title}</rect>'
        )
    for value in np.linspace(low, high, 5):
        parts.append(f'<text class="step" x="{x(value):.1f}" y="{HEIGHT - 8}">{value:.4g}</text>')
    return "\n".join([*parts, "</svg>"])


def draw_bars(names: Sequence[str], values: Sequence[int], name: str) -> str:
    """Lying bars, one below the other, each with its name before and its number behind it."""
    if not values:
        return ""
    height, longest = ROW * len(values) + 8, max(1, *values)
    room = WIDTH - NAME_WIDTH - NUMBER_WIDTH
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(name)}">']
    for number, (label, value) in enumerate(zip(names, values, strict=True)):
        middle, length = ROW * number + ROW / 2 + 4, value / longest * room
        shown = label if len(label) <= CHARACTERS else label[: CHARACTERS - 1] + "…"
        parts.append(
            f'<text class="name" x="{NAME_WIDTH - 8}" y="{middle + 3.5}">{html.escape(shown)}'
            f"<title>{html.escape(label)}</title></text>"
            f'<rect class="bar" x="{NAME_WIDTH}" y="{middle - 8}" height="16" width="{length:.1f}"/>'
            f'<text x="{NAME_WIDTH + length + 6:.1f}" y="{middle + 3.5}">{value:,}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def histogram(values: NDArray[np.float64], bins: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges and counts over the values' range; finite values, at least one."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        span = abs(low) * 1e-3 or 0.5
        low, high = low - span, high + span
    counts, edges = np.histogram(values, bins, (low, high))
    return edges, counts.astype(np.int64)


def length_histogram(counts: NDArray[np.int64], bins: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Edges and counts of whole numbers in bins of equal width.

    Args:
        counts: `[longest + 1]`, how often each number occurs.
        bins: about so many; each is a whole number of lengths wide.
    """
    width = max(1, math.ceil(len(counts) / bins))
    padded = np.pad(counts, (0, -len(counts) % width))
    sums = padded.reshape(-1, width).sum(axis=1)
    return np.arange(len(sums) + 1, dtype=np.float64) * width, sums
