"""Where a position lies: rotary embedding of slot and place, and sinusoids of the place."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def sinusoids(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of places in a grid (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    Each axis has as many channels as the others, at wavelengths from 2 pi to nearly 200 pi.

    Args:
        places: int64 `[R, S, A]`.

    Returns:
        float32 `[R, S, width]` of unit mean square, but for zeros in channels that are left over.
    """
    count = width // (2 * places.shape[-1])
    angle = places[..., None] * 100.0 ** (-torch.arange(count, device=places.device) / count)
    both = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    return pad(both * math.sqrt(2), (0, width - both.shape[-1]))


def rotations(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """RoPE (Su et al. 2021, arXiv 2104.09864, eq. 15) over several axes at once.

    Half of the channel pairs turn with the slot, the rest is shared by the grid's axes, evenly if
    it can be.

    Args:
        positions: int64 `[R, S, A]`, slot first.

    Returns:
        float32 `[R, S, 1, head_dim / 2, 2]`, cosine and sine for every channel pair.
    """
    pairs, axes = head_dim // 2, positions.shape[-1] - 1
    axis = torch.zeros(pairs, dtype=torch.int64, device=positions.device)
    place = torch.arange(pairs, device=positions.device)
    slots = pairs - pairs // 2
    axis[slots:] = 1 + (place[slots:] - slots) * axes // (pairs - slots)
    rank = (axis[None] == axis[:, None]).tril(-1).sum(1)  # of a pair among those of its axis
    share = (axis[None] == axis[:, None]).sum(1)
    return _turns(positions[..., axis] * base ** (-rank / share))


def shifted_rotations(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """RoPE as of text alone, in which the place in a grid shifts every other channel pair.

    Pair j turns by `(slot + shift) base^(-2 j / head_dim)` (Su et al. 2021, arXiv 2104.09864, eq.
    15); the shift is 0 for even j and a place on the grid's axes in turn for odd j, so that all
    axes have fast and slow pairs (after Qwen2-VL's M-RoPE, arXiv 2409.12191, section 2.1).

    Args, Returns: see `rotations`.
    """
    pairs, axes = head_dim // 2, positions.shape[-1] - 1
    place = torch.arange(pairs, device=positions.device)
    axis = torch.where(place % 2 == 0, 0, 1 + place // 2 % axes)
    slot, grid = positions[..., :1], positions[..., 1:]
    places = torch.cat([slot, slot + grid], dim=-1)
    return _turns(places[..., axis] * base ** (-place / pairs))


def _turns(angle: Tensor) -> Tensor:
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle)[:, :, None])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the channel pairs of `[R, S, H, D]` by `rotations`; the dtype stays."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses no complex numbers; else those are faster
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rotation.unbind(-1)
        both = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        return torch.stack(both, dim=-1).flatten(-2).to(x.dtype)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(rotation)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
