"""The `flex` backend: torch's FlexAttention, compiled on CUDA, exact, without scores of all pairs.

The rule is evaluated once a batch on all pairs, as booleans, to find the blocks of 128 x 128 places
that nobody sees, which are skipped; where some are seen and some not, the kernel reads the
booleans. On the CPU there is no backward pass (torch 2.13), so that it can only look there, not
learn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmrdpm.attention.layout import Attend, Layout

MIN_HEAD_DIM = 16  # of the library's kernels
_BLOCK = 128  # places, as the library's own masks have
_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}  # its decoding kernel fails on some short rows


def plan(layout: Layout) -> Attend:
    """Attention under the layout, its block mask made once and shared by all layers."""
    mask, attend = block_mask(layout), _kernel(layout.kinds.device.type)

    def attend_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=_OPTIONS)
        return out.transpose(1, 2)

    return attend_here


def block_mask(layout: Layout) -> BlockMask:
    """`Layout.visible` in the library's form.

    The library's `create_block_mask` gives the same, but evaluates the rule as a function of two
    places, ten times slower.
    """
    visible = layout.visible()
    length = visible.shape[1]
    short = -length % _BLOCK
    whole = torch.nn.functional.pad(visible, (0, short, 0, short))
    tiles = whole.unflatten(2, (-1, _BLOCK)).unflatten(1, (-1, _BLOCK))  # [R, q, 128, k, 128]
    seen = tiles.sum((2, 4), dtype=torch.int32)[:, None]
    everything = seen == _BLOCK**2
    some = (seen > 0) & ~everything

    def allowed(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole[row, query, key]

    return BlockMask.from_kv_blocks(
        *_ordered(some),
        *_ordered(everything),
        BLOCK_SIZE=_BLOCK,
        mask_mod=allowed,
        seq_lengths=(length, length),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their places, those it has first: int32."""
    places = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), places.int()


@lru_cache
def _kernel(device: str) -> Callable[..., Any]:
    """Compiled once per process: without it torch writes out all scores."""
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=False) if device == "cuda" else kernel
