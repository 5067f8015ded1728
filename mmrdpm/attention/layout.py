"""The packed layout and the one visibility rule, the whole attention mask.

A row of tokens holds documents one after the other; a document is a sequence of blocks: text runs,
clean image blocks and noisy image blocks. A query sees a key of the same document if

- both are in the same block (causally inside a text run, both ways inside an image block), or
- the key belongs to the context stream (a text run or a clean block) and comes earlier, or
- the query is in a following block, and the key in a noisy block of the same image before it.

Nobody else sees a noisy block from outside. An image's noisy blocks after its first are following
ones; models without history take them as plain noisy ones, see `Layout.without_history`.
`Layout.visible` is this rule, written once; every backend takes a `Layout`, never a mask that its
caller built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(q [R, S, H, D], k, v [R, S, G, D]) -> [R, S, H, D]`."""


class BlockKind(IntEnum):
    """What a block is: decides who sees it and how it sees itself."""

    TEXT = 0  # context, causal inside
    CLEAN = 1  # context, both ways inside
    NOISY = 2  # no context, both ways inside
    FOLLOWING = 3  # as NOISY, and sees the noisy blocks right before it, the image's first included


@dataclass(frozen=True)
class Layout:
    """Where the blocks of `R` packed rows of `S` tokens lie.

    Attributes:
        document_ids: int64 `[R, S]`, -1 on padding, which sees nothing but itself.
        block_ids: int64 `[R, S]`, unique within a row and increasing along it.
        kinds: int64 `[R, S]`, a `BlockKind` each.
    """

    document_ids: Tensor
    block_ids: Tensor
    kinds: Tensor

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device."""
        return Layout(*(t.to(device) for t in (self.document_ids, self.block_ids, self.kinds)))

    def without_history(self) -> Layout:
        """The same blocks, but no noisy one sees another of its image."""
        return replace(self, kinds=self.kinds.clamp(max=int(BlockKind.NOISY)))

    def visible(self) -> Tensor:
        """The rule as a dense mask: bool `[R, query S, key S]`, True = may attend."""
        query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
        index = torch.arange(self.kinds.shape[1], device=self.kinds.device)
        earlier = index[None, :, None] > index[None, None, :]
        itself = index[None, :, None] == index[None, None, :]
        same_document = self.document_ids[query] == self.document_ids[key]
        same_block = self.block_ids[query] == self.block_ids[key]
        both_ways = self.kinds[query] != BlockKind.TEXT
        context = self.kinds[key] < BlockKind.NOISY
        image_ids = self.image_ids()
        history = (self.kinds[query] == BlockKind.FOLLOWING) & (image_ids[query] == image_ids[key])
        inside = same_block & (both_ways | earlier)
        outside = ~same_block & (context | history) & earlier
        on_padding = (self.document_ids < 0)[query] | (self.document_ids < 0)[key]
        return (same_document & ~on_padding & (inside | outside)) | itself

    def image_ids(self) -> Tensor:
        """int64 `[R, S]`, one number for a block and the following blocks behind it."""
        begins = self.block_ids.diff(dim=1, prepend=self.block_ids[:, :1] - 1) != 0
        return (begins & (self.kinds != BlockKind.FOLLOWING)).cumsum(1)
