"""Other ways to draw, on equal terms."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmrdpm import recipe
from mmrdpm.bench.peers.protocol import PeerBench
from mmrdpm.bench.peers.run import bench
from mmrdpm.cli.common import INTERRUPTED, Commands, apart, command, recipe_file

_DEFAULT = "peers/emoji"


def add(to: Commands) -> None:
    """Registers `bench peers`."""
    p = command(to, bench_peers_command, "peers")
    p.add_argument("recipe", nargs="?", default=_DEFAULT, metavar="RECIPE")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="as in budget.flops=1e12")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="peers to run")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/peers-RECIPE's name")


def bench_peers_command(options: argparse.Namespace) -> int:
    """Trains other ways to draw on the same budget, and compares; goes on where it stopped."""
    name = options.recipe
    if "=" in name:  # the recipe was left out
        name, options.overrides = _DEFAULT, [name, *options.overrides]
    only, more = apart(options.only)
    overrides = [*options.overrides, *more]
    path = recipe_file(name, ("peers",))
    out = options.out or Path("runs") / f"peers-{path.stem}"
    loaded = recipe.load(PeerBench, path, overrides)
    if bench(loaded, out, only, lambda line: print(line, file=sys.stderr)):
        print((out / "table.md").read_text(encoding="utf-8"), end="")
        print(out)
        return 0
    print("stopped; the same command goes on", file=sys.stderr)
    return INTERRUPTED
