"""Plots of what a sweep has measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrdpm.errors import DataError

Row = dict[str, Any]


def plot_quality(names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Named in the top 10 against the information in the codes and what independence loses."""
    drawn, axes = figure(2)
    pairs = (
        ("information", "information, nats per picture"),
        ("independence", "lost by drawing positions independently, nats per picture"),
    )
    for axis, (key, label) in zip(axes, pairs, strict=True):
        for name in names:
            own = [r for r in rows if r["variant"] == name and r.get(key) is not None]
            if own:
                place = [statistics.fmean(r[k] for r in own) for k in (key, "top10")]
                axis.plot(*place, "o")
                axis.annotate(name, place, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.margins(x=0.3)  # room for the names
        axis.set(xlabel=label, ylabel="named in the top 10")
    drawn.savefig(path)


def plot_steps(names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Per step, in the order of drawing: information, and what independence loses."""
    drawn, axes = figure(2)
    pairs = (("loss_steps", "nats per code"), ("independence_steps", "lost, nats per code"))
    for axis, (key, label) in zip(axes, pairs, strict=True):
        for name in names:
            own = [r[key] for r in rows if r["variant"] == name and r.get(key)]
            if own:
                means = [statistics.fmean(step) for step in zip(*own, strict=True)]
                share = [(i + 1) / len(means) for i in range(len(means))]
                axis.plot(share, means, ".-", label=name)
        axis.set(xlabel="share of the steps drawn", ylabel=label)
    axes[0].legend(fontsize=6)
    drawn.savefig(path)


def plot_tokenizers(tokenizers: Sequence[Row], path: Path) -> None:
    """Latent error and codebook use per step, in the order of drawing."""
    drawn, axes = figure(2)
    for axis, key, label in zip(
        axes, ("latent_error", "usage"), ("latent error", "codebook use"), strict=True
    ):
        for t in tokenizers:
            share = [(i + 1) / len(t[key]) for i in range(len(t[key]))]
            axis.plot(share, t[key], ".-", label=t["name"])
        axis.set(xlabel="share of the steps drawn", ylabel=label)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=6)
    drawn.savefig(path)


def figure(columns: int) -> tuple[Any, Any]:
    """A figure that needs no display; the same data give the same SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError(
            f"plots need the package {error.name}: pip install 'mmrdpm[eval]'"
        ) from None
    matplotlib.rcParams["svg.hashsalt"] = "mmrdpm"
    drawn = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    axes = drawn.subplots(1, columns)
    for axis in axes:
        axis.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
    return drawn, axes
