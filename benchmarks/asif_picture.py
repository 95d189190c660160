"""A picture of curves over a logarithmic axis, as an SVG that needs nothing else and suits light and dark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.demo_report import nice_ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 48, 150, 34, 44
COLOURS = ("#2a78d6", "#d95926", "#1baa7d")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.title{font-weight:600}.grid{stroke:#8884}"
    ".chance{stroke-dasharray:4 4;opacity:.7}polyline{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


@dataclass(frozen=True)
class Curve:
    """Values over x, several for each, and the value of chance."""

    name: str
    xs: Sequence[float]
    values: Sequence[Sequence[float]]
    chance: float


def draw(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """The SVG: means as a line, single values as points, chance as a dashed line of the curve's colour."""
    xs = sorted({x for curve in curves for x in curve.xs})
    low, high = math.log(xs[0]), math.log(xs[-1])
    ticks = nice_ticks(0, max(max(each) for curve in curves for each in curve.values))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (math.log(x) - low) / max(high - low, 1e-9) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - y / ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    end = WIDTH - RIGHT
    for tick in ticks:
        y = place(xs[0], tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in (10**i * m for i in range(1, 8) for m in (1, 3)):
        if xs[0] <= x <= xs[-1]:
            at = place(x, 0)[0]
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,}</text>')
    parts.append(f'<text x="{end}" y="{HEIGHT - 6}" text-anchor="end">{escape(unit)}</text>')
    for curve, colour in zip(curves, COLOURS, strict=False):
        means = [statistics.fmean(each) for each in curve.values]
        points = [place(x, y) for x, y in zip(curve.xs, means, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
        for x, each in zip(curve.xs, curve.values, strict=True):
            for value in each:
                at = place(x, value)
                parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="2.5" fill="{colour}"/>')
        y = place(xs[0], curve.chance)[1]
        parts.append(
            f'<line class="chance" stroke="{colour}" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        x, y = points[-1][0] + 8, points[-1][1] + 4
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" style="fill:{colour}">{escape(curve.name)}</text>')
    ends = [(curve.name, *map(statistics.fmean, (curve.values[0], curve.values[-1]))) for curve in curves]
    label = "; ".join(f"{name} from {first:.1f} to {last:.1f}" for name, first, last in ends)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {escape(label)}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )
