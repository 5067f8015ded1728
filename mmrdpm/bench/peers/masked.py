"""Masked-token generation (MaskGIT, Chang et al. 2022, arXiv 2202.04200).

A random share of the codes is masked, by the cosine schedule, and predicted from the rest and the
caption, all attending both ways; drawing unmasks the surest ones first, by diffusers' scheduler.
All levels of a place are one position of the stack, joined before it and taken apart behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AmusedScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.protocol import Batch, Caption, How, Shape, guided, with_and_without
from mmrdpm.bench.peers.qwen import CodePeer, both_ways


class Masked(CodePeer):
    """All codes of a picture at once, step by step fewer masked."""

    def __init__(self, shape: Shape, text_size: int, codes: ResidualCodes) -> None:
        size, places = codes.codebook.size, codes.lengths[0]
        super().__init__(shape, text_size, codes, inputs=size + 1, positions=places)
        self.steps = shape.steps
        joined = shape.width * len(codes.lengths)
        self.join = nn.Linear(joined, shape.width, bias=False)
        self.split = nn.Linear(shape.width, joined, bias=False)
        for linear in (self.join, self.split):  # variance 1 in, variance 1 out
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def hidden(self, captions: Sequence[Caption], codes: Tensor) -> Tensor:
        """Vectors `[B, levels * N, width]` for codes `[B, levels * N]`, K marks a masked one."""
        prompt, real = self.prompt(captions)
        levels = self.table(self.code_offset + codes).unflatten(1, (-1, self.codes.lengths[0]))
        image = self.join(levels.transpose(1, 2).flatten(2)) + self.places.weight
        inputs = torch.cat([prompt, image], dim=1)
        mask = both_ways(real, image.shape[1], queries=inputs.shape[1])
        hidden = self.split(self.run(inputs, mask)[:, prompt.shape[1] :])
        return hidden.unflatten(2, (len(self.codes.lengths), -1)).transpose(1, 2).flatten(1, 2)

    def loss(self, batch: Batch) -> Tensor:
        with self.exact():
            codes = torch.cat(self.codes.encode(batch.latents.to(self.device)), dim=1)
        share = torch.cos(math.pi / 2 * torch.rand(len(codes), 1))
        count = (share * self.tokens).ceil().clamp(min=1)
        order = torch.rand(codes.shape).argsort(dim=1).argsort(dim=1)
        masked = (order < count).to(codes.device)
        inputs = torch.where(masked, self.codes.codebook.size, codes)
        hidden = self.hidden(batch.captions, inputs)
        return cross_entropy(self.head(hidden[masked]).float(), codes[masked])

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        scheduler: Any = AmusedScheduler(mask_token_id=self.codes.codebook.size)
        scheduler.set_timesteps(how.steps, device=self.device)
        codes = torch.full((len(captions), self.tokens), self.codes.codebook.size)
        codes = codes.to(self.device)
        both = with_and_without(captions)
        for timestep in scheduler.timesteps:
            logits = self.head(self.hidden(both, codes.repeat(2, 1))).float()
            logits = guided(logits, how.guidance_scale)
            codes = scheduler.step(logits / how.warmth, timestep, codes).prev_sample
        return self.codes.partial(codes.split(self.codes.lengths, dim=1))
