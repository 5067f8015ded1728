"""The one transformer: text and image positions through the same stack.

Design choices: pre-norm RMSNorm without weights; SwiGLU; QK-norm; grouped-query attention; no
biases; RoPE over (slot, place in the grid); one table both embeds token ids and scores all of the
shared vocabulary; image positions enter by one linear map of `(x_t, x_T)` plus an embedding of t;
projections that write to the residual stream start at zero, so that the stack starts as identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from mmrdpm.attention import sdpa
from mmrdpm.attention.layout import Layout
from mmrdpm.document import Packed, with_history
from mmrdpm.errors import RecipeError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q [R, S, H, D], k, v [R, S, G, D]) -> [R, S, H, D]`."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the stack; vocabulary and latents come from the tokenizers.

    Attributes:
        heads, kv_heads: queries and shared keys and values; `kv_heads` divides `heads`.
        ffn: hidden width of the SwiGLU feed-forward.
        sees_start_noise: whether image positions enter with `x_T` beside `x_t`.
        history: whether a noisy block sees those of its image's earlier steps. Drawing shows all
            of them: learn all timesteps of an image at once, `data.steps_per_image` = T.
    """

    layers: int = field(default=6, metadata={"min": 1})
    width: int = field(default=256, metadata={"min": 8})
    heads: int = field(default=4, metadata={"min": 1})
    kv_heads: int = field(default=4, metadata={"min": 1})
    ffn: int = field(default=704, metadata={"min": 8})
    sees_start_noise: bool = True
    history: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads or self.head_dim % 2:
            raise RecipeError(
                f"model: heads ({self.heads}) must divide width ({self.width}) into even parts, and"
                f" kv_heads ({self.kv_heads}) must divide heads"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        all_heads = config.heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.width, all_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        return self.out(attend(*self.project(x, rotation)).flatten(-2))

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[R, S, width]` -> turned q `[R, S, H, D]` and k, and v, `[R, S, G, D]`."""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=-2)
        q, k = rotate(rms_norm(qk, (self.head_dim,)), rotation).split((heads, kv_heads), dim=-2)
        return q, k, v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Transformer(nn.Module):
    """Packed rows in, logits over the shared vocabulary out."""

    def __init__(
        self, config: TransformerConfig, vocab_size: int, latent_channels: int, num_timesteps: int
    ) -> None:
        super().__init__()
        self.config = config
        self.plan: Callable[[Layout], Callable[..., Tensor]] = sdpa.plan  # a run may choose another
        self.recompute = False  # whether layers are computed anew in the backward pass
        self.table = nn.Embedding(vocab_size, config.width)
        seen = 2 * latent_channels if config.sees_start_noise else latent_channels
        self.from_latents = nn.Linear(seen, config.width, bias=False)
        self.timesteps = nn.Embedding(num_timesteps + 1, config.width)
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.layers))
        self.feed_forwards = nn.ModuleList(FeedForward(config) for _ in range(config.layers))
        self.reset()

    def reset(self) -> None:
        """The whole initialisation."""
        for name, parameter in self.named_parameters():
            initialise(name, parameter)

    def forward(self, packed: Packed) -> Tensor:
        """Packed rows -> hidden states `[R, S, width]`; `logits` scores them."""
        if self.config.history:
            packed = with_history(packed)
        attend = self.plan(packed.layout)
        x = self.embed(packed.token_ids, packed.latents, packed.timesteps)
        return self.run(x, packed.positions, lambda _, q, k, v: attend(q, k, v))

    def embed(self, token_ids: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """One vector per position, `[R, S, width]`, of unit mean square."""
        seen = latents[..., : self.from_latents.in_features]  # x_t first, then x_T
        image = self.from_latents(seen) + self.timesteps(timesteps.clamp(min=0))
        text = self.table(token_ids)
        mixed = torch.where((timesteps >= 0)[..., None], image.to(text.dtype), text)
        return rms_norm(mixed, (self.config.width,))

    def run(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The stack on embedded positions; `attend` may keep keys and values per layer."""
        rotation = rotations(positions, self.config.head_dim)
        for index in range(self.config.layers):
            x = self.once_or_twice(self.layer, index, x, rotation, attend)
        return rms_norm(x, (self.config.width,))

    def layer(self, index: int, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        """One layer of the stack: attention and feed-forward, each beside the residual stream."""
        width = (self.config.width,)
        x = x + self.attentions[index](rms_norm(x, width), rotation, partial(attend, index))
        return x + self.feed_forwards[index](rms_norm(x, width))

    def once_or_twice(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function; with `recompute` its backward pass calls it again, to save memory."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def compile_layers(self) -> None:
        """Fuses what lies between attention's kernels; the names of parameters stay."""
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            attention.project = torch.compile(attention.project, dynamic=False)  # type: ignore
            feed_forward.compile(dynamic=False)

    def logits(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """Hidden states `[..., width]` -> scores of token ids `[..., V]`, or only of some."""
        return linear(hidden, self.table.weight[ids])


@torch.no_grad()
def initialise(name: str, parameter: Tensor) -> None:
    """Draws one parameter, by its name, from torch's global generator."""
    if name.endswith(("out.weight", "down.weight")):
        nn.init.zeros_(parameter)
    elif name.startswith(("table", "timesteps")):
        nn.init.normal_(parameter, std=0.02)
    else:
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def rotations(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """RoPE (Su et al. 2021, arXiv 2104.09864, eq. 15) over several axes at once.

    Half of the channel pairs turn with the slot, the rest is shared evenly by the grid's axes.

    Args:
        positions: int64 `[R, S, A]`, slot first.

    Returns:
        complex64 `[R, S, 1, head_dim / 2]`, one unit rotation per channel pair.
    """
    pairs, axes = head_dim // 2, positions.shape[-1] - 1
    axis = torch.zeros(pairs, dtype=torch.int64, device=positions.device)
    place = torch.arange(pairs, device=positions.device)
    slots = pairs - pairs // 2
    axis[slots:] = 1 + (place[slots:] - slots) * axes // (pairs - slots)
    rank = (axis[None] == axis[:, None]).tril(-1).sum(1)  # of a pair among those of its axis
    share = (axis[None] == axis[:, None]).sum(1)
    frequency = base ** (-rank / share)
    angle = positions[..., axis] * frequency
    return torch.polar(torch.ones_like(angle), angle)[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the channel pairs of `[R, S, H, D]`; the dtype stays."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
