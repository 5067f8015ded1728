"""Labels of codes that say where a residual lies, and how long their mean is."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLED = 256  # codes, from which the length of a mean is known to about a hundredth


def soft_labels(residuals: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Probabilities of codes, in proportion to `exp(-||r - e_k||^2 / temperature)`.

    Lee et al. 2022, arXiv 2203.01941, section 3.2.

    Args:
        residuals: of mean square 1, as `r_t / g_t`, `[..., C]`.
        codes: `[K, C]`.
        temperature: above 0.

    Returns:
        `[..., K]`.
    """
    # without the term in r alone, which is the same for all codes
    near = (2 * residuals @ codes.T - codes.square().sum(1)) / temperature
    return near.softmax(-1)


def shortening(codes: Tensor, temperature: float) -> float:
    """How many times longer the nearest code is than the mean code of soft labels.

    The least-squares factor `E[<n, m>] / E[<m, m>]` between the nearest code n of a residual and
    the mean m of its soft labels; 1 where labels are hard. Residuals are taken as they lie in the
    codes' cells: a code is the mean of its cell, so with k the codes' mean square they have a
    variance of 1 - k about it. A quarter of a thousand of them, from a fixed seed, on the CPU.

    Args:
        codes: `[K, C]`, shared by all timesteps.
        temperature: of the soft labels, 0 for hard ones.
    """
    if not temperature:
        return 1.0
    codes = codes.float().cpu()
    few = codes[:: -(-len(codes) // _SAMPLED)]
    spread = (1 - few.square().mean()).clamp(min=0).sqrt()
    noise = torch.randn(few.shape, generator=torch.Generator().manual_seed(0))
    residuals = few + spread * noise
    means = soft_labels(residuals, codes, temperature) @ codes
    nearest = codes[torch.cdist(residuals, codes).argmin(1)]
    return ((nearest * means).sum() / means.square().sum().clamp(min=1e-12)).item()
