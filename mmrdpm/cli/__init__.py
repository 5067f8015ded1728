"""The command line: every command is one function; a user's mistake is one line on stderr."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmrdpm.cli import benchmarks, data, evaluating, scale, sweeping, training, use
from mmrdpm.cli.common import INTERRUPTED, command
from mmrdpm.errors import MmrdpmError
from mmrdpm.quickstart import quickstart

_MOST_THREADS = 1024  # as of the recipes' train.threads
_FULL = "DefaultCPUAllocator"  # that torch's RuntimeError names where main memory is full


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit status."""
    for stream in (sys.stdout, sys.stderr):  # what it cannot write must not end the work
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    wrong = [o for o in overrides if o.startswith("-") or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if getattr(options, "threads", 1) > _MOST_THREADS:
        parser.error(f"--threads {options.threads}: it must be at most {_MOST_THREADS}")
    if overrides:  # argparse does not take positional arguments after options
        options.overrides = [*options.overrides, *overrides]
    try:
        return options.command(options) or 0
    except MmrdpmError as error:
        print(f"mmrdpm: error: {error}", file=sys.stderr)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"mmrdpm: error: {place}{error.strerror or error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(
            f"mmrdpm: error: the GPU's memory is full ({str(error).splitlines()[0][:160]}): lower"
            " train.micro_batch_size or set train.recompute=true (mmrdpm plan looks ahead), or draw"
            " and measure less at once",
            file=sys.stderr,
        )
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


def quickstart_command(options: argparse.Namespace) -> None:
    """Draws, captions, completes and trains a little, and makes a page of it."""
    print(quickstart(options.out, lambda line: print(line, file=sys.stderr)))


def _version() -> str:
    try:
        return version("mmrdpm")
    except PackageNotFoundError:
        return "of a source folder that is not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmrdpm", description="One transformer that draws, captions and writes."
    )
    parser.add_argument("--version", action="version", version=f"mmrdpm {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (use, data, training, evaluating, scale, benchmarks, sweeping):
        part.add(commands)
    p = command(commands, quickstart_command, "quickstart")
    p.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    return parser
