"""Speed, side by side in one run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mmrdpm import api, recipe
from mmrdpm.bench import attention, sample, train
from mmrdpm.bench.measure import write_json
from mmrdpm.cli import peers
from mmrdpm.cli.common import (
    Commands,
    command,
    count,
    group,
    model_option,
    recipe_file,
    recipe_options,
)
from mmrdpm.errors import UsageError
from mmrdpm.model_recipe import ModelRecipe


def add(commands: Commands) -> None:
    """Registers `bench ...`."""
    of = group(commands, "bench", "Speed, side by side in one run.")
    p = command(of, bench_train_command, "train")
    recipe_options(p)
    _measuring(p)
    p = command(of, bench_sample_command, "sample")
    model_option(p)
    p.add_argument("--threads", type=count, default=2, help="of the CPU")
    _measuring(p)
    p = command(of, bench_attention_command, "attention")
    p.add_argument("--threads", type=count, default=2, help="of the CPU")
    _measuring(p)
    peers.add(of)


def bench_train_command(options: argparse.Namespace) -> None:
    """Training speed beside the machine's own matrix product."""
    loaded = recipe.load(ModelRecipe, recipe_file(options.recipe, ("model",)), options.overrides)
    _show(train, partial(train.bench_train, loaded, options.rounds), options)


def bench_sample_command(options: argparse.Namespace) -> None:
    """Speed of drawing and writing beside the machine's own limits, and how it grows."""
    model = api.load(options.model)
    _show(sample, partial(sample.bench_sample, model, options.threads, options.rounds), options)


def bench_attention_command(options: argparse.Namespace) -> None:
    """The attention backends side by side over row lengths and packings."""
    _show(attention, partial(attention.bench_attention, options.threads, options.rounds), options)


def _measuring(to: argparse.ArgumentParser) -> None:
    to.add_argument("--rounds", type=count, default=5, help="repeats; medians are shown")
    to.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    to.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw them")


def _show(
    bench: ModuleType, measure: Callable[[], dict[str, Any]], options: argparse.Namespace
) -> None:
    if options.plot and options.plot.suffix.lower() != ".svg":
        raise UsageError(f"--plot {options.plot}: drawings are SVG: name a .svg file")
    paths = [path for path in (options.json, options.plot) if path]
    for path in paths:
        _probe(path)
    figures = measure()
    print(*bench.lines(figures), sep="\n")
    if options.json:
        write_json(options.json, figures)
    if options.plot:
        options.plot.write_text(bench.plot(figures), encoding="utf-8")
    for path in paths:
        print(f"written: {path}", file=sys.stderr)


def _probe(path: Path) -> None:
    """Makes the folder and fails, before minutes are spent, where the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.exists()
    path.open("a").close()
    if not known:
        path.unlink()
