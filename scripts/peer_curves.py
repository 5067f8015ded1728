"""Draws several results of `mmrdpm bench peers` into one plot, by their files' names.

    python scripts/peer_curves.py flops peers.svg docs/measured/peers/{flow,raster}.json

A way of drawing is called as its file, with its number of steps where it has several. Times are of
the file `timing*.json` beside the results that names them in `of`; what none names is left out of
plots over time, and printed. The plot over `sampling` shows the last weights at the best of all
that they were judged at, `held-out.jsonl` beside the results included; curves keep to the results'
own judging.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrdpm.bench.peers import report
from mmrdpm.cli.common import status_of


def main(over: str, out: Path, files: Sequence[Path]) -> None:
    ways: list[report.Way] = []
    for path in files:
        result = report.with_timing(_read(path), _timing(path))
        if not isinstance(result.get("curve"), list):
            sys.exit(f"{path}: it was stopped on the way: there is no curve in it")
        numbers = sorted({drawn["steps"] for drawn in result["curve"][-1]["drawn"]})
        if over == "sampling":
            result["curve"][-1]["drawn"] += _judged_later(path)
        for steps in numbers:
            title = path.stem + (f", {steps} steps" if len(numbers) > 1 else "")
            if over == "flops" or report.is_timed(result, steps):
                ways.append((title, result, steps))
            else:
                print(f"{title}: not timed, left out")
    if not ways:
        sys.exit("nothing to draw: none of these is named in `of` of a timing*.json beside it")
    report.PLOTS[over](out, ways)


def _timing(results: Path) -> dict[str, Any]:
    kept = map(_read, sorted(results.parent.glob("timing*.json")))
    return next((timing for timing in kept if results.stem in timing.get("of", ())), {})


def _judged_later(results: Path) -> list[dict[str, Any]]:
    path = results.parent / "held-out.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = map(json.loads, text.splitlines())
    return [line for line in lines if line["peer"] == results.stem and line["split"] == "train"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("over", choices=report.PLOTS)
    parser.add_argument("out", type=Path, metavar="FILE.svg")
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULTS.json")
    options = parser.parse_args()
    sys.exit(status_of(lambda: main(options.over, options.out, options.files)))
