"""What commands share: how they are registered, and their common options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmrdpm import api, recipe, shipped
from mmrdpm.errors import MmrdpmError, RecipeError, printable

Commands = Any
"""What `ArgumentParser.add_subparsers` gives."""

_COMMANDS = {  # for recipes of each kind
    "model": "train",
    "image": "tokenizer train",
    "text": "tokenizer train",
    "sweep": "sweep",
    "peers": "bench peers",
}
INTERRUPTED = 130  # the shell's code for Ctrl-C
_FULL = "DefaultCPUAllocator"  # that torch's RuntimeError names where main memory is full
_LESS = (
    "lower train.micro_batch_size or set train.recompute=true (mmrdpm plan looks ahead), or draw"
    " and measure less at once"
)


def status_of(work: Callable[[], int | None]) -> int:
    """Does the work of a program; gives the exit status, a user's mistake is one line on stderr."""
    try:
        return work() or 0
    except MmrdpmError as error:
        print(f"mmrdpm: error: {printable(str(error))}", file=sys.stderr)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        said = printable(f"{place}{error.strerror or error}")
        print(f"mmrdpm: error: {said}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"mmrdpm: error: {full_gpu(error)}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _FULL in str(error)):
            raise
        why = str(error).partition(f"{_FULL}: ")[2] or str(error) or "no more is to be had"
        print(
            f"mmrdpm: error: main memory is full ({why.splitlines()[0][:160]}): lower the sizes or"
            " numbers that the command was given, such as model.width (mmrdpm plan looks ahead)",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        return INTERRUPTED
    return 1


def full_gpu(error: torch.OutOfMemoryError, advice: str = _LESS) -> str:
    """What to say where the memory of a GPU is full.

    Args:
        advice: how to need less; by default, for what is done with a model.
    """
    return f"the GPU's memory is full ({str(error).splitlines()[0][:160]}): {advice}"


def command(of: Commands, function: Callable[..., Any], name: str) -> argparse.ArgumentParser:
    """Registers a function as a command; its docstring is the help."""
    added = of.add_parser(name, help=function.__doc__, description=function.__doc__)
    added.set_defaults(command=function)
    return added


def group(of: Commands, name: str, text: str) -> Commands:
    """Registers a group of commands."""
    return of.add_parser(name, help=text).add_subparsers(required=True, metavar="COMMAND")


def model_option(to: argparse.ArgumentParser) -> None:
    """`--model`."""
    to.add_argument("--model", default=api.DEFAULT_MODEL, help="name or folder of a model")


def recipe_options(to: argparse.ArgumentParser) -> None:
    """A recipe and overrides."""
    to.add_argument("recipe", metavar="RECIPE", help="file, or name of a shipped recipe")
    to.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.lr=1e-3")


def run_options(to: argparse.ArgumentParser) -> None:
    """A recipe, the folder of its run and whether to go on with it."""
    recipe_options(to)
    to.add_argument("--run", type=Path, metavar="DIR", help="default: runs/RECIPE's name")
    to.add_argument("--resume", action="store_true", help="go on where the run stopped")


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and overrides of a recipe's keys, of words that came mixed."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]


def recipe_file(name: str, kinds: tuple[str, ...], instead: str = "") -> Path:
    """The file of a recipe, which must be of one of the kinds.

    Args:
        instead: what to do with one of another kind; by default, the command for it.
    """
    try:
        path = shipped.resolve("recipes", name)
    except MmrdpmError as error:
        raise RecipeError(str(error)) from None
    kind = recipe.read(path).get("kind")
    if kind not in kinds:
        wanted = " or ".join(map(repr, kinds))
        mend = f"its key kind must be {wanted}"
        if command := _COMMANDS.get(str(kind)):
            mend = instead or f"use mmrdpm {command}"
        raise RecipeError(f"{path}: kind is {kind!r}, not {wanted}: {mend}")
    return path


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: it must be at least 1")
    return value
