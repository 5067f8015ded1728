"""The `xformers` backend: memory-efficient attention on CUDA, exact, without a dense mask.

Queries are split by kind. The tokens of a text run see their earlier context and, causally, their
run; the positions of an image block see their earlier context, their history if they have one, and
all of their block. For every block the keys that it may see are gathered behind each other, its own
last, so that both kinds become block-diagonal biases of the library, with a backward of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmrdpm.attention.layout import BlockKind, Layout


@dataclass(frozen=True)
class Part:
    """The blocks of one kind.

    Attributes:
        queries, keys: int64, places in the flattened rows; a key seen by several blocks comes
            once for each.
        query_lengths, key_lengths: how many of each belong to each block.
        causal: whether a block's own tokens, its last keys, are seen causally.
    """

    queries: Tensor
    keys: Tensor
    query_lengths: list[int]
    key_lengths: list[int]
    causal: bool

    def bias(self) -> Any:
        """The library's bias: block j of the queries sees block j of the keys."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        mask = BlockDiagonalMask.from_seqlens(self.query_lengths, self.key_lengths)
        return mask.make_causal_from_bottomright() if self.causal else mask


def parts(layout: Layout) -> list[Part]:
    """Text runs and image blocks of a layout on the CPU, without padding and empty parts."""
    text: tuple[list[Tensor], list[Tensor]] = ([], [])
    image: tuple[list[Tensor], list[Tensor]] = ([], [])
    rows, length = layout.kinds.shape
    for row in range(rows):
        change = layout.block_ids[row].diff().nonzero().flatten() + 1
        bounds = [0, *change.tolist(), length]
        context: list[Tensor] = []
        history: list[Tensor] = []  # the noisy blocks of the image at hand
        document = -1
        for start, end in pairwise(bounds):
            if layout.document_ids[row, start] < 0:
                continue
            if layout.document_ids[row, start] != document:
                context, history = [], []
                document = int(layout.document_ids[row, start])
            own = torch.arange(start, end) + row * length
            kind = layout.kinds[row, start]
            history = history if kind == BlockKind.FOLLOWING else []
            queries, keys = text if kind == BlockKind.TEXT else image
            queries.append(own)
            keys.append(torch.cat([*context, *history, own]))
            (context if kind < BlockKind.NOISY else history).append(own)
    return [
        Part(torch.cat(q), torch.cat(k), [*map(len, q)], [*map(len, k)], causal)
        for (q, k), causal in ((text, True), (image, False))
        if q
    ]


def plan(layout: Layout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention under the layout, its parts made once and shared by all layers.

    Padding gets zeros.
    """
    from xformers.ops import memory_efficient_attention

    device = layout.kinds.device
    planned = [
        (part.queries.to(device), part.keys.to(device), part.bias())
        for part in parts(layout.to("cpu"))
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        out = torch.zeros_like(flat_q)
        for queries, keys, bias in planned:
            # index_select's backward adds in place, that of indexing sorts first
            chosen_k, chosen_v = (
                x.index_select(0, keys).repeat_interleave(groups, dim=1)[None]
                for x in (flat_k, flat_v)
            )
            chosen_q = flat_q.index_select(0, queries)[None]
            seen = memory_efficient_attention(chosen_q, chosen_k, chosen_v, bias)
            out = out.index_copy(0, queries, seen[0])
        return out.view_as(q)

    return attend
