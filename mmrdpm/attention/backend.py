"""Which backend attends: chosen once per run, the same function for its callers."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from mmrdpm import machine
from mmrdpm.attention import flex, sdpa, xformers
from mmrdpm.attention.layout import Attend, Layout
from mmrdpm.errors import RecipeError

Backend = Literal["xformers", "flex", "sdpa"]
Name = Literal["auto", "sdpa", "xformers", "flex"]

BACKENDS: tuple[Backend, ...] = ("flex", "xformers", "sdpa")  # for long rows auto takes the first
_LONG = 1024  # tokens of a row from which others than sdpa pay: of less, a dense mask is nothing


def resolve(
    name: Name, device: torch.device, head_dim: int = 64, row_length: int = _LONG
) -> Backend:
    """What `auto` means on a device: for long rows the first that can train there, else sdpa.

    Raises:
        RecipeError: a backend is asked for that cannot train here; it says why.
    """
    if name == "auto":
        if row_length < _LONG:
            return "sdpa"
        return next(known for known in BACKENDS if why_not(known, device, head_dim) is None)
    if why := why_not(name, device, head_dim):
        raise RecipeError(f"train.attention is {name}, but {why}: use auto or sdpa")
    return name


def why_not(name: Backend, device: torch.device, head_dim: int = 64) -> str | None:
    """Why a backend cannot train on a device with heads of that size, None where it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        reason = {"xformers": "it needs CUDA", "flex": "its backward pass needs CUDA"}[name]
        return f"{reason}, not {device}"
    package = {"xformers": "xformers", "flex": "triton"}[name]
    if not find_spec(package):
        return f"{package} is not installed"
    if name == "flex":
        if head_dim < flex.MIN_HEAD_DIM:
            return f"it needs heads of at least {flex.MIN_HEAD_DIM} channels, not {head_dim}"
        found = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
        return None if found else "no C compiler is found, which triton needs"
    return _refusal(device, head_dim)


@cache
def _refusal(device: torch.device, head_dim: int) -> str | None:
    """Why xformers, though installed, does not run: it is built for one CUDA, and some heads."""
    x = torch.zeros(
        (1, 8, 1, head_dim),
        device=device,
        dtype=machine.matrix_dtype("auto", device),
        requires_grad=True,
    )
    try:
        with warnings.catch_warnings():  # of what in the library is to go
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention
            from xformers.ops.fmha.attn_bias import BlockDiagonalMask

            bias = BlockDiagonalMask.from_seqlens([8], [8])
            memory_efficient_attention(x, x, x, bias).sum().backward()
    except (ImportError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"it does not run here ({str(error).splitlines()[0][:120]})"
    return None


def planner(name: Backend) -> Callable[[Layout], Attend]:
    """The backend's `plan`: a layout in, attention under it out."""
    return {"sdpa": sdpa.plan, "xformers": xformers.plan, "flex": flex.plan}[name]
