"""A page of plots as SVG, for `bench serving --plot`: how latencies are distributed, and how the load and the output went over time.

Owns the drawing, in text: no plotting library is needed. Readable in light and dark viewers: the page has a background of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 420, 250  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 40  # its margins
_COLORS = ("#2563a8", "#c2571a", "#3f7d3a")
_STYLE = "text{font:11px system-ui,sans-serif;fill:#333}.t{font-size:13px;font-weight:600}.g{stroke:#e3e3e0}.a{stroke:#999}"

Points = Sequence[tuple[float, float]]


@dataclass(slots=True)
class Panel:
    """One plot: lines by name over common axes. `limit`: an objective, drawn as a vertical line."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]
    limit: float | None = None


def distribution(values: Sequence[float], most: int = 200) -> Points:
    """The share of values up to each, in at most so many steps."""
    ordered, count = sorted(values), len(values)
    picked = sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)}) if count else []
    return [(ordered[i], (i + 1) / count) for i in picked]


def over_time(events: Sequence[tuple[float, float]], seconds: float, bins: int = 60) -> Points:
    """Events (time, amount) as amounts per second, in bins of the whole."""
    width = max(seconds, 1e-9) / bins
    sums = [0.0] * bins
    for at, amount in events:
        sums[min(bins - 1, max(0, int(at / width)))] += amount
    return [((i + 0.5) * width, total / width) for i, total in enumerate(sums)]


def open_at(spans: Sequence[tuple[float, float]], seconds: float, bins: int = 60) -> Points:
    """How many of the spans (start, end) are open at the middle of each bin."""
    middles = [(i + 0.5) * seconds / bins for i in range(bins)]
    return [(at, float(sum(start <= at < end for start, end in spans))) for at in middles]


def page(title: str, panels: Sequence[Panel]) -> str:
    """The SVG: a title, and panels in two columns."""
    rows = -(-len(panels) // 2)
    width, height = 2 * _WIDTH, rows * _HEIGHT + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#fdfdfb"/>',
        f'<text class="t" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate({i % 2 * _WIDTH},{36 + i // 2 * _HEIGHT})">', *_draw(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _draw(panel: Panel) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    most_x = max([x for x, _ in points] + [panel.limit or 0.0]) or 1.0
    ticks_x, ticks_y = _ticks(most_x), _ticks(max((y for _, y in points), default=0.0) or 1.0)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / ticks_x[-1] * (right - _LEFT), bottom - y / ticks_y[-1] * (bottom - _TOP)

    out = [f'<text class="t" x="{_LEFT}" y="{_TOP - 14}">{escape(panel.title)}</text>']
    for tick in ticks_y:
        y = at(0, tick)[1]
        out.append(f'<line class="g" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in ticks_x:
        x = at(tick, 0)[0]
        out.append(f'<line class="a" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,g}</text>')
    out.append(f'<line class="a" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text x="{right}" y="{bottom + 32}" text-anchor="end">{escape(panel.x)}</text>')
    out.append(f'<text x="{right}" y="{_TOP - 14}" text-anchor="end">{escape(panel.y)}</text>')
    if panel.limit is not None:
        x = at(panel.limit, 0)[0]
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="#a33" stroke-dasharray="4 3"/>')
        out.append(f'<text x="{x + 4:.1f}" y="{bottom - 6}" style="fill:#a33">objective</text>')
    for i, (name, line) in enumerate(panel.lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        color = _COLORS[i % len(_COLORS)]
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8" stroke-linejoin="round"/>')
        if len(panel.lines) > 1:
            out.append(f'<text x="{_LEFT + 8 + 90 * i}" y="{bottom + 32}" style="fill:{color}">{escape(name)}</text>')
    return out


def _ticks(most: float) -> list[float]:
    """From 0 to at least `most` in three to six round steps."""
    power = 10 ** math.floor(math.log10(most))
    step = next(power * share for share in (0.2, 0.25, 0.5, 1, 2, 2.5) if most / (power * share) <= 5.0001)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]
