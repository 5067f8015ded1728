"""Which backend attends: chosen once per run, the same function for its callers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from mmrdpm.attention import sdpa, xformers
from mmrdpm.attention.layout import Layout
from mmrdpm.errors import RecipeError

Name = Literal["auto", "sdpa", "xformers"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(q [R, S, H, D], k, v [R, S, G, D]) -> [R, S, H, D]`."""


def resolve(name: Name, device: torch.device) -> Literal["sdpa", "xformers"]:
    """What `auto` means on a device: xformers on CUDA where it is installed, sdpa otherwise.

    Raises:
        RecipeError: xformers is asked for where it cannot run.
    """
    possible = device.type == "cuda" and find_spec("xformers") is not None
    if name == "auto":
        return "xformers" if possible else "sdpa"
    if name == "xformers" and not possible:
        why = "it is not installed" if device.type == "cuda" else f"it needs CUDA, not {device}"
        raise RecipeError(f"train.attention is xformers, but {why}: use auto or sdpa")
    return name


def planner(name: Literal["sdpa", "xformers"]) -> Callable[[Layout], Attend]:
    """The backend's `plan`: a layout in, attention under it out."""
    return {"sdpa": sdpa.plan, "xformers": xformers.plan}[name]
