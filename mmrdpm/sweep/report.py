"""Tables and plots of what a sweep has measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmrdpm.errors import DataError
from mmrdpm.sweep.records import Records
from mmrdpm.sweep.spec import Sweep

Row = dict[str, Any]

# key in results.jsonl, title, how one value is written
COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("top10", "named in top 10", "{:.1%}".format),
    ("top1", "top 1", "{:.1%}".format),
    ("kid", "KID (EfficientNet-Lite0) x1000", lambda v: f"{v * 1000:.1f}"),
    ("captioned", "caption exact", "{:.1%}".format),
    ("loss_image", "image nats/code", "{:.3f}".format),
    ("loss_text", "text nats/token", "{:.3f}".format),
    ("information", "nats/picture", "{:.0f}".format),
    ("independence", "lost by independence, nats/picture", "{:.0f}".format),
    ("steps", "updates", "{:.0f}".format),
    ("seconds", "seconds", "{:.0f}".format),
]


def report(sweep: Sweep, out: Path) -> Path:
    """Writes table and plots of the sweep's variants, as far as they are there.

    Gives the path of the table, `OUT/NAME.md`.

    Raises:
        DataError: the package that draws is not installed.
    """
    names = [variant.name for variant in sweep.variants]
    rows = [r for r in Records(out / "results.jsonl").all() if r["variant"] in names]
    tokenizers = [r for r in Records(out / "tokenizers.jsonl").all() if r["name"] in names]
    parts = [t for t in (results_table(names, rows), tokenizers_table(tokenizers)) if t]
    table = out / f"{sweep.name}.md"
    table.write_text("\n".join(parts), encoding="utf-8")
    if rows:
        plot_quality(names, rows, out / f"{sweep.name}-quality.svg")
        plot_steps(names, rows, out / f"{sweep.name}-steps.svg")
    if tokenizers:
        plot_tokenizers(tokenizers, out / f"{sweep.name}-tokenizers.svg")
    return table


def results_table(names: Sequence[str], rows: Sequence[Row]) -> str:
    """One line per variant in the sweep's order, mean ± standard deviation over the seeds."""
    shown = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    lines = []
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        if own:
            cells = [_spread([r.get(key) for r in own], write) for key, _, write in shown]
            lines.append([name, str(len(own)), *cells])
    return _table(["variant", "seeds", *(title for _, title, _ in shown)], lines)


def tokenizers_table(tokenizers: Iterable[Row]) -> str:
    """One line per tokeniser; steps are in the order of drawing."""
    titles = ["tokeniser", "PSNR cost, dB", "PSNR, dB", "SSIM", "latent error"]
    titles += ["codebook use, first / mean / last step"]
    lines = []
    for t in tokenizers:
        use = (t["usage"][0], statistics.fmean(t["usage"]), t["usage"][-1])
        figures = [f"{t['psnr_cost']:.2f}", f"{t['psnr']:.2f}", f"{t['ssim']:.4f}"]
        figures.append(f"{t['latent_error'][-1]:.4f}")
        lines.append([t["name"], *figures, " / ".join(f"{u:.0%}" for u in use)])
    return _table(titles, lines)


def _spread(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = write(statistics.fmean(known))
    return f"{mean} ± {write(statistics.stdev(known))}" if len(known) > 1 else mean


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    rule = ["---", *("---:" for _ in titles[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, rule, *lines))


def plot_quality(names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Named in the top 10 against the information in the codes and what independence loses."""
    figure, axes = _figure(2)
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
    figure.savefig(path)


def plot_steps(names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """Per step, in the order of drawing: information, and what independence loses."""
    figure, axes = _figure(2)
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
    figure.savefig(path)


def plot_tokenizers(tokenizers: Sequence[Row], path: Path) -> None:
    """Latent error and codebook use per step, in the order of drawing."""
    figure, axes = _figure(2)
    for axis, key, label in zip(
        axes, ("latent_error", "usage"), ("latent error", "codebook use"), strict=True
    ):
        for t in tokenizers:
            share = [(i + 1) / len(t[key]) for i in range(len(t[key]))]
            axis.plot(share, t[key], ".-", label=t["name"])
        axis.set(xlabel="share of the steps drawn", ylabel=label)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=6)
    figure.savefig(path)


def _figure(columns: int) -> tuple[Any, Any]:
    """A figure that needs no display; the same data give the same SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError(
            f"plots need the package {error.name}: pip install 'mmrdpm[eval]'"
        ) from None
    matplotlib.rcParams["svg.hashsalt"] = "mmrdpm"
    figure = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes:
        axis.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
    return figure, axes
