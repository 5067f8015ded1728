"""Distances between two sets of features: kernel and Fréchet, with their intervals.

A distance belongs to the backbone that made the features and to the number of samples, so it is
always named with both, and called FID only where the features are those of FID.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmrdpm.errors import DataError
from mmrdpm.metrics.interval import AT_LEAST_0, Interval, Progress, bootstrap

LEAST_OF_KERNEL = 3  # pictures


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID: the squared MMD with the kernel `(x . y / F + 1)^3`; may be negative.

    Bińkowski et al. 2018 (arXiv 1801.01401), section 3 and eq. 4 of its appendix, over all samples
    at once rather than over blocks. Unbiased where the sets are independent; where `x[i]` is made
    to be like `y[i]` it is too low, see `lowered_by_pairs`.

    Args:
        x, y: float `[n, F]` and `[m, F]`.

    Raises:
        DataError: a set has fewer than two samples.
    """
    kernels = _kernels(x, y)
    return _mmd(kernels, np.ones(len(x)), np.ones(len(y)))


def lowered_by_pairs(x: Tensor, y: Tensor) -> float:
    """By how much the pairs of `x[i]` and its own `y[i]` lower `kernel_distance`.

    Without them it is the estimate of Gretton et al. 2012 (JMLR 13, lemma 6, eq. 4), which is
    unbiased for such sets too, and 0 for a set and itself.

    Args:
        x, y: float `[n, F]` both.
    """
    across = _kernels(x, y)[2]
    return 2 * float(across.diagonal().mean() - across.mean()) / (len(x) - 1)


def kernel_interval(x: Tensor, y: Tensor, value: float, seed: int = 0) -> Interval:
    """95% interval of `kernel_distance` over the choice of the samples `x`; `y` is given.

    A sample that is drawn twice is never compared with its own copy.

    Raises:
        DataError: there are fewer than three samples: of two, all resamples that tell anything are
            alike.
    """
    if len(x) < LEAST_OF_KERNEL:
        raise DataError(
            f"the interval of a kernel distance needs at least {LEAST_OF_KERNEL} pictures, not"
            f" {len(x)}: raise the suite's counts"
        )
    kernels, n, every = _kernels(x, y), len(x), np.ones(len(y))

    def resampled(chosen: np.ndarray) -> float:
        if len(set(chosen)) < 2:  # no pair of different samples: tells nothing
            return float("nan")
        return _mmd(kernels, np.bincount(chosen, minlength=n).astype(float), every)

    return bootstrap(resampled, value, n, seed)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """`|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2))` of two sets of features `[n, F]`, `[m, F]`.

    Dowson & Landau 1982 (doi 10.1016/0047-259X(82)90077-X), as in Heusel et al. 2017 (arXiv
    1706.08500, eq. 6). With `C = A^T A` the trace of the root is the nuclear norm of `Ax Ay^T`,
    which needs neither a matrix root nor covariances of full rank. Below F samples the distance
    is biased upwards: compare equal counts only.

    Raises:
        DataError: a set has fewer than two samples.
    """
    _check(x, y)
    return _frechet(_spread(x), _spread(y))


def frechet_interval(
    x: Tensor, y: Tensor, value: float, seed: int = 0, progress: Progress = iter
) -> Interval:
    """95% interval of `frechet_distance` over the choice of the samples `x`; `y` is given.

    Args:
        progress: passes on the numbers of the resamples, as a bar does.
    """
    given, x = _spread(y), x.double()

    def resampled(chosen: np.ndarray) -> float:
        if len(x) > x.shape[1]:
            return _frechet_by_covariance(x, chosen, given)
        return _frechet(_spread(x[chosen]), given)

    return bootstrap(resampled, value, len(x), seed, AT_LEAST_0, progress)


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `[F]`, and an R `[min(n, F), F]` with `R^T R` the covariance, of `[n, F]`."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def _frechet(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float:
    (mean_x, a), (mean_y, b) = x, y
    root = torch.linalg.svdvals(a @ b.T).sum()
    apart = (mean_x - mean_y).square().sum()
    return (apart + a.square().sum() + b.square().sum() - 2 * root).item()


def _frechet_by_covariance(x: Tensor, chosen: np.ndarray, y: tuple[Tensor, Tensor]) -> float:
    """`_frechet(_spread(x[chosen]), y)`, cheaper where there are more samples than features.

    Each of the different samples, about 63%, is taken once with its count for a weight, and their
    covariance C needs a product, no QR. The trace of the root is that of `(b C b^T)^(1/2)`.
    """
    mean_y, b = y
    counts = torch.from_numpy(np.bincount(chosen, minlength=len(x))).to(x)
    different = counts.nonzero()[:, 0]
    counts, kept = counts[different], x[different]
    mean = counts @ kept / len(chosen)
    kept = (kept - mean).mul_((counts / (len(chosen) - 1)).sqrt()[:, None])
    covariance = kept.T @ kept
    root = torch.linalg.eigvalsh(b @ covariance @ b.T).clamp(min=0).sqrt().sum()
    apart = (mean - mean_y).square().sum()
    return (apart + covariance.trace() + b.square().sum() - 2 * root).item()


def _kernels(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _check(x, y)
    x, y = x.double(), y.double()
    return tuple(((a @ b.T / x.shape[1] + 1) ** 3).numpy() for a, b in ((x, x), (y, y), (x, y)))  # type: ignore[return-value]


def _mmd(kernels: tuple[np.ndarray, ...], x: np.ndarray, y: np.ndarray) -> float:
    """The distance with each sample counted as often as `x` and `y` say."""
    xx, yy, xy = kernels
    return _pairs(xx, x) + _pairs(yy, y) - 2 * float(x @ xy @ y) / (x.sum() * y.sum())


def _pairs(kernel: np.ndarray, counts: np.ndarray) -> float:
    """Mean over pairs of different samples."""
    squares = counts * counts
    total = counts @ kernel @ counts - squares @ kernel.diagonal()
    return float(total / (counts.sum() ** 2 - squares.sum()))


def _check(x: Tensor, y: Tensor) -> None:
    for features in (x, y):
        if len(features) < 2:
            raise DataError(
                f"a distance between sets needs at least 2 pictures in each, not {len(features)}:"
                " raise the suite's counts"
            )
