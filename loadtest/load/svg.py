"""Plots as SVG inside HTML: colours come from the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """Points of one colour (`c0` to `c5` in the page's style); a line, or dots."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dots: bool = False


@dataclass(frozen=True)
class Limit:
    """A line across the plot, at an x or at a y."""

    name: str
    x: float | None = None
    y: float | None = None


def plot(title: str, x_label: str, y_label: str, series: Sequence[Series], limits: Sequence[Limit] = ()) -> str:
    """A figure with axes from 0; nothing where there is no point."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    x_top = max([x for x, _ in points] + [limit.x * 1.1 for limit in limits if limit.x]) or 1.0
    y_top = max([y for _, y in points] + [limit.y * 1.1 for limit in limits if limit.y]) or 1.0
    x_ticks, y_ticks = ticks(x_top), ticks(y_top)
    x_top, y_top = max(x_top, x_ticks[-1]), max(y_top, y_ticks[-1])

    def at_x(x: float) -> float:
        return LEFT + x / x_top * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_top * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    under = HEIGHT - BOTTOM + 16
    parts += [f'<text x="{at_x(x):.1f}" y="{under}" text-anchor="middle">{x:g}</text>' for x in x_ticks]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    for limit in limits:
        name = escape(limit.name)
        if limit.x is not None:
            x, y = at_x(limit.x), HEIGHT - BOTTOM
            parts.append(f'<path class="limit" d="M{x:.1f} {TOP}V{y}"/>')
            parts.append(f'<text x="{x - 5:.1f}" y="{y - 6}" text-anchor="end">{name}</text>')
        if limit.y is not None:
            parts.append(f'<path class="limit" d="M{LEFT} {at_y(limit.y):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT + 6}" y="{at_y(limit.y) - 5:.1f}">{name}</text>')
    for one in series:
        if one.dots:
            dots = "".join(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.6"/>' for x, y in thin(one.points))
            parts.append(f'<g class="c{one.colour} dots">{dots}</g>')
        elif one.points:
            line = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in thin(one.points))
            parts.append(f'<path class="c{one.colour} line" d="M{line}"/>')
    keys = "".join(f'<span><i class="c{one.colour}"></i>{escape(one.name)}</span>' for one in series if one.points)
    caption = f"<b>{escape(title)}</b> <small>{escape(y_label)}</small><span class=keys>{keys}</span>"
    label = escape(f"{title}: {y_label} over {x_label}")
    image = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"


def ticks(top: float) -> list[float]:
    """Round numbers from 0 up to about `top`, four to eight."""
    step = 10.0 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 6)
    return [round(number * step, 12) for number in range(math.ceil(top / step - 1e-9) + 1)]


def distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """The share (%) of values that are at most x."""
    ordered = sorted(values)
    return [(value, 100 * (number + 1) / len(ordered)) for number, value in enumerate(ordered)]


def thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most about `MAX_POINTS`, evenly chosen, the last one among them."""
    step = max(len(points) // MAX_POINTS, 1)
    chosen = list(points[::step])
    return chosen if not points or chosen[-1] == points[-1] else [*chosen, points[-1]]
