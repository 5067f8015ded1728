"""Optimisers and the learning rate's course.

Matrices of the stack go to Muon (Jordan 2024; learning rates scaled to AdamW's by Liu et al. 2025,
arXiv 2502.16982, eq. 4), everything else, or all of it, to AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """What `optimizers` builds; the learning rate itself is set at every step."""

    name: Literal["muon", "adamw"] = "muon"
    weight_decay: float = field(default=0.01, metadata={"min": 0.0})
    beta1: float = field(default=0.9, metadata={"min": 0.0, "max": 1.0})
    beta2: float = field(default=0.98, metadata={"min": 0.0, "max": 1.0})
    clip: float = field(default=1.0, metadata={"min": 0.0})


class Optimizers:
    """One or two optimisers that step as one."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config, self.parameters = config, list(model.parameters())
        hidden = [
            p
            for name, p in model.named_parameters()
            if p.ndim == 2 and name.startswith(("attentions.", "feed_forwards."))
        ]
        matrices = hidden if config.name == "muon" else []
        taken = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in taken]
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.parts: list[Optimizer] = [AdamW(rest, betas=betas, weight_decay=decay, fused=True)]
        if matrices:
            self.parts.append(Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

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
