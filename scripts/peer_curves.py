"""Draws the curves of several results of `mmrdpm bench peers` into one plot, by their files' names.

    python scripts/peer_curves.py docs/pictures/peers.svg docs/measured/peers/{flow,raster}.json

A way of drawing is called as its file, with its number of steps where it has several.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmrdpm.bench.peers.report import curve, plot


def main(out: Path, files: list[Path]) -> None:
    lines = {}
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        numbers = sorted({drawn["steps"] for drawn in result["curve"][-1]["drawn"]})
        for steps in numbers:
            name = path.stem + (f", {steps} steps" if len(numbers) > 1 else "")
            lines[name] = curve(result, steps)
    plot(out, lines, "training FLOPs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FILE.svg")
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULTS.json")
    options = parser.parse_args()
    main(options.out, options.files)
