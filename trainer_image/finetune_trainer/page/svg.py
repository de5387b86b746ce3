"""Charts as SVG text: lines over steps and bars over lengths, drawn in the colours of the page that they are put into.

Pure, standard library only. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

Point = tuple[float, float]

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 30, 14, 44
MOST_POINTS = 600  # about one per pixel: more cannot be seen


class Line(NamedTuple):
    """One curve; `style` is its CSS class, `dots` marks every point (for few ones)."""

    label: str
    points: Sequence[Point]
    style: str
    dots: bool = False


class Scale(NamedTuple):
    """Maps values from `low`..`high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, level: tuple[str, float] | None) -> str:
    """Curves with axes, grid and legend; `level` is a dashed horizontal line with a name. Points that are not finite
    are left out; without any point there is no chart.
    """
    shown = [line._replace(points=thinned([p for p in line.points if math.isfinite(p[1])])) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    if level is not None and not math.isfinite(level[1]):
        level = None
    values = [y for line in shown for _, y in line.points] + ([level[1]] if level else [])
    steps = [x for line in lines for x, _ in line.points]  # thinned ones end before the last step
    across = Scale(min(0.0, min(steps)), max(steps) or 1.0, LEFT, WIDTH - RIGHT)
    up = Scale(*_padded(min(values), max(values)), HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up), *_labels(x_label, y_label)]
    if level is not None:
        y = up(level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line in shown:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle class="{line.style}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in line.points
            ]
    legend = [(line.label, line.style) for line in shown] + ([(level[0], "level")] if level else [])
    return _figure(title, parts, legend if len(legend) > 1 else [])


def bar_chart(title: str, edges: Sequence[float], counts: Sequence[int], x_label: str, y_label: str) -> str:
    """A histogram: `counts[i]` lie between `edges[i]` and `edges[i + 1]`."""
    if not counts or not any(counts):
        return ""
    across = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    up = Scale(0.0, max(counts) * 1.05, HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up), *_labels(x_label, y_label)]
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        left, width, y = across(low), max(across(high) - across(low) - 1, 0.5), up(count)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{up(0) - y:.1f}">'
            f"<title>{number(low)} to {number(high)}: {count}</title></rect>"
        )
    return _figure(title, parts, [])


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: neighbours are replaced by their mean."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, count: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them and at least `least` apart."""
    raw = max((high - low) / count, least)
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's text: 1,000 or 0.25 or 1.5e-4."""
    if value and (abs(value) < 1e-2 or abs(value) >= 1e7):
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.10g}" if value == round(value) else f"{value:.4g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < margin * 4 else low - margin), high + margin


def _grid(across: Scale, up: Scale) -> list[str]:
    parts = []
    for value in ticks(up.low, up.high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(across.low, across.high, 8, least=1):
        x = across(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    base = HEIGHT - BOTTOM
    return [*parts, f'<path class="axis" d="M{LEFT},{TOP}V{base}H{WIDTH - RIGHT}"/>']


def _labels(x_label: str, y_label: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>']
    if y_label:
        turned = f'transform="rotate(-90 14 {middle})"'
        parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return parts


def _figure(title: str, parts: Sequence[str], legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span><i class="{style}"></i>{escape(label)}</span>' for label, style in legend)
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )
