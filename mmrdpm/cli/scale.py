"""Looks ahead: what a recipe will need, and what this machine can do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from mmrdpm import recipe
from mmrdpm.cli.common import Commands, command, count, recipe_file, recipe_options
from mmrdpm.doctor import examine
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.plan import Kind, lines, make_plan


def add(commands: Commands) -> None:
    """Registers `plan` and `doctor`."""
    p = command(commands, plan_command, "plan")
    recipe_options(p)
    p.add_argument("--gpus", type=count, default=1, metavar="N", help="or processes on the CPU")
    p.add_argument(
        "--kind", choices=get_args(Kind), default="h100", help="of machine; default: h100"
    )
    p = command(commands, doctor_command, "doctor")
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="file, or name of a shipped recipe")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.lr=1e-3")
    p.add_argument("--gpus", type=count, metavar="N", help="for a model; default: those here")
    where = "where the run would go; default: here"
    p.add_argument("--run", type=Path, default=Path("."), metavar="DIR", help=where)


def plan_command(options: argparse.Namespace) -> int:
    """Says what a recipe will need: memory, operations, hours; 1 if it does not fit."""
    instead = (
        "plans are made of models: name a model's recipe; with tokenizers.image=RECIPE.yaml it is"
        " planned on the image tokeniser of that recipe"
    )
    path = recipe_file(options.recipe, ("model",), instead)
    loaded = recipe.load(ModelRecipe, path, options.overrides)
    plan = make_plan(loaded, options.gpus, options.kind)
    for line in lines(plan):
        print(line)
    return 0 if plan.fits else 1


def doctor_command(options: argparse.Namespace) -> int:
    """Says what this machine can do, and whether a recipe can be trained on it."""
    kinds = ("model", "image", "text", "sweep", "peers")
    path = recipe_file(options.recipe, kinds) if options.recipe else None
    found = list(examine(path, options.overrides, options.gpus, options.run))
    for line in found:
        print(line)
    return int(any(line.trouble for line in found))
