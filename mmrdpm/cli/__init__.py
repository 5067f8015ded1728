"""The command line: every command is one function; a user's mistake is one line on stderr."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmrdpm.cli import benchmarks, data, evaluating, scale, sweeping, training, use
from mmrdpm.cli.common import command, status_of
from mmrdpm.quickstart import quickstart

_MOST_THREADS = 1024  # as of the recipes' train.threads


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
    return status_of(lambda: options.command(options))


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
