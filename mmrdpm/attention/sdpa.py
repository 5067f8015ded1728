"""The `sdpa` backend: scaled dot product attention under the dense mask.

Runs on any device, with a backward; the reference that the other backends are tested against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmrdpm.attention.layout import Layout


def plan(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention under the layout's dense mask, made once and shared by all layers."""
    visible = layout.visible()[:, None]  # [R, 1, S, S]
    if visible.device.type != "cpu":
        return lambda q, k, v: masked(q, k, v, visible)
    bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    return lambda q, k, v: written_out(q, k, v, bias)


def masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q `[R, S, H, D]`, k and v `[R, K, G, D]`, mask bool `[R, 1, S, K]` -> `[R, S, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, visible, enable_gqa=grouped).transpose(1, 2)


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As `masked`, but with a bias to add to the scores, 0 or minus infinity.

    torch's fused CPU kernel has a slow backward under a mask: written out, forward and backward
    of rows of 256 tokens took half the time.
    """
    groups = k.shape[2]
    q = (q * q.shape[-1] ** -0.5).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    k, v = k.permute(0, 2, 3, 1)[:, :, None], v.transpose(1, 2)[:, :, None]
    scores = q @ k  # [R, G, H / G, S, K]
    weights = (scores + bias[:, :, None].to(scores.dtype)).softmax(-1)
    return (weights.to(v.dtype) @ v).permute(0, 3, 1, 2, 4).flatten(2, 3)
