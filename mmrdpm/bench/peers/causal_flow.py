"""Transfusion's layout (Zhou et al. 2024, arXiv 2408.11039) on a language model's own blocks.

The caption is read causally, the positions of the picture see it and each other, and predict the
flow. The time of the flow is added to the positions of the picture: `transfusion-pytorch` has
adaptive norms instead, six tenths of the parameters of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from transformers import DynamicCache

from mmrdpm.bench.peers.flow_matching import TRAINING_TIMES, FlowMatching
from mmrdpm.bench.peers.protocol import Caption, Shape
from mmrdpm.bench.peers.qwen import QwenPeer, both_ways

_FREQUENCIES = 256  # sines and cosines of a time, as DiT has them


class CausalFlow(FlowMatching, QwenPeer):
    """The positions of a picture see each other; the caption's keys and values serve all steps."""

    def __init__(self, shape: Shape, text_size: int, grid: tuple[int, int, int]) -> None:
        super().__init__(shape, text_size, inputs=0, positions=grid[0] * grid[1])
        self.grid, self.tokens, self.steps = grid, grid[0] * grid[1], shape.steps
        self.from_latents = nn.Linear(grid[2], shape.width, bias=False)
        self.waves = Timesteps(_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(_FREQUENCIES, shape.width)
        self.to_velocity = nn.Linear(shape.width, grid[2])
        nn.init.zeros_(self.to_velocity.weight)

    def condition(self, captions: Sequence[Caption]) -> tuple[DynamicCache, Tensor]:
        """Keys and values of captions, and who is seen by the picture, bool `[B, 1, N, L + N]`."""
        prompt, real = self.prompt(captions)
        cache = DynamicCache()
        self.run(prompt, real.long(), cache)
        return cache, both_ways(real, self.tokens, queries=self.tokens)

    def velocity(
        self, states: Tensor, sigma: Tensor, condition: tuple[DynamicCache, Tensor]
    ) -> Tensor:
        cache, seen = condition
        time = self.time(self.waves(sigma * TRAINING_TIMES))[:, None]
        inputs = self.from_latents(states.flatten(1, 2)) + self.places.weight + time
        hidden = self.run(inputs, seen, cache)
        cache.crop(-self.tokens)
        return self.to_velocity(hidden).float().unflatten(1, self.grid[:2])
