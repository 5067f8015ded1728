"""Attention over packed rows: one function, several backends, one visibility rule.

    attend(q, k, v, plan)

`plan(layout, backend)` prepares what a backend needs once per batch; every layer reuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmrdpm.attention import sdpa, xformers
from mmrdpm.attention.layout import BlockKind, Layout
from mmrdpm.errors import RecipeError

Backend = Literal["auto", "sdpa", "xformers"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = ["Attend", "Backend", "BlockKind", "Layout", "choose_backend", "plan"]


def choose_backend(backend: Backend, device: torch.device | str) -> Literal["sdpa", "xformers"]:
    """The backend that will run: xformers on CUDA where it is installed, else sdpa.

    Raises:
        RecipeError: xformers was asked for by name where it cannot run.
    """
    obstacle = xformers.obstacle(torch.device(device))
    if backend == "xformers" and obstacle:
        raise RecipeError(f"attention backend 'xformers' cannot run here: {obstacle}; use 'sdpa'")
    return "sdpa" if backend == "sdpa" or obstacle else "xformers"


def plan(layout: Layout, backend: Backend = "auto") -> Attend:
    """Attention over one packed batch.

    Returns:
        A function of q `[R, S, H, D]`, k and v `[R, S, G, D]` (G divides H: grouped-query
        attention), giving `[R, S, H, D]`; tokens see what `Layout.visible` says.
    """
    if choose_backend(backend, layout.kinds.device) == "xformers":
        return xformers.plan(layout)
    return sdpa.plan(layout)
