"""Training speed as a share of what the same machine reaches in one large matrix product."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from mmrdpm import machine
from mmrdpm.train_model import ModelRecipe, Trainer

T = TypeVar("T")

_SIDE = 2048  # of the square matrices
_UPDATES = 5  # per round


def bench_train(recipe: ModelRecipe, rounds: int) -> Iterator[str]:
    """Alternates updates with matrix products, and yields lines of medians over the rounds.

    An update counts as 6 floating point operations per weight and token that it multiplies (2
    forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361, table 1), the weights of the
    unembedding for tokens with a target only, padding and attention scores not at all. Its time
    holds everything: data, tokenising, forward, backward, optimiser.
    """
    machine.prepare(recipe.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, Path(folder))
        yield trainer.describe()
        trainer.update()  # the first one also plans kernels and fills the memory pool
        matrix_product = _matrix_product(trainer.dtype, trainer.device)
        matrix_product()
        rates, roofs, speeds = [], [], []
        for _ in range(rounds):
            roofs.append(2 * _SIDE**3 / _timed(matrix_product)[0])
            trainer.figures()  # begins to count anew
            seconds, _ = _timed(lambda: [trainer.update() for _ in range(_UPDATES)])
            tokens, targets = trainer.meter.seen()
            rates.append(6 * _multiplied(trainer, tokens, targets) / seconds)
            speeds.append(tokens / seconds)
    dtype = str(trainer.dtype).removeprefix("torch.")
    rate, roof = statistics.median(rates), statistics.median(roofs)
    share = statistics.median(r / m for r, m in zip(rates, roofs, strict=True))
    yield f"tokens per second      {statistics.median(speeds):,.0f} (padding left out)"
    yield f"training               {rate / 1e9:,.0f} GFLOP/s"
    yield f"matrix product         {roof / 1e9:,.0f} GFLOP/s ({dtype}, {_SIDE}^3)"
    threads = torch.get_num_threads()
    yield f"share                  {share:.1%} (medians of {rounds} rounds, {threads} threads)"


def _multiplied(trainer: Trainer, tokens: float, targets: float) -> float:
    """Weights times the tokens that pass through them."""
    return trainer.meter.stack * tokens + trainer.meter.table * targets


def _matrix_product(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    _finish()
    begun = time.perf_counter()
    result = work()
    _finish()
    return time.perf_counter() - begun, result


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
