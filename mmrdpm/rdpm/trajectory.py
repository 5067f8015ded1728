"""Trajectories: how a latent is reached from its start in T quantised steps.

A trajectory answers three questions: how much noise it draws, where it starts, and which residual
timestep t quantises. The recurrence itself (`encode`, `decode`) is one and the same for all:

    q_t     = nearest(residual(t), t)
    x_{t-1} = x_t + lookup(q_t, t)          t = T..1

so every residual starts from where the earlier codes really led.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrdpm.errors import RecipeError
from mmrdpm.rdpm.codebook import Codebook
from mmrdpm.rdpm.schedule import Schedule


@dataclass(frozen=True)
class Trajectory:
    """Base of the members; tensors are `[..., C]`, noise is `[num_noises, ..., C]`."""

    schedule: Schedule

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_timesteps

    @property
    def num_noises(self) -> int:
        """How many independent noise tensors a token record needs."""
        raise NotImplementedError

    def start(self, noise: Tensor) -> Tensor:
        """The state `x_T`, known before any code is."""
        raise NotImplementedError

    def residual(self, latents: Tensor, noise: Tensor, state: Tensor, timestep: int) -> Tensor:
        """What timestep t quantises, given the state `x_t` that the earlier codes led to."""
        raise NotImplementedError


class Path(Trajectory):
    """From pure noise along the schedule: `r_t = z_{t-1} - x_t`, `x_T = eps` (the default)."""

    @property
    def num_noises(self) -> int:
        return 1

    def start(self, noise: Tensor) -> Tensor:
        return noise[0]

    def residual(self, latents: Tensor, noise: Tensor, state: Tensor, timestep: int) -> Tensor:
        return self.schedule.noised(latents, noise[0], timestep - 1) - state


class Injected(Trajectory):
    """Noise injected into the residual: `v_t = alpha (z_0 - y_t) + sigma eps_t`, `y_T = 0`.

    alpha and sigma are those of timestep t - 1, so the last step sees no noise.
    """

    @property
    def num_noises(self) -> int:
        return self.num_timesteps

    def start(self, noise: Tensor) -> Tensor:
        return torch.zeros_like(noise[0])

    def residual(self, latents: Tensor, noise: Tensor, state: Tensor, timestep: int) -> Tensor:
        return self.schedule.noised(latents - state, noise[timestep - 1], timestep - 1)


class Residual(Trajectory):
    """Ordinary residual quantisation (RQ-VAE, arXiv 2203.01941): `r_t = z_0 - y_t`, no noise.

    The control of the ablations. It keeps one noise tensor for its shape, and uses none of it.
    """

    @property
    def num_noises(self) -> int:
        return 1

    def start(self, noise: Tensor) -> Tensor:
        return torch.zeros_like(noise[0])

    def residual(self, latents: Tensor, noise: Tensor, state: Tensor, timestep: int) -> Tensor:
        return latents - state


@dataclass(frozen=True)
class Ancestral(Trajectory):
    """Fresh noise at every step: `r_t` leads to a draw of the posterior given the real state.

    The state's own noise is `eps_hat = (x_t - alpha_t z_0) / sigma_t`, quantisation errors
    included, and with s = t - 1 the step aims at (Song et al. 2020, arXiv 2010.02502, eq. 12)

        alpha_s z_0 + sqrt(sigma_s^2 - tau_t^2) eps_hat + tau_t eps_t
        tau_t = eta sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

    tau_t is their eq. 16 without the condition alpha^2 + sigma^2 = 1; with eta = 1 its square is
    the variance of q(z_s | z_t, z_0) (Kingma et al. 2021, arXiv 2107.00630, appendix A.2), so that
    eta = 1 is DDPM and eta = 0 the deterministic step of DDIM. The fresh noise is part of what is
    quantised: the codes carry it, and drawing them draws it.

    Attributes:
        eta: 0..1, the share of fresh noise.
    """

    eta: float

    @property
    def num_noises(self) -> int:
        return self.num_timesteps

    def start(self, noise: Tensor) -> Tensor:
        return noise[0]

    def residual(self, latents: Tensor, noise: Tensor, state: Tensor, timestep: int) -> Tensor:
        alpha, sigma = self.schedule.coefficients(timestep)
        next_alpha, next_sigma = self.schedule.coefficients(timestep - 1)
        tau = self.fresh(timestep)
        kept = math.sqrt(max(0.0, next_sigma**2 - tau**2)) / sigma
        aim = next_alpha * latents + kept * (state - alpha * latents)
        # the last step, t = 1, adds no noise, so row t - 1 is free for that of t >= 2
        return aim + tau * noise[timestep - 1] - state

    def fresh(self, timestep: int) -> float:
        """tau_t, the standard deviation of the noise that timestep t adds."""
        alpha, sigma = self.schedule.coefficients(timestep)
        next_alpha, next_sigma = self.schedule.coefficients(timestep - 1)
        added = max(0.0, sigma**2 - (alpha / next_alpha * next_sigma) ** 2)
        return self.eta * next_sigma / sigma * math.sqrt(added)


TRAJECTORIES: dict[str, type[Trajectory]] = {
    "path": Path,
    "injected": Injected,
    "residual": Residual,
    "ancestral": Ancestral,
}


def make_trajectory(name: str, schedule: Schedule, eta: float = 0.0) -> Trajectory:
    """The member of that name; `eta` is of `ancestral` alone.

    Raises:
        RecipeError: there is none.
    """
    if name not in TRAJECTORIES:
        known = ", ".join(TRAJECTORIES)
        raise RecipeError(f"unknown trajectory {name!r}: choose one of {known}")
    if name == "ancestral":
        return Ancestral(schedule, eta)
    if eta:
        raise RecipeError(f"eta is {eta}, but trajectory {name!r} has none: leave it out")
    return TRAJECTORIES[name](schedule)


def walk(
    trajectory: Trajectory, codebook: Codebook, latents: Tensor, noise: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The recurrence, step by step: yields `(t, x_t, r_t, q_t)` for t = T..1."""
    state = trajectory.start(noise)
    for timestep in range(trajectory.num_timesteps, 0, -1):
        residual = trajectory.residual(latents, noise, state, timestep)
        code_indices = codebook.nearest(residual, timestep)
        yield timestep, state, residual, code_indices
        state = state + codebook.lookup(code_indices, timestep)


def encode(
    trajectory: Trajectory, codebook: Codebook, latents: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Recurrent tokenisation (docs/method.md).

    Args:
        latents: `z_0`, float32 `[B, *grid, C]`.
        noise: float32 `[num_noises, B, *grid, C]`.

    Returns:
        code_indices: int64 `[T, B, *grid]`, row `t - 1` holds `q_t`.
        states: float32 `[T + 1, B, *grid, C]`, row t holds `x_t`; row 0 is what decode gives.
    """
    steps = list(walk(trajectory, codebook, latents, noise))
    _, state, _, code_indices = steps[-1]
    final = state + codebook.lookup(code_indices, 1)
    states = [final] + [state for _, state, _, _ in reversed(steps)]
    return torch.stack([q for *_, q in reversed(steps)]), torch.stack(states)


def decode(
    trajectory: Trajectory, codebook: Codebook, code_indices: Tensor, noise: Tensor
) -> Tensor:
    """The states that the codes lead through: `[T + 1, B, *grid, C]`, row 0 the image's latent."""
    states = [trajectory.start(noise)]
    for timestep in range(trajectory.num_timesteps, 0, -1):
        states.append(states[-1] + codebook.lookup(code_indices[timestep - 1], timestep))
    return torch.stack(states[::-1])
