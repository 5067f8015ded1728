"""Latent flow matching by a diffusion transformer.

The network is diffusers' PixArt (Chen et al. 2023, arXiv 2310.00426): a DiT with one shared
adaptive norm and cross-attention to the caption, and norms of queries and keys as in Esser et al.
2024 (arXiv 2403.03206, section 5.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from mmrdpm.bench.peers.flow_matching import TRAINING_TIMES, FlowMatching
from mmrdpm.bench.peers.protocol import Caption, Shape, left_padded
from mmrdpm.errors import RecipeError

_LONGEST = 64  # places of a caption


class Flow(FlowMatching):
    """The positions of a picture are the row; its caption is looked at from every block."""

    stack = ("network.transformer_blocks.",)

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
        head = shape.width // shape.heads
        network: Any = PixArtTransformer2DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=channels,
            num_layers=shape.layers,
            cross_attention_dim=shape.width,
            caption_channels=shape.width,
            sample_size=side,
            patch_size=1,
        )
        outputs = [network.proj_out]
        for block in network.transformer_blocks:
            outputs += [block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]]
            for attention in (block.attn1, block.attn2):
                attention.norm_q, attention.norm_k = RMSNorm(head, 1e-6), RMSNorm(head, 1e-6)
        for linear in outputs:  # blocks that add nothing, as all peers' and ours
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.network = network

    def condition(self, captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """Embedded captions `[B, L, width]` and bool `[B, L]`, False where nothing is looked at.

        The token that begins a caption stands for an empty one alone: where all captions shared a
        token and queries had no norm, attention settled on it for good.
        """
        ids, real = left_padded(captions, self.first, self.device)
        empty = torch.tensor([not caption for caption in captions], device=self.device)
        real = real & ((ids != self.first) | empty[:, None])
        place = real.cumsum(1) - 1
        return self.table(ids) + self.places(place.clamp(0, _LONGEST - 1)), real

    def velocity(self, states: Tensor, sigma: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        text, real = condition
        (output,) = self.network(
            states.permute(0, 3, 1, 2),
            encoder_hidden_states=text,
            encoder_attention_mask=real,
            timestep=sigma * TRAINING_TIMES,
            return_dict=False,
        )
        return output.float().permute(0, 2, 3, 1)
