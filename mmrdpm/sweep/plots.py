"""Plots of what a sweep has measured."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrdpm.errors import DataError

Row = dict[str, Any]
Column = tuple[str, str, Callable[[float], str]]
"""Key of a figure in results.jsonl, its title, how one value is written."""

_NAME_SIZE = 7  # of letters, points
_LINE = 7.5  # from a name to one above it, points
_DOT = 4  # from the middle of a dot to where a name may begin, points


def differs(names: Sequence[str], rows: Sequence[Row], key: str) -> bool:
    """Whether a figure has another mean for one variant than for another: else it tells nothing."""
    return len({statistics.fmean(own) for own in _by_name(names, rows, key).values()}) > 1


def plot_variants(
    names: Sequence[str],
    base: str | None,
    rows: Sequence[Row],
    columns: Sequence[Column],
    path: Path,
) -> None:
    """A line per variant: mean and standard deviation over its seeds, a panel per figure."""
    measured = [name for name in names if any(row["variant"] == name for row in rows)]
    drawn, axes = figure(len(columns), width=2.4, height=1.4 + 0.25 * len(measured))
    for axis, (key, title, write) in zip(axes, columns, strict=True):
        for name, own in _by_name(measured, rows, key).items():
            mean = statistics.fmean(own)
            spread = statistics.stdev(own) if len(own) > 1 else None
            color = "black" if name == base else "tab:blue"
            axis.errorbar(mean, measured.index(name), xerr=spread, fmt="o", color=color, capsize=3)
            if name == base:
                axis.axvline(mean, color=color, linestyle=":", linewidth=1)
        axis.set_yticks(range(len(measured)), measured if axis is axes[0] else [])
        axis.set_ylim(len(measured) - 0.5, -0.5)  # the first variant on top
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(textwrap.fill(title, 25), fontsize=9)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(axis="x", labelsize=8)
        axis.xaxis.set_major_formatter(lambda value, _, write=write: write(value))
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == base else "normal")
    drawn.supxlabel("mean and standard deviation over the seeds", fontsize=9)
    save(drawn, path)


def plot_quality(names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Named in the top 10 against the information in the codes, its share in the first half of the
    steps, and what independence loses."""
    rows = [row | {"first_half": first_half(row["loss_steps"])} for row in rows]
    pairs = (
        ("information", "information, nats per picture"),
        ("first_half", "of it in the first half of the steps"),
        ("independence", "lost by drawing positions independently, nats per picture"),
    )
    known = [pair for pair in pairs if any(row.get(pair[0]) is not None for row in rows)]
    drawn, axes = figure(len(known))
    quality = _by_name(names, rows, "top10")
    for axis, (key, label) in zip(axes, known, strict=True):
        places = {
            name: (statistics.fmean(own), statistics.fmean(quality[name]))
            for name, own in _by_name(names, rows, key).items()
        }
        for place in places.values():
            axis.plot(*place, "o")
        axis.margins(x=0.3, y=0.1)  # room for the names
        axis.set(xlabel=label, ylabel="named in the top 10")
        _write_names(drawn, axis, places)
    save(drawn, path)


def first_half(losses: Sequence[float]) -> float:
    """The share of all information that the first half of the steps (the larger one) carries."""
    return sum(losses[: -(-len(losses) // 2)]) / sum(losses)


def plot_steps(names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Per step, in the order of drawing: information, and what independence loses."""
    drawn, axes = figure(2)
    pairs = (("loss_steps", "nats per code"), ("independence_steps", "lost, nats per code"))
    for axis, (key, label) in zip(axes, pairs, strict=True):
        lines = {
            name: [statistics.fmean(step) for step in zip(*own, strict=True)]
            for name, own in _by_name(names, rows, key).items()
        }
        _over_steps(axis, lines, label)
    _name_lines(drawn, axes[0])
    save(drawn, path)


def plot_tokenizers(tokenizers: Sequence[Row], path: Path) -> None:
    """Latent error and codebook use per step, in the order of drawing."""
    drawn, axes = figure(2)
    pairs = (("latent_error", "latent error"), ("usage", "codebook use"))
    for axis, (key, label) in zip(axes, pairs, strict=True):
        _over_steps(axis, {t["name"]: t[key] for t in tokenizers}, label)
    axes[0].set_yscale("log")
    _name_lines(drawn, axes[0])
    save(drawn, path)


def figure(columns: int, width: float = 6.0, height: float = 4.5) -> tuple[Any, Any]:
    """A row of panels, of so many inches each, that needs no display."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError(
            f"plots need the package {error.name}: pip install 'mmrdpm[eval]'"
        ) from None
    drawn = Figure(figsize=(width * columns, height), layout="constrained")
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    colors = matplotlib.color_sequences["tab20"]
    styles = [style for style in ("-", "--") for _ in colors]  # more lines than colours
    for axis in axes:
        axis.set_prop_cycle(color=[*colors, *colors], linestyle=styles)
    return drawn, axes


def save(drawn: Any, path: Path) -> None:
    """Writes an SVG: the same bytes for the same data."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mmrdpm"}):
        drawn.savefig(path, metadata={"Date": None})


def _by_name(names: Sequence[str], rows: Sequence[Row], key: str) -> dict[str, list[Any]]:
    """A figure's values over the seeds, of every variant that has it."""
    values = {
        name: [r[key] for r in rows if r["variant"] == name and r.get(key) is not None]
        for name in names
    }
    return {name: own for name, own in values.items() if own}


def _over_steps(axis: Any, lines: Mapping[str, Sequence[float]], label: str) -> None:
    for name, steps in lines.items():
        share = [(i + 1) / len(steps) for i in range(len(steps))]
        axis.plot(share, steps, marker=".", label=name)
    axis.set(xlabel="share of the steps drawn", ylabel=label)


def _name_lines(drawn: Any, axis: Any) -> None:
    """One legend for all panels, beside them: inside it would hide lines."""
    drawn.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=_NAME_SIZE)


def _write_names(drawn: Any, axis: Any, places: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their dots, each moved up until it covers no other name or dot."""
    drawn.draw_without_rendering()  # lays the panels out, so that points on paper are known
    dots = {
        name: axis.transData.transform(place) * 72 / drawn.dpi for name, place in places.items()
    }
    taken = [(x - _DOT, x + _DOT, y - _DOT) for x, y in dots.values()]  # left, right, bottom
    for name, (x, y) in sorted(dots.items(), key=lambda item: item[1][1]):
        left, right, bottom = x + _DOT, x + _DOT + 0.65 * _NAME_SIZE * len(name), y
        beside = [low for start, end, low in taken if left < end and start < right]
        while any(abs(bottom - low) < _LINE for low in beside):
            bottom += 0.5
        taken.append((left, right, bottom))
        axis.annotate(
            *(name, places[name]),
            fontsize=_NAME_SIZE,
            xytext=(left - x, bottom - y),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5, "relpos": (0, 0)},
        )
