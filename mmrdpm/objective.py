"""The one loss: cross-entropy over the shared vocabulary at text targets and noisy positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmrdpm.document import NO_TARGET, Packed
from mmrdpm.transformer import Transformer

# Positions whose logits are computed at once. On a CPU those of one part stay in the cache, where
# those of all would be the largest tensor; on a GPU every part costs a copy of the table in bf16.
PARTS = {"cpu": 512, "cuda": 4096}


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


def summed_weights(packed: Packed, text_weight: float = 1.0) -> Tensor:
    """The weights of all targets of some rows, added up: a float32 scalar."""
    learned = packed.targets != NO_TARGET
    return _weights(packed.timesteps[learned], text_weight).sum()


def loss(
    model: Transformer,
    packed: Packed,
    text_weight: float = 1.0,
    z_weight: float = 0.0,
    divisor: Tensor | None = None,
) -> Losses:
    """Cross-entropy at every target; text targets weigh `text_weight`, image targets 1.

    The mean is over the summed weights, so that packing does not change the objective. Only
    positions that have a target are scored.

    Args:
        z_weight: of the squared log of the softmax's denominator, which keeps logits from drifting
            (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5: 1e-4).
        divisor: the summed weights of the whole batch where these rows are only a part of it.
    """
    learned = packed.targets != NO_TARGET
    hidden = model(packed)[learned]
    timesteps = packed.timesteps[learned]
    targets = packed.targets[learned]
    size = PARTS.get(hidden.device.type, PARTS["cuda"])
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    scored = [model.once_or_twice(_score, model, h, t, z_weight) for h, t in parts]
    per_token, squared_z = (torch.cat(column) for column in zip(*scored, strict=True))
    weights = _weights(timesteps, text_weight)
    if divisor is None:
        divisor = weights.sum()
    raised = per_token + z_weight * squared_z if z_weight else per_token
    total = (raised * weights).sum() / divisor.clamp(min=1e-8)
    return Losses(total, per_token.detach(), timesteps)


def _score(
    model: Transformer, hidden: Tensor, targets: Tensor, z_weight: float
) -> tuple[Tensor, Tensor]:
    logits = model.logits(hidden).float()
    squared_z = logits.logsumexp(-1).square() if z_weight else logits.new_zeros(len(targets))
    return cross_entropy(logits, targets, reduction="none"), squared_z


def _weights(timesteps: Tensor, text_weight: float) -> Tensor:
    return torch.where(timesteps < 0, text_weight, 1.0)
