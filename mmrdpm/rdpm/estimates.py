"""What the states `x_t` and `x_T`, or `x_t` alone, tell of the latent and of the next residual.

They are the best linear guesses where a latent is `z_0 ~ N(0, 1)` per channel, as latents are
normalised to be, and independent of the noise. Every trajectory's residual is linear,

    r_t = a z_0 + b x_t + c x_T + noise of variance f,

and so, nearly, is its code. A code e is the mean of the residuals that it stands for, so that
`E[r e] = E[e^2]`: with k the mean square of codes, that of `r_t / g_t` being 1, least squares make
of it `k r_t` + an error of variance `k (1 - k) g_t^2`. Thus the states are
`x_t = A z_0 + B x_T + error of variance V`, with A = V = 0 and B = 1 at T, and at t - 1

    A' = (1 + k b) A + k a,  B' = (1 + k b) B + k c,  V' = (1 + k b)^2 V + k^2 f + k (1 - k) g_t^2.

Who sees `x_T` subtracts `B x_T`; to who does not it is another error, of variance `B^2`, and
`x_t` itself the guess of it.

A network that is given the guesses has little but the latent to find, and little noise to see
through (as the preconditioning of Karras et al. 2022, arXiv 2206.00364, section 5, has it for a
denoiser).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrdpm.rdpm.codebook import Codebook
from mmrdpm.rdpm.trajectory import Trajectory


def estimates(trajectory: Trajectory, codebook: Codebook, sees_start_noise: bool) -> Tensor:
    """The guesses of every timestep as weights of `(x_t, x_T)`, the latter 0 where it is unseen.

    Returns:
        float32 `[T + 1, 2, 2]`: of timestep t, row 0 guesses `z_0` and row 1 `r_t / g_t`, which is
        0 at t = 0. Without values where the codes have none, on the device "meta".
    """
    table = torch.zeros(trajectory.num_timesteps + 1, 2, 2)
    if codebook.codes.is_meta:
        return table.to("meta")
    k = _mean_square(codebook)
    starts_noisy = trajectory.start(torch.ones(trajectory.num_noises)).item() != 0
    of_latent, of_start, error = 0.0, 1.0, 0.0  # A, B, V
    for timestep in range(trajectory.num_timesteps, 0, -1):
        a, b, c, fresh = coefficients(trajectory, timestep)
        gain = codebook.gains[timestep - 1].item()
        if sees_start_noise:
            weight = _weight(of_latent, error)
            z_0, x_T = (weight, -weight * of_start), (0.0, 1.0)
        else:
            noise = of_start if starts_noisy else 0.0
            z_0 = (_weight(of_latent, noise**2 + error), 0.0)
            x_T = (_weight(noise, of_latent**2 + error), 0.0)
        table[timestep, 0] = torch.tensor(z_0)
        of_t, of_T = (a * z + c * x for z, x in zip(z_0, x_T, strict=True))
        table[timestep, 1] = torch.tensor([b + of_t, of_T]) / gain
        stays = 1 + k * b
        of_latent, of_start = stays * of_latent + k * a, stays * of_start + k * c
        error = stays**2 * error + k**2 * fresh + k * (1 - k) * gain**2
    unseen = of_start**2 if starts_noisy else 0.0  # a clean block does not show x_T
    table[0, 0, 0] = _weight(of_latent, error + unseen)
    return table


def coefficients(trajectory: Trajectory, timestep: int) -> tuple[float, float, float, float]:
    """`(a, b, c, f)` of a timestep's residual: what it makes of `z_0 = 1`, `x_t = 1` and so on."""
    silent = torch.zeros(trajectory.num_noises)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    a = trajectory.residual(one, silent, zero, timestep).item()
    b = trajectory.residual(zero, silent, one, timestep).item()
    c = fresh = 0.0
    for noise in torch.eye(trajectory.num_noises):
        share = trajectory.residual(zero, noise, zero, timestep).item()
        if trajectory.start(noise):
            c += share
        else:
            fresh += share**2
    return a, b, c, fresh


def _weight(of_latent: float, error: float) -> float:
    return of_latent / (of_latent**2 + error) if of_latent else 0.0


def _mean_square(codebook: Codebook) -> float:
    """Of the codes that tables have; what a code explains of a residual of mean square 1."""
    codes = codebook.codes.cpu()  # whose sums are the same to the last bit wherever a model runs
    having = codes[codes.any(-1)]
    return min(1.0, having.square().mean().item()) if len(having) else 0.0
