"""Measures models, and sets the figures of two side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmrdpm import api, machine, shipped
from mmrdpm.cli.common import INTERRUPTED, Commands, command, count
from mmrdpm.errors import UsageError
from mmrdpm.evaluation import results, run, suite
from mmrdpm.evaluation.compare import compare
from mmrdpm.evaluation.figure import Figure
from mmrdpm.evaluation.store import REPORT_FILE

_COMPARE = "compare"


def add(commands: Commands) -> None:
    """Registers `eval`, and `eval compare A B`, whose first word no model can have as its name."""
    p = command(commands, eval_command, "eval")
    p.usage = (
        "mmrdpm eval [RUN|MODEL] [--suite FILE|NAME] [--out DIR] [--threads N] [key=value ...]\n"
        "       mmrdpm eval compare A B"
    )
    p.add_argument(
        "model",
        nargs="?",
        default=api.DEFAULT_MODEL,
        metavar="RUN|MODEL",
        help=f"folder of a run, or name of a shipped model; default: {api.DEFAULT_MODEL}",
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the suite")
    p.add_argument("--suite", default="emoji", help="file, or name of a shipped suite")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/eval/SUITE")
    p.add_argument("--threads", type=count, default=2, help="of the CPU; default: 2")


def eval_command(options: argparse.Namespace) -> int:
    """Measures a model by a suite, or compares two results: mmrdpm eval compare A B."""
    if options.model == _COMPARE:
        return _compare(options.overrides)
    if "=" in options.model:  # mmrdpm eval names=20: no model, so the default one
        options.overrides.insert(0, options.model)
        options.model = api.DEFAULT_MODEL
    loaded = suite.load(options.suite, options.overrides)
    name = shipped.resolve("eval", options.suite).stem
    machine.prepare(options.threads)
    try:
        found, out = run.evaluate(options.model, loaded, name, options.out)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    for line in summary(found):
        print(line)
    print(out / REPORT_FILE)
    return 0


def summary(found: results.Results) -> list[str]:
    """Every figure a line, by part and group; a curve takes one; then what was not computed."""
    blocks: dict[str, list[str]] = {}
    for figure in found.figures:
        part, group, name = figure.name.split("/", 2)
        curve, _, _ = name.partition(" at ")
        lines = blocks.setdefault(f"{part}, {group}", [])
        if curve == name:
            note = f"  ({figure.note})" if figure.note else ""
            lines.append(f"  {name:44} {figure}{note}")
        elif lines and lines[-1].startswith(f"  {curve} at "):
            lines[-1] += f"  {_point(figure)}"
        else:
            lines.append(f"  {name.rsplit(' ', 1)[0]:44} {_point(figure)}")
    listed = [line for heading, lines in blocks.items() for line in (heading, *lines)]
    return listed + [f"not computed: {item.part}: {item.why}" for item in found.not_computed]


def _point(figure: Figure) -> str:
    value = f"{figure.value:.1%}" if figure.unit == "share" else f"{figure.value:.3g}"
    return f"{figure.name.rsplit(' ', 1)[1]}: {value}"


def _compare(places: list[str]) -> int:
    if len(places) != 2:
        raise UsageError(f"eval compare takes two results, not {len(places)}: folders or files")
    for line in compare(*(results.load(Path(place)) for place in places)):
        print(line)
    return 0
