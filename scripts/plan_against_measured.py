"""What `mmrdpm plan --kind cpu` says beside what training takes, for shapes not fitted to it.

    python scripts/plan_against_measured.py [ROUNDS] [key=value ...] > plan.jsonl

Prints a JSON object a shape: seconds of an update and bytes of the peak, planned and measured, the
medians of the rounds. A round takes all shapes in turns, each in processes of its own: one plans,
then one trains as `mmrdpm train` does. Overrides hold for all, as `train.threads=1`. Progress goes
to stderr.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmrdpm import recipe
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.plan import make_plan
from mmrdpm.train_model import Trainer

SHAPES = {  # the first is what the time was fitted to
    "emoji_cpu": ("recipes/emoji_cpu.yaml",),
    "emoji_quick": ("recipes/emoji_quick.yaml",),
    "4 layers of 256, 48 rows": (
        *("recipes/emoji_cpu.yaml", "model.layers=4", "model.kv_heads=2", "model.ffn=512"),
        "data.rows=48",
    ),
    "8 layers of 384": (
        *("recipes/emoji_cpu.yaml", "model.layers=8", "model.width=384", "model.heads=6"),
        *("model.kv_heads=6", "model.ffn=1024"),
    ),
    "12 layers of 128, rows of 512": (
        *("recipes/emoji_cpu.yaml", "model.layers=12", "model.width=128", "model.heads=2"),
        *("model.kv_heads=2", "model.ffn=352", "data.seq_len=512"),
    ),
    "2 layers of 768": (
        *("recipes/emoji_cpu.yaml", "model.layers=2", "model.width=768", "model.heads=12"),
        *("model.kv_heads=12", "model.ffn=2048", "data.rows=8"),
    ),
}
ROUNDS, UPDATES = 3, 4


def planned(path: str, overrides: Sequence[str]) -> tuple[float, float]:
    """Seconds of an update and bytes of the peak."""
    plan = make_plan(recipe.load(ModelRecipe, path, overrides), 1, "cpu")
    return plan.seconds, plan.peak


def trained(path: str, overrides: Sequence[str]) -> tuple[float, float]:
    """The same of real updates; the median of several, after one that plans kernels."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe.load(ModelRecipe, path, overrides), Path(folder))
    seconds = []
    for _ in range(UPDATES + 1):
        begun = time.perf_counter()
        trainer.update()
        seconds.append(time.perf_counter() - begun)
    status = Path("/proc/self/status").read_text()  # resource's peak would be the parent's too
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert peak, "it needs Linux"
    return statistics.median(seconds[1:]), 1024.0 * int(peak[1])


def apart(work: Callable, *arguments: Any) -> tuple[float, float]:
    """In a process of its own, whose memory is that of this work alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main(arguments: Sequence[str]) -> None:
    rounds = next((int(a) for a in arguments if a.isdigit()), ROUNDS)
    overrides = [a for a in arguments if "=" in a]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in SHAPES}
    for number in range(1, rounds + 1):
        for name, (path, *shape) in SHAPES.items():
            print(f"round {number} of {rounds}: {name}", file=sys.stderr)
            both = (apart(work, path, [*shape, *overrides]) for work in (planned, trained))
            found[name].append(tuple(figure for pair in both for figure in pair))
    keys = ("seconds_planned", "bytes_planned", "seconds_measured", "bytes_measured")
    for name, rows in found.items():
        columns = dict(zip(keys, zip(*rows, strict=True), strict=True))
        medians = {key: statistics.median(column) for key, column in columns.items()}
        print(json.dumps({"shape": name, "recipe": SHAPES[name], **medians, "rounds": columns}))


if __name__ == "__main__":
    main(sys.argv[1:])
