"""Noise schedules: `z_t = alpha_t z_0 + sigma_t eps`, the one owner of noise arithmetic.

Timestep T is exactly standard Gaussian noise (`alpha_T = 0, sigma_T = 1`), timestep 0 exactly the
clean latent (`alpha_0 = 1, sigma_0 = 0`), for every member of the registry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrdpm.errors import RecipeError


def _linear(time: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003, eq. 1): the straight line."""
    return 1 - time, time


def _cosine(time: Tensor) -> tuple[Tensor, Tensor]:
    """Variance preserving (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17, without offset)."""
    alpha = torch.cos(time * math.pi / 2)
    return alpha, torch.sqrt((1 - alpha**2).clamp(min=0))


def _power(time: Tensor) -> tuple[Tensor, Tensor]:
    """The straight line at a falling speed: `sigma = time ** 1.5`.

    Codes lag behind a path that moves on (a quantised residual is shorter than the residual), and
    the lag at the end is the tokeniser's error; slowing down lets the last codes catch up.
    """
    return _slowing(time, 1.5)


def _cubic(time: Tensor) -> tuple[Tensor, Tensor]:
    """As `power`, slower still at the end: `sigma = time ** 3`."""
    return _slowing(time, 3.0)


def _slowing(time: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    sigma = time**exponent
    return 1 - sigma, sigma


SCHEDULES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "linear": _linear,
    "cosine": _cosine,
    "power": _power,
    "cubic": _cubic,
}


@dataclass(frozen=True)
class Schedule:
    """A schedule cut into `num_timesteps` steps.

    Raises:
        RecipeError: `name` is not in the registry.
    """

    name: str
    num_timesteps: int

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise RecipeError(f"unknown noise schedule {self.name!r}: choose one of {known}")

    def coefficients(self, timestep: int) -> tuple[float, float]:
        """`(alpha_t, sigma_t)` of timestep 0..T."""
        if timestep in (0, self.num_timesteps):  # exact at both ends, whatever cos() rounds to
            return (1.0, 0.0) if timestep == 0 else (0.0, 1.0)
        time = torch.tensor(timestep / self.num_timesteps, dtype=torch.float64)
        alpha, sigma = SCHEDULES[self.name](time)
        return alpha.item(), sigma.item()

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """`z_t` for latents and noise of any one shape."""
        alpha, sigma = self.coefficients(timestep)
        return alpha * latents + sigma * noise
