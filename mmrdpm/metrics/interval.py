"""Confidence intervals of means and of distances between sets, by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 200
_Z = 1.959964  # of 95%

Interval = tuple[float, float]


def bootstrap(
    statistic: Callable[[np.ndarray], float], value: float, count: int, seed: int = 0
) -> Interval:
    """`value` plus and minus 1.96 standard errors, estimated from 200 resamples.

    Efron & Tibshirani 1993, chapter 6 (standard error) and eq. 12.3 (normal interval). The normal
    interval suits distances too: their resamples are shifted upwards, but spread alike.

    Args:
        statistic: of the records at these positions, which may repeat: int64 `[count]`; NaN where
            they tell nothing.
        value: the statistic of all records.
        count: number of records, at least 1.
    """
    random = np.random.default_rng(seed)
    resampled = [statistic(random.integers(count, size=count)) for _ in range(RESAMPLES)]
    half = _Z * float(np.nanstd(resampled))
    return value - half, value + half


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """The mean of one value per record, and its interval."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    return mean, bootstrap(lambda chosen: float(array[chosen].mean()), mean, len(array), seed)
