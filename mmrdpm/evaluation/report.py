"""`report.html`: one file with every figure, its protocol, pictures and plots."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image

from mmrdpm.evaluation.figure import Figure
from mmrdpm.evaluation.part import Shown
from mmrdpm.evaluation.results import Results
from mmrdpm.evaluation.store import to_png, write

_CURVE = re.compile(r"(?P<what>.*) at (?P<axis>timestep|guidance) (?P<x>[\d.]+)")
_COLOURS = ("steelblue", "darkorange", "seagreen", "firebrick")
_WIDTH, _HEIGHT, _MARGIN = 420, 220, 44  # pixels of a plot

Point = tuple[float, Figure]


def write_report(results: Results, shown: Sequence[Shown], path: Path) -> None:
    """Writes the page; it refers to nothing outside itself."""
    write(path, "\n".join(_page(results, shown)).encode())


def _page(results: Results, shown: Sequence[Shown]) -> Iterator[str]:
    title = html.escape(f"{results.model}: {results.suite}")
    yield f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
td, th {{ padding: 2px 10px; text-align: left; vertical-align: top }}
img {{ image-rendering: pixelated; max-width: 100% }} .n {{ text-align: right }}
details {{ color: #555; font-size: 12px }} figure {{ display: inline-block; margin: 0 1em 1em 0;
max-width: 30em; vertical-align: top }}
</style><h1>{title}</h1>
<p>Weights <code>{results.weights_sha256}</code>. Intervals are 95%.</p>"""
    if results.not_computed:
        yield "<h2>Not computed</h2><ul>"
        for item in results.not_computed:
            yield f"<li>{html.escape(item.part)}: {html.escape(item.why)}</li>"
        yield "</ul>"
    for one in shown:
        yield f"<h2>{html.escape(one.title)}</h2>"
        if one.picture:
            yield f"<img src='{_data_url(one.picture)}'>"
        if one.rows:
            yield _table(one.rows)
    yield "<h2>Curves</h2>"
    for name, lines in curves(results.figures).items():
        yield _plot(name, lines)
    yield "<h2>Figures</h2><table><tr><th>figure<th>value<th>95%<th>n<th>protocol</tr>"
    yield from map(_row, results.figures)
    yield "</table></html>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (map(html.escape, row) for row in rows)
    lines = [f"<tr><th>{'<th>'.join(head)}</tr>", *(f"<tr><td>{'<td>'.join(r)}</tr>" for r in body)]
    return "<table>" + "".join(lines) + "</table>"


def curves(figures: Sequence[Figure]) -> dict[str, dict[str, list[Point]]]:
    """Figures at a timestep or a guidance scale: title -> line -> points."""
    found: dict[str, dict[str, list[Point]]] = {}
    for figure in figures:
        _, group, name = figure.name.split("/", 2)
        if match := _CURVE.fullmatch(name):
            title = f"{match['what']} against {match['axis']}"
            found.setdefault(title, {}).setdefault(group, []).append((float(match["x"]), figure))
    return found


def _plot(title: str, lines: dict[str, list[Point]]) -> str:
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low = min(0.0, *(figure.interval[0] for _, figure in points))
    high = max(figure.interval[1] for _, figure in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        up = (y - low) / (high - low or 1)
        return _MARGIN + across * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - up * (
            _HEIGHT - 2 * _MARGIN
        )

    drawn, legend, notes = [], [], []
    for (name, line), colour in zip(lines.items(), cycle(_COLOURS), strict=False):
        ends = " ".join("{:.1f},{:.1f}".format(*place(x, f.value)) for x, f in sorted(line, key=_x))
        drawn.append(f'<polyline points="{ends}" fill="none" stroke="{colour}"/>')
        drawn += [
            _whisker(place(x, f.interval[0]), place(x, f.interval[1]), colour) for x, f in line
        ]
        said = f"{name} (n={line[0][1].count})"
        legend.append(f'<span style="color:{colour}">{html.escape(said)}</span>')
        notes += [f"{name}: {note}" for note in dict.fromkeys(f.note for _, f in line) if note]
    drawn += [_tick(place(x, low), f"{x:g}") for x in sorted({x for x, _ in points})]
    drawn += [_mark(place(left, y), f"{y:.3g}") for y in (low, high)]
    told = "".join(f"<br><em>{html.escape(note)}</em>" for note in notes)
    return (
        f"<figure><figcaption>{html.escape(title)}: {', '.join(legend)}{told}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="11">{"".join(drawn)}</svg></figure>'
    )


def _whisker(a: tuple[float, float], b: tuple[float, float], colour: str) -> str:
    return (
        f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
        f' stroke="{colour}" opacity=".5"/>'
    )


def _tick(at: tuple[float, float], text: str) -> str:
    return f'<text x="{at[0]:.1f}" y="{at[1] + 16:.1f}" text-anchor="middle">{text}</text>'


def _mark(at: tuple[float, float], text: str) -> str:
    return f'<text x="{at[0] - 6:.1f}" y="{at[1] + 4:.1f}" text-anchor="end">{text}</text>'


def _row(figure: Figure) -> str:
    low, high = figure.interval
    note = f"<br><em>{html.escape(figure.note)}</em>" if figure.note else ""
    protocol = "<br>".join(
        f"{html.escape(str(key))}: {html.escape(str(value))}"
        for key, value in figure.protocol.items()
    )
    return (
        f"<tr><td>{html.escape(figure.name)}{note}<td class=n>{figure.value:.4g}"
        f" {html.escape(figure.unit)}<td>{low:.4g} to {high:.4g}<td class=n>{figure.count}"
        f"<td><details><summary>protocol</summary>{protocol}</details></tr>"
    )


def _data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def _x(point: Point) -> float:
    return point[0]
