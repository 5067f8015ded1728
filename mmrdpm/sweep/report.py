"""Tables and plots of what a sweep has measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmrdpm.errors import CheckpointError, UsageError
from mmrdpm.evaluation.compare import differences
from mmrdpm.sweep import plots, scaling
from mmrdpm.sweep.records import Records
from mmrdpm.sweep.spec import Chart, Sweep

Row = dict[str, Any]

COLUMNS: list[plots.Column] = [
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
_MAIN = ("top10", "kid", "captioned", "loss_image", "loss_text")  # drawn with their spread


def report(sweep: Sweep, out: Path) -> Path:
    """Writes table and plots of the sweep's variants and seeds, as far as they are there.

    Gives the path of the table, `OUT/NAME.md`.

    Raises:
        DataError: the package that draws is not installed.
        CheckpointError: two lines were judged by different evaluators or galleries.
        UsageError: there are no lines of it.
    """
    names = sweep.names
    lines = Records(out / "results.jsonl").all()  # of other sweeps and their seeds too
    rows = [r for r in lines if r["variant"] in names and r["seed"] in sweep.seeds]
    first: Row = next((row["judge"] for row in rows if "judge" in row), {})
    check_judge(first, rows, out / "results.jsonl")
    tokenizers = [r for r in Records(out / "tokenizers.jsonl").all() if r["name"] in names]
    if not rows and not tokenizers:
        raise UsageError(f"{out}: holds no lines of {sweep.name}: name a folder that does by --out")
    parts = [results_table(names, rows), tokenizers_table(tokenizers)]
    if rows:
        parts.append(CHARTS[sweep.chart](sweep, rows, out / sweep.name))
    if tokenizers:
        plots.plot_tokenizers(tokenizers, out / f"{sweep.name}-tokenizers.svg")
    table = out / f"{sweep.name}.md"
    table.write_text("\n".join(filter(None, parts)), encoding="utf-8")
    return table


def check_judge(judge: Row, rows: Sequence[Row], path: Path) -> None:
    """Refuses lines that were judged otherwise; older ones do not say how they were.

    Raises:
        CheckpointError: there is such a line.
    """
    for row in rows:
        if keys := differences(judge, row.get("judge", judge)):
            raise CheckpointError(
                f"{path}: the line of {row['variant']}, seed {row['seed']} was judged otherwise,"
                f" not comparable: {'; '.join(keys)}: name another folder with --out, or remove it"
                " to measure it anew"
            )


def _quality(sweep: Sweep, rows: Sequence[Row], stem: Path) -> str:
    names = sweep.names
    variants, quality, steps = (
        stem.with_name(f"{stem.name}-{plot}.svg") for plot in ("variants", "quality", "steps")
    )
    for earlier in (variants, quality, steps):
        earlier.unlink(missing_ok=True)  # one that is left out now would belong to other lines
    columns = [c for c in COLUMNS if c[0] in _MAIN and plots.differs(names, rows, c[0])]
    if columns:
        plots.plot_variants(names, sweep.base, rows, columns, variants)
    if plots.differs(names, rows, "information"):  # not where all draw by the same weights
        plots.plot_quality(names, rows, quality)
        plots.plot_steps(names, rows, steps)
    return ""


def _compute(sweep: Sweep, rows: Sequence[Row], stem: Path) -> str:
    return scaling.compute(rows, stem.with_name(f"{stem.name}-compute.svg"))


def _rates(sweep: Sweep, rows: Sequence[Row], stem: Path) -> str:
    return scaling.learning_rates(rows, stem.with_name(f"{stem.name}-lr.svg"))


CHARTS: dict[Chart, Callable[[Sweep, Sequence[Row], Path], str]] = {
    "quality": _quality,
    "compute": _compute,
    "lr": _rates,
}


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
