"""Speed, side by side in one run."""

from __future__ import annotations

import argparse

from mmrdpm import recipe
from mmrdpm.bench.train import bench_train
from mmrdpm.cli import peers
from mmrdpm.cli.common import Commands, command, count, group, recipe_file, recipe_options
from mmrdpm.train_model import ModelRecipe


def add(commands: Commands) -> None:
    """Registers `bench ...`."""
    of = group(commands, "bench", "Speed, side by side in one run.")
    p = command(of, bench_train_command, "train")
    recipe_options(p)
    p.add_argument("--rounds", type=count, default=5)
    peers.add(of)


def bench_train_command(options: argparse.Namespace) -> None:
    """Training speed beside the machine's own matrix product."""
    loaded = recipe.load(ModelRecipe, recipe_file(options.recipe, ("model",)), options.overrides)
    for line in bench_train(loaded, options.rounds):
        print(line)
