"""Trajectories: how a latent is reached from its start in T quantised steps.

A trajectory answers three questions: how much noise it draws, where it starts, and which residual
timestep t quantises. The recurrence itself (`encode`, `decode`) is one and the same for all:

    q_t     = nearest(residual(t), t)
    x_{t-1} = x_t + lookup(q_t, t)          t = T..1

so every residual starts from where the earlier codes really led.
"""

from __future__ import annotations

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


TRAJECTORIES: dict[str, type[Trajectory]] = {
    "path": Path,
    "injected": Injected,
    "residual": Residual,
}


def make_trajectory(name: str, schedule: Schedule) -> Trajectory:
    """The member of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in TRAJECTORIES:
        known = ", ".join(TRAJECTORIES)
        raise RecipeError(f"unknown trajectory {name!r}: choose one of {known}")
    return TRAJECTORIES[name](schedule)


def walk(
    trajectory: Trajectory, codebook: Codebook, latents: Tensor, noise: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The recurrence, step by step: yields `(t, x_t, r_t, q_t)` for t = T..1.

    A consumer that changes the codebook between two steps (the fit does) changes the path.
    """
    state = trajectory.start(noise)
    for timestep in range(trajectory.num_timesteps, 0, -1):
        residual = trajectory.residual(latents, noise, state, timestep)
        code_indices = codebook.nearest(residual, timestep)
        yield timestep, state, residual, code_indices
        state = state + codebook.lookup(code_indices, timestep)


def encode(
    trajectory: Trajectory, codebook: Codebook, latents: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Recurrent tokenisation (design, section 1).

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
