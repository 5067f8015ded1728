"""How the codebook is used: figures per timestep, and the end of a run whose codes collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrdpm import distributed
from mmrdpm.errors import TrainingError


@dataclass(frozen=True)
class CollapseConfig:
    """When a codebook is given up.

    Attributes:
        min_usage: share of the codes that must be in effective use (perplexity over size) at
            every timestep; 0 never stops a run.
        patience: so many checks in a row below it stop the run; there is one each time the run
            logs in the codebook's phase.
    """

    min_usage: float = field(default=0.02, metadata={"min": 0.0, "max": 1.0})
    patience: int = field(default=10, metadata={"min": 1})


class Usage:
    """How each timestep used its codes since the last check, over all ranks.

    Attributes:
        counts: float64 `[T, K]`, how often a code was chosen; row `t - 1` belongs to timestep t.
        errors: float64 `[T]`, summed over updates: mean square of what a step leaves of its target.
        reseeded: float64 `[T]`, codes that got a new start.
        low: checks in a row below the least usage.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.low, self.updates = tuple(sizes), 0, 0
        self.counts = torch.zeros(len(sizes), max(sizes), dtype=torch.float64, device=device)
        self.errors = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        self.reseeded = torch.zeros_like(self.errors)

    def add(self, timestep: int, counts: Tensor, error: Tensor, reseeded: Tensor) -> None:
        """Takes in one update of one timestep; counts and number re-seeded are of all ranks."""
        row = timestep - 1
        self.counts[row, : len(counts)] += counts[: self.counts.shape[1]]
        self.errors[row] += distributed.mean_over_ranks(error.clone())
        self.reseeded[row] += reseeded
        self.updates += row == len(self.sizes) - 1  # the first timestep of a trajectory

    def shares(self) -> list[float]:
        """Perplexity over size per timestep, t = 1 first.

        A timestep that saw fewer residuals than it has codes is judged by their number.
        """
        return [
            perplexity_of_counts(counts[:size]) / max(1.0, min(size, counts.sum().item()))
            for counts, size in zip(self.counts, self.sizes, strict=True)
        ]

    def check(self, config: CollapseConfig, run: object) -> dict[str, float]:
        """Figures for the log; begins anew.

        Raises:
            TrainingError: the codebook has been below `min_usage` too often in a row.
        """
        if not self.updates:
            return {}
        shares = self.shares()
        worst = min(range(len(shares)), key=shares.__getitem__)
        self.low = self.low + 1 if shares[worst] < config.min_usage else 0
        if self.low >= config.patience:
            raise TrainingError(
                f"{run}: the codebook has collapsed: at timestep {worst + 1}, {shares[worst]:.1%}"
                f" of its codes are in effective use, at {self.low} checks in a row below"
                f" train.collapse.min_usage {config.min_usage:.1%}: look at the latents (is the"
                " autoencoder's loss low, are there many pictures), then begin anew with a larger"
                " train.codebook_batch or a smaller tokenizer.codebook_size;"
                f" train.autoencoder_from={run} keeps the autoencoder"
            )
        figures = self._figures(shares)
        self._clear()
        return figures

    def _figures(self, shares: Sequence[float]) -> dict[str, float]:
        figures = {}
        for row, size in enumerate(self.sizes):
            name = f"timestep_{row + 1:02d}"
            figures[f"codebook_usage/{name}"] = shares[row]
            figures[f"dead_codes/{name}"] = (self.counts[row, :size] == 0).sum().item()
            figures[f"reseeded_codes/{name}"] = self.reseeded[row].item()
            figures[f"latent_error/{name}"] = (self.errors[row] / self.updates).item()
        return figures

    def _clear(self) -> None:
        self.updates = 0
        for tensor in (self.counts, self.errors, self.reseeded):
            tensor.zero_()

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        tensors = {"counts": self.counts, "errors": self.errors, "reseeded": self.reseeded}
        return {"low": self.low, "updates": self.updates, **tensors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved state."""
        self.low, self.updates = state["low"], state["updates"]
        for name in ("counts", "errors", "reseeded"):
            getattr(self, name).copy_(state[name])


def perplexity(code_indices: Tensor, size: int) -> float:
    """`exp(entropy)` of the use of `size` codes: how many of them are in effective use."""
    return perplexity_of_counts(torch.bincount(code_indices.reshape(-1), minlength=size))


def perplexity_of_counts(counts: Tensor) -> float:
    """`perplexity` of codes that were used so many times, `[K]`: 1..K."""
    share = counts.double()
    share = share / share.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()
