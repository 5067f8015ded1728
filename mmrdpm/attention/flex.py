"""The `flex` backend: torch's FlexAttention, compiled on CUDA, exact, without scores of all pairs.

The visibility rule is handed over as a function of two places. It is evaluated once a batch on all
pairs, as booleans, to find the blocks of 128 x 128 places that nobody sees, which are skipped. On
the CPU there is no backward pass (torch 2.13), so that it can only look there, not learn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mmrdpm.attention.layout import BlockKind, Layout


def plan(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention under the layout, its block mask made once and shared by all layers."""
    mask, attend = block_mask(layout), _kernel(layout.kinds.device.type)

    def attend_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return attend_here


def block_mask(layout: Layout) -> BlockMask:
    """The rule of `Layout.visible`, place by place, in the library's form."""
    documents, blocks, kinds = layout.document_ids, layout.block_ids, layout.kinds
    rows, length = kinds.shape
    # members of an enum would be traced wrongly
    text, noisy, following = (
        int(kind) for kind in (BlockKind.TEXT, BlockKind.NOISY, BlockKind.FOLLOWING)
    )
    images = layout.images()

    def visible(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = documents[row, query] == documents[row, key]
        same_block = blocks[row, query] == blocks[row, key]
        earlier = query > key
        inside = same_block & ((kinds[row, query] != text) | earlier)
        same_image = images[row, query] == images[row, key]
        history = (kinds[row, query] == following) & same_image
        outside = ~same_block & ((kinds[row, key] < noisy) | history) & earlier
        real = (documents[row, query] >= 0) & (documents[row, key] >= 0)
        return (same_document & real & (inside | outside)) | (query == key)

    return create_block_mask(visible, rows, None, length, length, device=str(kinds.device))


@lru_cache
def _kernel(device: str) -> Callable[..., Any]:
    """Compiled once per process: without it torch writes out all scores."""
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=False) if device == "cuda" else kernel
