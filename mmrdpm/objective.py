"""The one loss: cross-entropy over the shared vocabulary at text targets and noisy positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmrdpm.document import NO_TARGET, Packed
from mmrdpm.transformer import Transformer

_PART = 512  # positions whose logits are computed at once


@dataclass(frozen=True)
class Losses:
    """Cross-entropies in nats.

    Attributes:
        total: the weighted mean that training lowers, a scalar with a gradient.
        per_token: float32 `[M]` of the M targets, detached.
        timesteps: int64 `[M]`, the timestep of each target, `TEXT_TIMESTEP` for text.
    """

    total: Tensor
    per_token: Tensor
    timesteps: Tensor

    def mean(self, timestep: int) -> float | None:
        """Mean loss of one timestep's targets, None where the batch has none."""
        chosen = self.per_token[self.timesteps == timestep]
        return chosen.mean().item() if len(chosen) else None


def loss(model: Transformer, packed: Packed, text_weight: float = 1.0) -> Losses:
    """Cross-entropy at every target; text targets weigh `text_weight`, image targets 1.

    The mean is over the summed weights, so that packing does not change the objective. Only
    positions that have a target are scored.
    """
    learned = packed.targets != NO_TARGET
    hidden = model(packed)[learned]
    timesteps = packed.timesteps[learned]
    targets = packed.targets[learned]
    # in parts: the logits of one part stay in the cache, those of all are the largest tensor
    parts = zip(hidden.split(_PART), targets.split(_PART), strict=True)
    per_token = torch.cat(
        [cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in parts]
    )
    weights = torch.where(timesteps < 0, text_weight, 1.0)
    total = (per_token * weights).sum() / weights.sum().clamp(min=1e-8)
    return Losses(total, per_token.detach(), timesteps)
