"""Charts as SVG text, both axes logarithmic: a power law is a straight line."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _MARGIN = 420, 300, 50
_COLOURS = ("steelblue", "darkorange", "seagreen", "crimson", "purple", "grey")


def chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> str:
    """One chart of named series of positive points."""
    xs, ys = ([p[axis] for points in series.values() for p in points] for axis in (0, 1))
    parts = [
        _text(_WIDTH / 2, 18, title, "middle"),
        _text(_WIDTH / 2, _HEIGHT - 8, x_label, "middle"),
        _text(4, 34, y_label, "start"),
        f'<path d="M{_MARGIN},40 V{_HEIGHT - _MARGIN} H{_WIDTH - 10}" fill="none" stroke="black"/>',
    ]
    for x in sorted(set(xs)):
        parts.append(_text(_across(x, xs), _HEIGHT - _MARGIN + 16, _number(x), "middle"))
    for y in (min(ys), max(ys)):
        parts.append(_text(_MARGIN - 4, _up(y, ys) + 4, _number(y), "end"))
    for i, (name, points) in enumerate(series.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        line = " ".join(f"{_across(x, xs):.1f},{_up(y, ys):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_MARGIN + 10, 52 + 15 * i, name, "start", colour))
    return f"<g>{''.join(parts)}</g>"


def growth_charts(grown: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Time and memory over what grows, a chart each; see `measure.growth`."""
    charts = []
    for name, found in grown.items():
        for key, which in (("seconds", "time"), ("bytes", "memory")):
            points = [(point["size"], point[key]) for point in found["points"]]
            power = f"power {found[f'{which}_exponent']:.2f}"
            charts.append(chart(f"{key} over {name}", name, key, {power: points}))
    return charts


def page(charts: Sequence[str]) -> str:
    """An SVG file of charts side by side, two in a row."""
    rows = math.ceil(len(charts) / 2)
    placed = "".join(
        f'<g transform="translate({i % 2 * _WIDTH},{i // 2 * _HEIGHT})">{drawn}</g>'
        for i, drawn in enumerate(charts)
    )
    size = f'width="{2 * _WIDTH}" height="{rows * _HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{placed}</svg>\n'


def _across(x: float, xs: Sequence[float]) -> float:
    return _MARGIN + 15 + _share(x, xs) * (_WIDTH - _MARGIN - 45)


def _up(y: float, ys: Sequence[float]) -> float:
    return _HEIGHT - _MARGIN - 10 - _share(y, ys) * (_HEIGHT - _MARGIN - 60)


def _share(value: float, of: Sequence[float]) -> float:
    """Where a value lies between the least (0) and the greatest (1), in logarithms."""
    low, high = math.log(min(of)), math.log(max(of))
    return (math.log(value) - low) / (high - low) if high > low else 0.5


def _number(value: float) -> str:
    """To three digits or four, large ones with a prefix of SI."""
    large = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    divisor, prefix = next((pair for pair in large if value >= pair[0]), (1.0, ""))
    return f"{value / divisor:.3g}{prefix}" if prefix else f"{value:.4g}"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "black") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{html.escape(text)}</text>"
