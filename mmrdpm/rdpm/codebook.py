"""The codebook: nearest code, look-up, gain per timestep, and its fit by EMA k-means.

Position-wise throughout: every tensor is `[..., C]`, so grids of any rank pass unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Codebook(nn.Module):
    """`K` codes of `C` channels, shared by all timesteps or one table per timestep.

    A residual `r_t` is divided by the gain `g_t` before it is compared with the codes, and a code
    is multiplied by it when looked up, so that one table serves steps of very different length.

    Attributes:
        codes: float32 `[S, K, C]`, `S = 1` (shared) or `T` (per timestep).
        gains: float32 `[T]`, row `t - 1` belongs to timestep t.
    """

    codes: Tensor
    gains: Tensor

    def __init__(self, num_timesteps: int, size: int, dim: int, per_step: bool = False) -> None:
        super().__init__()
        tables = num_timesteps if per_step else 1
        self.register_buffer("codes", torch.zeros(tables, size, dim))
        self.register_buffer("gains", torch.ones(num_timesteps))

    @property
    def size(self) -> int:
        return self.codes.shape[1]

    @property
    def per_step(self) -> bool:
        return self.codes.shape[0] > 1

    def table(self, timestep: int) -> Tensor:
        """The unscaled codes `[K, C]` that timestep 1..T chooses from."""
        return self.codes[timestep - 1 if self.per_step else 0]

    def nearest(self, residual: Tensor, timestep: int) -> Tensor:
        """`argmin_k || r_t / g_t - e_k ||^2` (design, section 1): int64 `[...]` for `[..., C]`."""
        table = self.table(timestep)
        # || r - e ||^2 without its term in r alone, which does not change the argmin
        flat = residual.reshape(-1, residual.shape[-1]) / self.gains[timestep - 1]
        distance = torch.addmm(table.square().sum(-1), flat, table.T, alpha=-2)
        return distance.argmin(-1).reshape(residual.shape[:-1])

    def lookup(self, code_indices: Tensor, timestep: int) -> Tensor:
        """`g_t e_q`: float32 `[..., C]` for indices `[...]`."""
        return self.gains[timestep - 1] * self.table(timestep)[code_indices]


class CodebookFit:
    """EMA k-means over the residuals of whole trajectories (van den Oord 2017, appendix A.1).

    Codes that fall out of use are re-seeded with residuals of the current batch. While `tied`,
    tables per timestep move as one: they start alike, so that a code means a similar direction at
    every step, and part only afterwards.
    """

    decay = 0.95  # of the moving averages, per update
    dead_below = 0.1  # of the mean count: a code used less is re-seeded

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self.counts = torch.zeros(codebook.codes.shape[:2])
        self.sums = torch.zeros_like(codebook.codes)

    @torch.no_grad()
    def observe(self, residual: Tensor, timestep: int, generator: torch.Generator) -> Tensor:
        """Fits gain and codes of one timestep to residuals `[..., C]`; gives them quantised."""
        codebook, row = self.codebook, timestep - 1
        table = row if codebook.per_step else 0
        scale = residual.square().mean().sqrt().clamp(min=1e-8)
        fresh = not self.counts[table].any()
        codebook.gains[row] = scale if fresh else torch.lerp(scale, codebook.gains[row], self.decay)
        flat = residual.reshape(-1, residual.shape[-1]) / codebook.gains[row]
        if fresh:
            codebook.codes[table] = _draw(flat, codebook.size, generator)
        code_indices = codebook.nearest(residual, timestep)
        self._average(flat, code_indices.reshape(-1), table, decay=0.0 if fresh else self.decay)
        self._reseed(flat, table, generator)
        return codebook.lookup(code_indices, timestep)

    @torch.no_grad()
    def tie(self) -> None:
        """Makes all tables one: the mean of what each has seen."""
        self.counts[:] = self.counts.mean(0)
        self.sums[:] = self.sums.mean(0)
        self.codebook.codes[:] = self.sums / self.counts[..., None].clamp(min=1e-6)

    def _average(self, flat: Tensor, chosen: Tensor, table: int, decay: float) -> None:
        counts = torch.bincount(chosen, minlength=self.codebook.size).float()
        sums = torch.zeros_like(self.sums[table]).index_add_(0, chosen, flat)
        self.counts[table] = torch.lerp(counts, self.counts[table], decay)
        self.sums[table] = torch.lerp(sums, self.sums[table], decay)
        used = self.counts[table] > 0
        self.codebook.codes[table, used] = self.sums[table, used] / self.counts[table, used, None]

    def _reseed(self, flat: Tensor, table: int, generator: torch.Generator) -> None:
        mean_count = self.counts[table].mean()
        dead = self.counts[table] < self.dead_below * mean_count
        seeds = _draw(flat, int(dead.sum()), generator)
        self.codebook.codes[table, dead] = seeds
        self.counts[table, dead] = mean_count
        self.sums[table, dead] = seeds * mean_count


def perplexity(code_indices: Tensor, size: int) -> float:
    """`exp(entropy)` of the codes' use, 1..size: how many codes are in effective use."""
    share = torch.bincount(code_indices.reshape(-1), minlength=size).double()
    share /= share.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()


def _draw(flat: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return flat[torch.randint(len(flat), (count,), generator=generator)]
