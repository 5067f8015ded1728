"""Next-scale prediction (VAR, Tian et al. 2024, arXiv 2404.02905).

All codes of a scale are predicted at once from the caption and the picture as the scales before
tell it; attention is causal from scale to scale and goes both ways inside one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.protocol import Batch, Caption, How, Shape, guided, with_and_without
from mmrdpm.bench.peers.qwen import CodePeer, drawn, prefix_mask


class Scales(CodePeer):
    """One forward pass per scale.

    Attributes:
        blocks: int64 `[N]`, the scale of each image position, 0 first.
    """

    blocks: Tensor

    def __init__(self, shape: Shape, text_size: int, codes: ResidualCodes) -> None:
        super().__init__(shape, text_size, codes, inputs=0)  # it reads latents
        self.steps = (len(codes.sides),)
        self.from_latents = nn.Linear(codes.codebook.codes.shape[-1], shape.width, bias=False)
        lengths = torch.tensor(codes.lengths)
        self.register_buffer("blocks", torch.arange(len(lengths)).repeat_interleave(lengths))

    def embed(self, before: Tensor | None, level: int, batch: int) -> Tensor:
        """The inputs of a level: the latents of the levels before, at its size, and its places."""
        places = self.places(torch.where(self.blocks == level - 1)[0])[None]
        if before is None:
            return places.expand(batch, -1, -1)
        return self.from_latents(self.codes.coarse(before, level)) + places

    def loss(self, batch: Batch) -> Tensor:
        with self.exact():
            codes = self.codes.encode(batch.latents.to(self.device))
        inputs = [self.embed(None, 1, len(codes[0]))]
        for level in range(2, len(codes) + 1):
            before = self.codes.partial(codes[: level - 1])
            inputs.append(self.embed(before, level, len(before)))
        prompt, real = self.prompt(batch.captions)
        hidden = self.run(torch.cat([prompt, *inputs], dim=1), prefix_mask(real, self.blocks))
        logits = self.head(hidden[:, prompt.shape[1] :]).float()
        return cross_entropy(logits.flatten(0, 1), torch.cat(codes, dim=1).flatten())

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        prompt, real = self.prompt(with_and_without(captions))
        whole = prefix_mask(real, self.blocks)
        cache, codes = DynamicCache(), []
        text = prompt.shape[1]
        self.run(prompt, whole[..., :text, :text], cache)
        start, before = text, None
        for level, length in enumerate(self.codes.lengths, 1):
            inputs = self.embed(before, level, len(prompt))
            end = start + length
            hidden = self.run(inputs, whole[..., start:end, :end], cache)
            logits = guided(self.head(hidden).float(), how.guidance_scale)
            codes.append(drawn(logits, how))
            before, start = self.codes.partial(codes).repeat(2, 1, 1, 1), end
        return self.codes.partial(codes)
