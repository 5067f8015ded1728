"""Training speed as a share of what the same machine reaches in one large matrix product."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmrdpm import machine, pretrained
from mmrdpm.bench.measure import (
    Work,
    growth,
    growth_lines,
    machine_facts,
    matrix_product,
    ratio,
    timed,
)
from mmrdpm.bench.plot import chart, growth_charts, page
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import Trainer

_UPDATES = 5  # per round
GROWN = {"rows of a batch": ("data", "rows"), "layers": ("model", "layers")}
"""Section and key of the recipe by what grows; all sizes lie in memory at once."""


def bench_train(recipe: ModelRecipe, rounds: int) -> dict[str, Any]:
    """Alternates updates with matrix products.

    An update counts as 6 floating point operations per weight and token that it multiplies (2
    forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361, table 1), the weights of the
    unembedding for tokens with a target only, padding and attention scores not at all. Its time
    holds everything: data, tokenising, forward, backward, optimiser.
    """
    machine.prepare(recipe.train.threads)
    with tempfile.TemporaryDirectory() as folder:  # of what is skipped
        figures = _whole(recipe, rounds, Path(folder))
    try:
        return {**figures, "growth": _growth(recipe, rounds)}
    except torch.OutOfMemoryError:  # its sizes lie in memory together
        return {**figures, "growth": {}, "no_growth": "the GPU's memory was full"}


def _whole(recipe: ModelRecipe, rounds: int, folder: Path) -> dict[str, Any]:
    """All but growth; the trainer is gone afterwards, to leave room for those that grow."""
    trainer = Trainer(recipe, folder)
    clock = _Clock(trainer)
    trainer.update()  # the first one also plans kernels and fills the memory pool
    product, operations = matrix_product(trainer.dtype, trainer.device)
    product()
    measured: list[dict[str, float]] = []
    for _ in range(rounds):
        roof = operations / timed(product)
        clock.optimizer = 0.0
        trainer.figures()  # begins to count anew
        seconds = timed(lambda: [trainer.update() for _ in range(_UPDATES)])
        tokens, operations_done = trainer.meter.done()
        measured.append(
            {
                "matrix_flops_per_second": roof,
                "flops_per_second": operations_done / seconds,
                "tokens_per_second": tokens / seconds,
                "seconds_per_update": seconds / _UPDATES,
                "optimizer_share": clock.optimizer / seconds,
            }
        )
    columns = {key: [row[key] for row in measured] for key in measured[0]}
    about = {
        "machine": machine_facts(trainer.dtype, trainer.device),
        "run": trainer.describe(),
        "peak_bytes": _peak_bytes(trainer.device),
    }
    return {
        **about,
        **{key: statistics.median(column) for key, column in columns.items()},
        "share": ratio(columns["flops_per_second"], columns["matrix_flops_per_second"]),
        "all_rounds": columns,
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures to read."""
    facts, rounds = figures["machine"], len(figures["all_rounds"]["tokens_per_second"])
    why = figures.get("no_growth")
    return [
        f"{facts['device']}, torch {facts['torch']}; {figures['run']}",
        f"tokens per second      {figures['tokens_per_second']:,.0f} (padding left out)",
        f"an update              {figures['seconds_per_update']:.3g} s",
        f"training               {figures['flops_per_second'] / 1e9:,.0f} GFLOP/s",
        f"matrix product         {figures['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        f" ({facts['dtype']})",
        f"share                  {figures['share']:.1%} (medians of {rounds} rounds,"
        f" {facts['threads']} threads)",
        f"optimiser              {figures['optimizer_share']:.1%} of the time",
        f"peak memory            {figures['peak_bytes'] / 2**20:,.0f} MiB",
        *growth_lines(figures["growth"]),
        *([f"growth                 not measured: {why}"] if why else []),
    ]


def plot(figures: dict[str, Any]) -> str:
    """Training and the matrix product in every round, and growth, as SVG."""
    columns = figures["all_rounds"]
    series = {
        name: [(i + 1, value) for i, value in enumerate(columns[key])]
        for name, key in (
            ("matrix product", "matrix_flops_per_second"),
            ("training", "flops_per_second"),
        )
    }
    rates = chart("operations per second", "round", "FLOP/s", series)
    return page([rates, *growth_charts(figures["growth"])])


def _growth(recipe: ModelRecipe, rounds: int) -> dict[str, Any]:
    """An update's seconds and bytes as one number of the recipe grows; see `measure.growth`.

    Uncompiled and with attention by sdpa, as what compiled layers and flex hold could not be
    followed, and with new weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = pretrained.complete(recipe, Path(folder))
    plain = replace(
        whole,
        model=replace(whole.model, init_from=""),
        train=replace(whole.train, compile=False, attention="sdpa"),
    )
    grown = {}
    for name, (section, key) in GROWN.items():
        part = getattr(plain, section)
        most = getattr(part, key)
        sizes = sorted({max(1, most // 4), max(1, most // 2), most})
        if len(sizes) > 1:
            altered = [replace(plain, **{section: replace(part, **{key: n})}) for n in sizes]
            with tempfile.TemporaryDirectory() as folder:  # of what is skipped
                works: dict[float, Work] = {
                    n: Trainer(one, Path(folder)).update
                    for n, one in zip(sizes, altered, strict=True)
                }
                grown[name] = growth(works, rounds)
    return grown


class _Clock:
    """Adds up the seconds of the trainer's optimiser."""

    def __init__(self, trainer: Trainer) -> None:
        self.optimizer = 0.0
        step = trainer.optimizers.step

        def timed_step(lr: float) -> None:
            self.optimizer += timed(lambda: step(lr))

        trainer.optimizers.step = timed_step  # type: ignore[method-assign]


def _peak_bytes(device: torch.device) -> int:
    """The most memory so far: the device's on a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
