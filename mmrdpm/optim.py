"""Optimisers and the learning rate's course.

Matrices of the stack go to Muon (Jordan 2024; learning rates scaled to AdamW's by Liu et al. 2025,
arXiv 2502.16982, eq. 4), everything else, or all of it, to AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """What `optimizers` builds; the learning rate itself is set at every step."""

    name: Literal["muon", "adamw"] = "muon"
    weight_decay: float = field(default=0.01, metadata={"min": 0.0})
    beta1: float = field(default=0.9, metadata={"min": 0.0, "max": 1.0})
    beta2: float = field(default=0.98, metadata={"min": 0.0, "max": 1.0})
    clip: float = field(default=1.0, metadata={"min": 0.0})


class Muon(Optimizer):
    """Momentum whose update is made orthogonal, for matrices only (Jordan 2024).

    torch's own class computes in bfloat16 always, which a CPU without it emulates a hundred times
    slower than float32; this one computes in the dtype it is given, and is the same otherwise.
    """

    _MOMENTUM = 0.95
    _COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, Jordan 2024
    _ITERATIONS = 5

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self._MOMENTUM)
                update = self.orthogonal(p.grad.lerp(momentum, self._MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def orthogonal(self, matrix: Tensor) -> Tensor:
        """Newton-Schulz: the singular values of a matrix brought near 1, its directions kept."""
        x = matrix.to(self.dtype)
        wide = x if x.shape[0] <= x.shape[1] else x.T
        wide = wide / wide.norm().clamp(min=1e-7)
        a, b, c = self._COEFFICIENTS
        for _ in range(self._ITERATIONS):
            gram = wide @ wide.T
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
        return (wide if x.shape[0] <= x.shape[1] else wide.T).to(matrix.dtype)


class Optimizers:
    """One or two optimisers that step as one.

    Args:
        dtype: of their matrix products.
        stack: beginnings of the names of the parameters whose matrices Muon takes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        dtype: torch.dtype = torch.float32,
        stack: tuple[str, ...] = ("attentions.", "feed_forwards."),
    ) -> None:
        self.config, self.parameters = config, list(model.parameters())
        hidden = [
            p
            for name, p in model.named_parameters()
            if p.ndim == 2 and name.startswith(stack) and name.endswith("weight")
        ]
        matrices = hidden if config.name == "muon" else []
        taken = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in taken]
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.parts: list[Optimizer] = [AdamW(rest, betas=betas, weight_decay=decay, fused=True)]
        if matrices:
            self.parts.append(Muon(matrices, decay, dtype))

    def step(self, lr: float) -> float:
        """Clips, updates and clears the gradients; gives their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad()
        return norm.item()

    def state(self) -> list[dict[str, Any]]:
        """What `restore` takes."""
        return [part.state_dict() for part in self.parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Goes back to a saved state."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear rise over `warmup` steps, then a half cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
