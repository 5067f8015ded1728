"""Scaling: a power law through the least loss at each budget, and the learning rate over widths."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrdpm.sweep.plots import figure, save

Row = dict[str, Any]

LOSSES = {"loss_image": "image, nats per code", "loss_text": "text, nats per token"}


@dataclass(frozen=True)
class PowerLaw:
    """`loss = scale * tflops ** -exponent` (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.3).

    Attributes:
        scale: the loss at a budget of 1e12 operations.
        exponent: above 0 where the loss falls.
    """

    scale: float
    exponent: float

    def at(self, tflops: float) -> float:
        """The loss at a budget, 1e12 operations."""
        return self.scale * tflops**-self.exponent


@dataclass(frozen=True)
class Point:
    """The best variant of a budget: 1e12 operations, the mean loss over its seeds, its size."""

    tflops: float
    loss: float
    parameters: int


def fit(points: Sequence[Point]) -> PowerLaw:
    """Least squares of the logarithms, of two points or more."""
    x, y = ([math.log(v) for v in column] for column in _columns(points))
    slope, intercept = statistics.linear_regression(x, y)
    return PowerLaw(math.exp(intercept), -slope)


def spread(points: Sequence[Point], tflops: float) -> tuple[float, float]:
    """The least and the largest loss that the law promises when one of the points is left out.

    No confidence interval: it says how far the promise hangs on single points, three or more.
    """
    left_out = [fit([*points[:i], *points[i + 1 :]]).at(tflops) for i in range(len(points))]
    return min(left_out), max(left_out)


def frontier(rows: Sequence[Row], key: str) -> list[Point]:
    """The best point of every budget, the smallest budget first."""
    budgets = _by_budget(rows, key)
    return [min(budgets[tflops], key=lambda point: point.loss) for tflops in sorted(budgets)]


def compute(rows: Sequence[Row], path: Path) -> str:
    """Draws loss over budget, a line per size, and the law; gives the table of the frontier."""
    parts = []
    drawn, axes = figure(len(LOSSES))
    for axis, (key, label) in zip(axes, LOSSES.items(), strict=True):
        sizes: dict[int, list[Point]] = defaultdict(list)
        for points in _by_budget(rows, key).values():
            for point in points:
                sizes[point.parameters].append(point)
        for parameters, points in sorted(sizes.items()):
            columns = _columns(sorted(points, key=lambda p: p.tflops))
            axis.plot(*columns, ".-", label=f"{parameters / 1e6:.1f}M")
        best = frontier(rows, key)
        parts.append(_table(key, best))
        if len(best) > 2:
            law = fit(best)
            ends = [best[0].tflops, best[-1].tflops]
            axis.plot(ends, [law.at(c) for c in ends], "k--", label=f"power -{law.exponent:.3f}")
        axis.set(xlabel="training budget, TFLOP", ylabel=label, xscale="log", yscale="log")
        axis.legend(fontsize=6)
    save(drawn, path)
    return "\n".join(parts)


def _table(key: str, best: Sequence[Point]) -> str:
    lines = [f"| TFLOP | parameters | {LOSSES[key]} |", "| ---: | ---: | ---: |"]
    lines += [f"| {p.tflops:g} | {p.parameters / 1e6:.2f}M | {p.loss:.4f} |" for p in best]
    if len(best) > 2:
        law = fit(best)
        beyond = 10 * best[-1].tflops
        low, high = spread(best, beyond)
        lines += [
            "",
            f"`loss = {law.scale:.3f} * TFLOP^-{law.exponent:.4f}`; at ten times the largest budget"
            f" {law.at(beyond):.3f} ({low:.3f} to {high:.3f} with one budget left out).",
        ]
    return "\n".join(lines) + "\n"


def learning_rates(rows: Sequence[Row], path: Path) -> str:
    """Draws loss over learning rate, a line per width; gives the table of the best rates."""
    drawn, axes = figure(len(LOSSES))
    lines = ["| width | " + " | ".join(f"best lr, {name}" for name in LOSSES.values()) + " |"]
    lines.append("| ---: | " + " | ".join("---:" for _ in LOSSES) + " |")
    widths: dict[int, dict[str, str]] = defaultdict(dict)
    for axis, (key, label) in zip(axes, LOSSES.items(), strict=True):
        by_width = _by_width(rows, key)
        for width, rates in sorted(by_width.items()):
            x = sorted(rates)
            axis.plot(x, [rates[lr] for lr in x], ".-", label=f"width {width}")
            widths[width][key] = f"{min(x, key=rates.__getitem__):g}"
        axis.set(xlabel="train.lr", ylabel=label, xscale="log")
        tried = sorted({lr for rates in by_width.values() for lr in rates})
        axis.set_xticks(tried, [f"{lr:g}" for lr in tried])
        axis.minorticks_off()
        axis.legend(fontsize=6)
    save(drawn, path)
    lines += [f"| {w} | " + " | ".join(widths[w][k] for k in LOSSES) + " |" for w in sorted(widths)]
    return "\n".join(lines) + "\n"


def _by_budget(rows: Sequence[Row], key: str) -> dict[float, list[Point]]:
    """Means over the seeds of every variant, by budget."""
    seeds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        seeds[row["variant"]].append(row)
    budgets: dict[float, list[Point]] = defaultdict(list)
    for same in seeds.values():
        loss = statistics.fmean(row[key] for row in same)
        budgets[same[0]["tflops"]].append(Point(same[0]["tflops"], loss, same[0]["parameters"]))
    return budgets


def _by_width(rows: Sequence[Row], key: str) -> dict[int, dict[float, float]]:
    """Means over the seeds: width, learning rate, loss, as the variants' overrides name them."""
    losses: dict[tuple[int, float], list[float]] = defaultdict(list)
    for row in rows:
        given = dict(override.split("=", 1) for override in row["model"])
        losses[int(given["model.width"]), float(given["train.lr"])].append(row[key])
    widths: dict[int, dict[float, float]] = defaultdict(dict)
    for (width, lr), same in losses.items():
        widths[width][lr] = statistics.fmean(same)
    return widths


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [p.tflops for p in points], [p.loss for p in points]
