"""Measures models."""

from __future__ import annotations

import argparse
import sys

from mmrdpm import api, evaluate, machine, recipe, shipped
from mmrdpm.cli.common import Commands, command, count


def add(commands: Commands) -> None:
    """Registers `eval`."""
    p = command(commands, eval_command, "eval")
    p.add_argument("model", nargs="?", default=api.DEFAULT_MODEL, metavar="MODEL")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the suite")
    p.add_argument("--suite", default="emoji", help="file, or name of a shipped suite")
    p.add_argument("--threads", type=count, default=2)


def eval_command(options: argparse.Namespace) -> None:
    """Measures a model by a suite."""
    suite = recipe.load(evaluate.Suite, shipped.resolve("eval", options.suite), options.overrides)
    machine.prepare(options.threads)
    report = evaluate.evaluate(
        api.load(options.model), suite, lambda line: print(line, file=sys.stderr)
    )
    for group, figures in report.items():
        print(f"{group}")
        print(f"  drawn: named emoji in the 10 nearest   {figures.drawn}")
        print(f"    the real pictures at this size       {figures.real}")
        print(f"    the same through the codes           {figures.coded}")
        if figures.tone:
            print(f"  drawn with the named skin tone         {figures.tone}")
        print(f"  caption is the name                    {figures.captioned}")
        print(f"  caption begins with the concept        {figures.concept}")
