"""The codebook: nearest code, look-up, gain per timestep, and its fit by EMA k-means.

Position-wise throughout: every tensor is `[..., C]`, so grids of any rank pass unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrdpm import distributed
from mmrdpm.errors import RecipeError
from mmrdpm.rdpm.usage import Usage


class Codebook(nn.Module):
    """`K` codes of `C` channels, shared by all timesteps or one table per timestep.

    Tables per timestep may differ in size: timestep t then chooses from the first `K_t` codes of
    its own table, so that all code indices lie in one range, 0..K-1.

    A residual `r_t` is divided by the gain `g_t` before it is compared with the codes, and a code
    is multiplied by it when looked up, so that one table serves steps of very different length.

    Attributes:
        codes: float32 `[S, K, C]`, `S = 1` (shared) or `T` (per timestep).
        gains: float32 `[T]`, row `t - 1` belongs to timestep t.
        sizes: the `T` numbers `K_t`, row `t - 1` belongs to timestep t.

    Raises:
        RecipeError: `sizes` are not `T` numbers within 1..K, or differ in a shared table.
    """

    codes: Tensor
    gains: Tensor

    def __init__(
        self,
        num_timesteps: int,
        size: int,
        dim: int,
        per_step: bool = False,
        sizes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes) or (size,) * num_timesteps
        _check_sizes(self.sizes, num_timesteps, size, per_step)
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
        """The unscaled codes `[K_t, C]` that timestep 1..T chooses from."""
        return self.codes[timestep - 1 if self.per_step else 0, : self.sizes[timestep - 1]]

    def nearest(self, residual: Tensor, timestep: int) -> Tensor:
        """`argmin_k || r_t / g_t - e_k ||^2` (docs/method.md): int64 `[...]` for `[..., C]`."""
        table = self.table(timestep)
        # || r - e ||^2 without its term in r alone, which does not change the argmin
        flat = residual.reshape(-1, residual.shape[-1]) / self.gains[timestep - 1]
        distance = torch.addmm(table.square().sum(-1), flat, table.T, alpha=-2)
        return distance.argmin(-1).reshape(residual.shape[:-1])

    def lookup(self, code_indices: Tensor, timestep: int) -> Tensor:
        """`g_t e_q`: float32 `[..., C]` for indices `[...]`."""
        return self.gains[timestep - 1] * self.table(timestep)[code_indices]

    def expected(self, probabilities: Tensor, timestep: int) -> Tensor:
        """`g_t sum_k p_k e_k`: float32 `[..., C]` for float32 probabilities `[..., K_t]`."""
        with torch.autocast(probabilities.device.type, enabled=False):
            return self.gains[timestep - 1] * (probabilities @ self.table(timestep))


def _check_sizes(sizes: Sequence[int], num_timesteps: int, size: int, per_step: bool) -> None:
    drawn = list(sizes)[::-1]  # as recipes have them, T first
    if len(sizes) != num_timesteps or not all(1 <= s <= size for s in sizes):
        raise RecipeError(
            f"codebook_sizes {drawn}: give one size for each of the {num_timesteps}"
            f" timesteps, each from 1 to codebook_size, {size}"
        )
    if max(sizes) < size:  # or codes that no step has would be scored, and labels softened by them
        raise RecipeError(
            f"codebook_sizes {drawn}: the largest must be codebook_size, {size}: lower that"
        )
    if len(set(sizes)) > 1 and not per_step:
        raise RecipeError(
            "codebook_sizes that differ need tables of their own: set per_step_codebook to true"
        )


class CodebookFit:
    """EMA k-means over the residuals of whole trajectories (van den Oord 2017, appendix A.1).

    Codes that fall out of use are re-seeded with residuals of the current batch. While `tied`,
    tables per timestep move as one: they start alike, so that a code means a similar direction at
    every step, and part only afterwards. Under several ranks each observes its share of a batch,
    and all fit the same codes to the whole of it.
    """

    decay = 0.95  # of the moving averages, per update
    dead_below = 0.1  # of the mean count: a code used less is re-seeded

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self.present = torch.zeros_like(codebook.codes[..., 0])  # 1 where a table has a code
        for table in range(len(self.present)):
            self.present[table, : codebook.sizes[table]] = 1
        self.counts = torch.zeros_like(self.present)
        self.sums = torch.zeros_like(codebook.codes)
        self.begun = torch.zeros_like(codebook.gains)  # 1 where a timestep has been observed
        # a shared table is observed by every timestep in turn: its averages, too, decay per update
        self.table_decay = self.decay ** (1 if codebook.per_step else 1 / len(codebook.gains))
        self.usage = Usage(codebook.sizes, codebook.codes.device)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, the codebook itself left out."""
        averages = {"counts": self.counts, "sums": self.sums, "begun": self.begun}
        return {**averages, "usage": self.usage.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved state."""
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
        self.begun.copy_(state["begun"])
        self.usage.restore(state["usage"])

    @torch.no_grad()
    def observe(self, residual: Tensor, timestep: int, generator: torch.Generator) -> Tensor:
        """Fits gain and codes of one timestep to residuals `[..., C]`; gives them quantised.

        Args:
            generator: on the CPU, the same on all ranks.
        """
        codebook, row = self.codebook, timestep - 1
        table = row if codebook.per_step else 0
        scale = distributed.mean_over_ranks(residual.square().mean()).sqrt().clamp(min=1e-8)
        codebook.gains[row] = torch.lerp(scale, codebook.gains[row], self.decay * self.begun[row])
        self.begun[row] = 1
        fresh = not self.counts[table].any()
        flat = residual.reshape(len(residual), -1, residual.shape[-1]) / codebook.gains[row]
        if fresh:
            codebook.table(timestep)[:] = self._first_codes(flat, row, generator)
        code_indices = codebook.nearest(residual, timestep)
        counts = self._average(flat, code_indices, table)
        quantised = codebook.lookup(code_indices, timestep)
        reseeded = self._reseed(flat, table, codebook.sizes[row], generator)
        self.usage.add(timestep, counts, (residual - quantised).square().mean(), reseeded)
        return quantised

    @torch.no_grad()
    def tie(self) -> None:
        """Makes all tables one: the mean of what those that have a code have seen of it."""
        having = self.present.sum(0).clamp(min=1)
        self.counts = self.present * (self.counts.sum(0) / having)
        self.sums = self.present[..., None] * (self.sums.sum(0) / having[:, None])
        self.codebook.codes[:] = self.sums / self.counts[..., None].clamp(min=1e-6)

    def _first_codes(self, flat: Tensor, row: int, generator: torch.Generator) -> Tensor:
        """Residuals of the batch; as far as the table of the step before has codes, those."""
        size, before = self.codebook.sizes[row], row + 1
        codes = _draw(flat, size, generator)
        if before < len(self.counts) and self.counts[before].any():
            alike = min(size, self.codebook.sizes[before])
            codes[:alike] = self.codebook.codes[before, :alike]
        return codes

    def _average(self, flat: Tensor, chosen: Tensor, table: int) -> Tensor:
        """Moves a table to the mean of what chose each code; gives how often each was chosen."""
        index = chosen.reshape(-1)
        counts = torch.bincount(index, minlength=self.codebook.size).float()
        sums = torch.zeros_like(self.sums[table]).index_add_(0, index, flat.flatten(0, 1))
        distributed.sum_over_ranks(counts)
        distributed.sum_over_ranks(sums)
        self.counts[table] = self.table_decay * self.counts[table] + counts
        self.sums[table] = self.table_decay * self.sums[table] + sums
        used = self.counts[table] > 0
        self.codebook.codes[table, used] = self.sums[table, used] / self.counts[table, used, None]
        return counts

    def _reseed(self, flat: Tensor, table: int, size: int, generator: torch.Generator) -> Tensor:
        """Gives codes out of use a new start; gives their number."""
        mean_count = self.counts[table, :size].mean()
        dead = (self.counts[table] < self.dead_below * mean_count) & self.present[table].bool()
        seeds = _draw(flat, int(dead.sum()), generator)
        self.codebook.codes[table, dead] = seeds
        self.counts[table, dead] = mean_count
        self.sums[table, dead] = seeds * mean_count
        return dead.sum()


def _draw(flat: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` residuals of the batch of all ranks: `[count, C]` of this rank's `[B, N, C]`.

    Image i of a batch is with rank `i % world_size`, so as many ranks as may be draw the same.
    """
    ranks, (images, positions, _) = distributed.world_size(), flat.shape
    drawn = torch.randint(images * ranks * positions, (count,), generator=generator)
    image, position = drawn // positions, drawn % positions
    mine = (image % ranks == distributed.rank()).to(flat.device)
    chosen = flat[(image // ranks).to(flat.device), position.to(flat.device)]
    return distributed.sum_over_ranks(torch.where(mine[:, None], chosen, 0.0))
