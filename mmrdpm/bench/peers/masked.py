"""Masked-token generation (MaskGIT, Chang et al. 2022, arXiv 2202.04200).

A random share of the codes is masked, by the cosine schedule, and predicted from the rest and the
caption, all attending both ways; drawing unmasks the surest ones first, by diffusers' scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AmusedScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.llama import LlamaPeer, with_and_without
from mmrdpm.bench.peers.protocol import Batch, Caption, How, Shape, guided


class Masked(LlamaPeer):
    """All codes of a picture at once, step by step fewer masked."""

    def __init__(self, shape: Shape, text_size: int, codes: ResidualCodes) -> None:
        super().__init__(shape, text_size, codes, inputs=codes.codebook.size + 1)
        self.steps = shape.steps

    def logits(self, captions: Sequence[Caption], codes: Tensor) -> Tensor:
        """Scores `[B, N, K]` for codes `[B, N]`, where K marks a masked one."""
        prompt, real = self.prompt(captions)
        places = self.places(torch.arange(self.tokens, device=codes.device))
        inputs = torch.cat([prompt, self.table(self.code_offset + codes) + places], dim=1)
        seen = torch.cat([real, real.new_ones(codes.shape)], dim=1)
        mask = seen[:, None, None, :].expand(-1, 1, inputs.shape[1], -1)
        return self.head(self.run(inputs, mask)[:, prompt.shape[1] :]).float()

    def loss(self, batch: Batch) -> Tensor:
        with self.exact():
            codes = torch.cat(self.codes.encode(batch.latents.to(self.device)), dim=1)
        share = torch.cos(math.pi / 2 * torch.rand(len(codes), 1))
        count = (share * self.tokens).ceil().clamp(min=1)
        order = torch.rand(codes.shape).argsort(dim=1).argsort(dim=1)
        masked = (order < count).to(codes.device)
        inputs = torch.where(masked, self.codes.codebook.size, codes)
        logits = self.logits(batch.captions, inputs)
        return cross_entropy(logits[masked], codes[masked])

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        assert how.temperature is not None
        scheduler: Any = AmusedScheduler(mask_token_id=self.codes.codebook.size)
        scheduler.set_timesteps(how.steps, device=self.device)
        codes = torch.full((len(captions), self.tokens), self.codes.codebook.size)
        codes = codes.to(self.device)
        both = with_and_without(captions)
        for timestep in scheduler.timesteps:
            logits = guided(self.logits(both, codes.repeat(2, 1)), how.guidance_scale)
            codes = scheduler.step(logits / how.temperature, timestep, codes).prev_sample
        return self.codes.partial(codes.split(self.codes.lengths, dim=1))
