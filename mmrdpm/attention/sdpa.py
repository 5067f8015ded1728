"""The `sdpa` backend: torch's scaled dot product attention under the dense mask.

Runs on any device, with a backward; the reference that the other backends are tested against.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmrdpm.attention.layout import Layout


def plan(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention under the layout's dense mask, made once and shared by all layers."""
    visible = layout.visible()[:, None]  # [R, 1, S, S]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k, v, visible)

    return attend


def masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q `[R, S, H, D]`, k and v `[R, K, G, D]`, mask bool `[R, 1, S, K]` -> `[R, S, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, visible, enable_gqa=grouped).transpose(1, 2)
