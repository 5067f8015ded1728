"""The `xformers` backend: memory-efficient attention on CUDA, exact, without a dense mask.

Queries are split by kind. The tokens of a text run see their earlier context and, causally, their
run; the positions of an image block see their earlier context, their history if they have one, and
all of their block. For every block the keys that it may see are gathered behind each other, its own
last, so that both kinds become block-diagonal biases of the library, with a backward of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrdpm.attention.layout import Attend, BlockKind, Layout


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
    rows, length = layout.kinds.shape
    kinds = layout.kinds.flatten()
    real = layout.document_ids.flatten() >= 0
    starts_document = _changes(layout.document_ids)
    starts_block = starts_document | _changes(layout.block_ids)
    place = torch.arange(rows * length)
    documents = torch.where(starts_document, place, 0).cummax(0).values  # where each one begins
    starts_image = starts_document | (starts_block & (kinds != BlockKind.FOLLOWING))
    images = torch.where(starts_image, place, 0).cummax(0).values

    starts = (starts_block & real).nonzero().flatten()
    (bounds,) = starts_block.nonzero(as_tuple=True)
    ends = torch.cat([bounds[1:], bounds.new_tensor([rows * length])])[real[bounds]]
    follows = kinds[starts] == BlockKind.FOLLOWING
    context, before = _listed(real & (kinds < BlockKind.NOISY))
    noisy, noisy_before = _listed(real & (kinds >= BlockKind.NOISY))
    # what a block sees is three stretches: of all context, of all noisy tokens, and itself
    listed = torch.cat([context, noisy, place])
    begins = torch.stack(
        [
            before[documents[starts]],
            len(context) + noisy_before[images[starts]],
            len(context) + len(noisy) + starts,
        ],
        dim=1,
    )
    lengths = torch.stack(
        [
            before[starts] - before[documents[starts]],
            torch.where(follows, noisy_before[starts] - noisy_before[images[starts]], 0),
            ends - starts,
        ],
        dim=1,
    )
    made = []
    for causal in (True, False):
        chosen = (kinds[starts] == BlockKind.TEXT) == causal
        if chosen.any():
            own, seen = lengths[chosen, 2], lengths[chosen]
            queries = _stretches(starts[chosen], own)
            keys = listed[_stretches(begins[chosen].flatten(), seen.flatten())]
            made.append(Part(queries, keys, own.tolist(), seen.sum(1).tolist(), causal))
    return made


def _changes(ids: Tensor) -> Tensor:
    """bool `[R * S]`: where a row begins or the number differs from the one before."""
    return (ids.diff(dim=1, prepend=ids[:, :1] - 1) != 0).flatten()


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the chosen tokens, and for each token how many of them come before it."""
    return chosen.nonzero().flatten(), chosen.cumsum(0) - chosen.long()


def _stretches(begins: Tensor, lengths: Tensor) -> Tensor:
    """`begin, begin + 1, ...` of each stretch, one stretch behind the other."""
    offsets = begins - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def plan(layout: Layout) -> Attend:
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
