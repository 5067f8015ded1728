"""Drawing ids from logits: temperature, top-k, top-p, and a generator for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from mmrdpm.errors import UsageError

_HOTTEST = 1e6  # where all ids are as good as equally likely


@dataclass(frozen=True)
class Choice:
    """How ids are drawn.

    Attributes:
        temperature: 0 takes the likeliest id.
        top_k: keep the k likeliest ids, and what is as likely as the last; 0 keeps all.
        top_p: keep the likeliest ids that together reach this probability, 1 keeps all.

    Raises:
        UsageError: a number is out of range.
    """

    temperature: float = field(default=1.0, metadata={"min": 0.0})
    top_k: int = field(default=0, metadata={"min": 0})
    top_p: float = field(default=1.0, metadata={"min": 0.0, "max": 1.0})

    def __post_init__(self) -> None:
        numbers = all(isinstance(x, Real) for x in (self.temperature, self.top_p))
        if not numbers or not 0 <= self.temperature <= _HOTTEST or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature!s:.20} must be a number from 0 to {_HOTTEST:g},"
                f" top-p {self.top_p} above 0 and at most 1"
            )
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} must be a whole number, 0 or more")


def choose(logits: Tensor, choice: Choice, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws from `softmax(logits / temperature)` over what top-k and top-p keep.

    Args:
        logits: float `[R, ..., V]`.
        generators: one per row, on the CPU, so that a row's draws depend on nothing else.

    Returns:
        int64 `[R, ...]`.
    """
    if choice.temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    scaled = (logits - logits.amax(-1, keepdim=True)) / choice.temperature  # the largest is 0
    kept = keep(scaled, choice.top_k, choice.top_p)
    reached = kept.softmax(-1).cumsum(-1)
    shape = (*logits.shape[1:-1], 1)
    uniform = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
    drawn = torch.stack(uniform).to(logits.device) * reached[..., -1:]
    # the first id whose cumulative probability is above the draw: never one that was dropped
    return torch.searchsorted(reached, drawn, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def keep(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits `[..., V]` with all ids that top-k and top-p drop at minus infinity."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
