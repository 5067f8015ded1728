"""Raster autoregressive image tokens (LlamaGen, Sun et al. 2024, arXiv 2406.06525).

A picture is one row of codes, place after place, all levels of a place before the next one
(RQ-Transformer); each code is predicted from all before it, and drawn with a key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.protocol import Batch, Caption, How, Shape, guided, with_and_without
from mmrdpm.bench.peers.qwen import CodePeer, drawn


class Raster(CodePeer):
    """One forward pass per code."""

    def __init__(self, shape: Shape, text_size: int, codes: ResidualCodes) -> None:
        super().__init__(shape, text_size, codes, inputs=codes.codebook.size)
        self.steps = (self.tokens,)

    def row(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes per level `[B, N]` -> one row `[B, N * levels]`."""
        return torch.stack(tuple(codes), dim=-1).flatten(1)

    def levels(self, row: Tensor) -> list[Tensor]:
        """The inverse of `row`."""
        return list(row.unflatten(1, (-1, len(self.codes.sides))).unbind(-1))

    def embed(self, row: Tensor, place: int = 0) -> Tensor:
        """Codes of a row that begins at a place."""
        places = self.places(torch.arange(place, place + row.shape[1], device=row.device))
        return self.table(self.code_offset + row) + places

    def loss(self, batch: Batch) -> Tensor:
        with self.exact():
            row = self.row(self.codes.encode(batch.latents.to(self.device)))
        prompt, real = self.prompt(batch.captions)
        inputs = torch.cat([prompt, self.embed(row[:, :-1])], dim=1)
        seen = torch.cat([real, real.new_ones(row[:, :-1].shape)], dim=1)
        hidden = self.run(inputs, seen.long())[:, prompt.shape[1] - 1 :]
        return cross_entropy(self.head(hidden).float().flatten(0, 1), row.flatten())

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        inputs, seen = self.prompt(with_and_without(captions))
        cache, codes = DynamicCache(), []
        for place in range(self.tokens):
            hidden = self.run(inputs, seen.long(), cache)[:, -1]
            logits = guided(self.head(hidden).float(), how.guidance_scale)
            codes.append(drawn(logits, how))
            inputs = self.embed(codes[-1].repeat(2)[:, None], place)
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        return self.codes.partial(self.levels(torch.stack(codes, dim=1)))
