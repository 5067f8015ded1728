"""Runs ablations."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from mmrdpm.cli.common import INTERRUPTED, Commands, command, recipe_file
from mmrdpm.sweep import spec
from mmrdpm.sweep.measure import Measurer
from mmrdpm.sweep.records import Records
from mmrdpm.sweep.report import check_judge, report
from mmrdpm.sweep.run import chosen_of, run_sweep


def add(commands: Commands) -> None:
    """Registers `sweep`."""
    p = command(commands, sweep_command, "sweep")
    p.add_argument("file", metavar="FILE", help="file, or name of a shipped sweep")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="as in seeds=[1,2]")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/FILE's name")
    part = p.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="NAME", help="do one variant alone")
    told = "train nothing: write table and plots of what is measured in DIR"
    part.add_argument("--table", action="store_true", help=told)


def sweep_command(options: argparse.Namespace) -> int:
    """Trains and measures a list of variants; the same command goes on where it stopped."""
    path = recipe_file(options.file, ("sweep",))
    sweep = spec.load(path, options.overrides)
    chosen_of(sweep, options.only)
    out = options.out or Path("runs") / path.stem
    if options.table:
        return _show(report(sweep, out))
    say = partial(print, file=sys.stderr)
    measurer, table = Measurer(), None
    if sweep.model_recipe:  # before hours are spent
        lines = out / "results.jsonl"
        check_judge(measurer.protocol, Records(lines).all(), lines)
    with suppress(KeyboardInterrupt):  # what is finished is kept, as where a run was stopped
        table = run_sweep(sweep, out, measurer, say, options.only)
    if table is None:
        print("stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return _show(table)


def _show(table: Path) -> int:
    print(table.read_text(encoding="utf-8"))
    print(table)
    return 0
