"""One table and three plots of the peers' results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmrdpm.bench.peers.peers import TITLES
from mmrdpm.errors import DataError

_HEAD = (
    "way of drawing",
    "parameters",
    "tokens",
    "PSNR dB",
    "steps",
    "guidance",
    "T",
    "top 1",
    "top 10",
    "KID x 1000",
    "PFLOP",
    "updates",
    "pictures",
    "minutes",
    "of matrix rate",
    "s/picture",
    "MiB",
    "lr",
)


_STROKES = ("-", "--", ":")  # after ten lines colours begin anew

Curve = list[tuple[float, dict[str, Any]]]
"""Of points in training what lies across, and the figures of the best way of drawing there."""

Way = tuple[str, dict[str, Any], int]
"""A way of drawing: its title, the results of its peer and the number of steps."""


def check() -> None:
    """Raises DataError where the plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise DataError("plots need the package matplotlib: pip install 'mmrdpm[peers]'") from None


def write(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """`table.md`, and SVG plots of quality against FLOPs, time of training and of sampling."""
    (out / "table.md").write_text(table(results), encoding="utf-8")
    every = _ways(results)
    timed = [way for way in every if is_timed(*way[1:])]
    for name, draw in PLOTS.items():
        if ways := every if name == "flops" else timed:
            draw(out / f"quality-{name}.svg", ways)


def with_timing(result: dict[str, Any], timing: dict[str, Any]) -> dict[str, Any]:
    """Results of a peer with its entries of a `timing.json`, none where it is {}."""
    entries = {
        what: [entry for entry in timing.get(what, []) if entry["peer"] == result["peer"]]
        for what in ("sampling", "training")
    }
    return {**result, **entries, "timed_on": timing.get("machine")}


def is_timed(result: dict[str, Any], steps: int) -> bool:
    """Whether results with their timing have the time of that many steps of drawing."""
    return bool(_speeds(result, steps))


def over_flops(path: Path, ways: Sequence[Way]) -> None:
    """Draws the curves of quality over training FLOPs."""
    lines = {title: curve(result, steps) for title, result, steps in ways}
    plot(path, lines, "training FLOPs")


def over_seconds(path: Path, ways: Sequence[Way]) -> None:
    """Draws the curves of quality over the time of the updates, of ways that are timed."""
    lines = {
        title: curve(result, steps, "step", _update_seconds(result))
        for title, result, steps in ways
    }
    plot(path, lines, "seconds of training")


def over_sampling(path: Path, ways: Sequence[Way]) -> None:
    """Draws the last quality over the time of drawing a picture, of ways that are timed."""
    dots = {
        title: [(max(_speeds(result, steps))[1], best(result["curve"][-1], steps))]
        for title, result, steps in ways
    }
    batch = max(entry["batch"] for entry in ways[0][1]["sampling"])
    plot(path, dots, f"seconds per picture, {batch} at once", "log")


PLOTS = {"flops": over_flops, "seconds": over_seconds, "sampling": over_sampling}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per peer and number of steps; peers without results with the reason."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    ways = sorted(_ways(results), key=lambda way: -best(way[1]["curve"][-1], way[2])["top10"])
    lines += ["| " + " | ".join(_row(*way)) + " |" for way in ways]
    for result in results:
        if "not_runnable" in result:
            cells = [TITLES[result["peer"]], f"not run: {result['not_runnable']}"]
            lines.append("| " + " | ".join([*cells, *[""] * (len(_HEAD) - 2)]) + " |")
    if ways:
        _, result, steps = ways[0]
        note = (
            f"{result['concepts']} training concepts, features of EfficientNet-Lite0, 95% intervals"
            " over the pictures, of the guidance scales and temperatures T the best by top 10; KID"
            " is lowered by the pairs of one name (docs/evaluation.md); MiB beyond the weights"
            f" while training and judging; trained on {_machines(ways)}."
        )
        if result["timed_on"]:
            batches = ", ".join(str(batch) for batch, _ in _speeds(result, steps))
            note += (
                " Minutes (of the updates) and seconds per picture (at batch"
                f" {batches}) as measured in turns on {result['timed_on']}."
            )
        lines += ["", note]
    return "\n".join(lines) + "\n"


def _machines(ways: Sequence[Way]) -> str:
    """What the results were trained on; where that differs, with the peers of each."""
    peers: dict[str, list[str]] = {}
    for _, result, _ in ways:
        if result["peer"] not in (own := peers.setdefault(result["machine"], [])):
            own.append(result["peer"])
    if len(peers) == 1:
        return next(iter(peers))
    return "; ".join(f"{machine} ({', '.join(own)})" for machine, own in peers.items())


def best(point: dict[str, Any], steps: int) -> dict[str, Any]:
    """Of the ways of drawing at a point the one with the best top 10, then the lowest KID."""
    drawn = [entry for entry in point["drawn"] if entry["steps"] == steps]
    return max(drawn, key=lambda entry: (entry["top10"], -entry["kid"]))


def _ways(results: Sequence[dict[str, Any]]) -> list[Way]:
    """Every way of drawing that was measured."""
    return [
        (f"{TITLES[result['peer']]}, {steps} steps", result, steps)
        for result in results
        if "curve" in result
        for steps in sorted({e["steps"] for e in result["curve"][-1]["drawn"]}, reverse=True)
    ]


def curve(result: dict[str, Any], steps: int, key: str = "flops", factor: float = 1.0) -> Curve:
    """How the quality of `steps` steps of drawing grew over `factor` times a key of the points."""
    return [(factor * point[key], best(point, steps)) for point in result["curve"]]


def _update_seconds(result: dict[str, Any]) -> float:
    return result["training"][0]["seconds_per_update"]


def _share(result: dict[str, Any]) -> str:
    """Of the rate of a matrix product, in training; earlier timings do not say."""
    shares = [entry["matrix_share"] for entry in result["training"] if "matrix_share" in entry]
    return f"{shares[0]:.0%}" if shares else ""


def _speeds(result: dict[str, Any], steps: int) -> list[tuple[int, float]]:
    """Batch and seconds per picture."""
    entries = [entry for entry in result["sampling"] if entry["steps"] == steps]
    return [(entry["batch"], entry["seconds_per_picture"]) for entry in entries]


def _row(title: str, result: dict[str, Any], steps: int) -> list[str]:
    last = result["curve"][-1]
    figures, memory = best(last, steps), result["training_megabytes"]
    return [
        title,
        f"{result['parameters'] / 1e6:.2f}M",
        str(result["tokens_per_image"]),
        f"{result['psnr']:.2f}",
        str(steps),
        f"{figures['guidance_scale']:g}",
        "" if figures["temperature"] is None else f"{figures['temperature']:g}",
        _with_interval(figures, "top1", 100, "{:.0f}%".format),
        _with_interval(figures, "top10", 100, "{:.0f}%".format),
        _with_interval(figures, "kid", 1000, "{:.0f}".format),
        f"{last['flops'] / 1e15:.4g}",
        f"{result['updates']:,}",
        f"{result['updates'] * result['batch_size']:,}",
        f"{result['updates'] * _update_seconds(result) / 60:.1f}" if result["training"] else "",
        _share(result),
        " / ".join(f"{seconds:.3f}" for _, seconds in _speeds(result, steps)),
        "unknown" if memory is None else f"{memory:,.0f}",
        f"{result['lr']:g}",
    ]


def _with_interval(
    figures: dict[str, Any], key: str, factor: float, write: Callable[[float], str]
) -> str:
    value, low, high = (write(factor * v) for v in (figures[key], *figures["intervals"][key]))
    return f"{value} ({low} to {high})"


def plot(path: Path, lines: dict[str, Curve], label: str, scale: str = "linear") -> None:
    """Top 10 and KID side by side over `label`."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, name in zip(
        panels, ("top10", "kid"), ("named in the top 10", "KID"), strict=True
    ):
        for i, (title, points) in enumerate(lines.items()):
            across, up = [x for x, _ in points], [figures[key] for _, figures in points]
            panel.plot(across, up, "o" + _STROKES[i // 10 % len(_STROKES)], label=title)
        panel.set(xlabel=label, ylabel=name, xscale=scale)
        if scale == "log":  # within a decade plain numbers, as few as are readable
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # the same file for the same figures
        figure.savefig(path, metadata={"Date": None})
