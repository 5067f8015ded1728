"""Latent flow matching (Lipman et al. 2023, arXiv 2210.02747) by a diffusion transformer.

The network is diffusers' PixArt (Chen et al. 2023, arXiv 2310.00426): a DiT with one shared
adaptive norm and cross-attention to the caption. Times are drawn as in Esser et al. 2024 (arXiv
2403.03206, eq. 19 with m = 0 and s = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from mmrdpm.bench.peers.llama import with_and_without
from mmrdpm.bench.peers.protocol import Batch, Caption, How, Peer, Shape, guided, left_padded
from mmrdpm.errors import RecipeError

_LONGEST = 64  # places of a caption
_TRAINING_TIMES = 1000  # what the library calls time 1


class Flow(Peer):
    """Predicts the velocity `eps - z_0` at `(1 - sigma) z_0 + sigma eps`."""

    stack = ("network.transformer_blocks.",)
    draws_codes = False

    def __init__(self, shape: Shape, text_size: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        if shape.ffn != 4 * shape.width:
            raise RecipeError(
                f"flow.ffn is {shape.ffn}: the library's blocks have 4 * width = {4 * shape.width}"
            )
        side, _, channels = self.grid = grid
        self.tokens, self.steps, self.first = side * side, shape.steps, text_size
        self.table = nn.Embedding(text_size + 1, shape.width)
        self.places = nn.Embedding(_LONGEST, shape.width)
        self.network: Any = PixArtTransformer2DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.width // shape.heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=shape.layers,
            cross_attention_dim=shape.width,
            caption_channels=shape.width,
            sample_size=side,
            patch_size=1,
        )

    def velocity(self, states: Tensor, sigma: Tensor, captions: Sequence[Caption]) -> Tensor:
        """The network at states `[B, h, w, C]` and noise levels `[B]` in [0, 1].

        The token that begins a caption stands for an empty one alone: the library does not
        normalise the queries to captions, and where all captions shared a token, attention settled
        on it for good.
        """
        ids, real = left_padded(captions, self.first, self.device)
        empty = torch.tensor([not caption for caption in captions], device=self.device)
        real = real & ((ids != self.first) | empty[:, None])
        place = real.cumsum(1) - 1
        text = self.table(ids) + self.places(place.clamp(0, _LONGEST - 1))
        (output,) = self.network(
            states.permute(0, 3, 1, 2),
            encoder_hidden_states=text,
            encoder_attention_mask=real,
            timestep=sigma * _TRAINING_TIMES,
            return_dict=False,
        )
        return output.float().permute(0, 2, 3, 1)

    def loss(self, batch: Batch) -> Tensor:
        latents = batch.latents.to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        sigma = torch.randn(len(latents)).sigmoid().to(self.device)
        states = torch.lerp(latents, noise, sigma[:, None, None, None])
        return mse_loss(self.velocity(states, sigma, batch.captions), noise - latents)

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TRAINING_TIMES)
        scheduler.set_timesteps(how.steps, device=self.device)
        states = torch.randn(len(captions), *self.grid).to(self.device)
        both = with_and_without(captions)
        for timestep in scheduler.timesteps:
            sigma = (timestep / _TRAINING_TIMES).expand(len(both))
            velocity = self.velocity(states.repeat(2, 1, 1, 1), sigma, both)
            velocity = guided(velocity, how.guidance_scale)
            states = scheduler.step(velocity, timestep, states, return_dict=False)[0]
        return states
