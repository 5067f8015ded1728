"""The one transformer: text and image positions through the same stack.

Design choices: pre-norm RMSNorm without weights; SwiGLU; QK-norm; grouped-query attention; no
biases; RoPE over (slot, place in the grid); one table both embeds token ids and scores all of the
shared vocabulary, where `code_geometry` adds to the score of an image code; image positions enter
by one linear map of `(x_t, x_T)` plus an embedding of t; projections that write to the residual
stream start at zero, so that the stack starts as identity. The keys from `attention_width` on
differ from that as a language model does, see `language_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from mmrdpm.attention import sdpa
from mmrdpm.attention.layout import Attend, Layout
from mmrdpm.document import Packed
from mmrdpm.errors import RecipeError
from mmrdpm.positions import rotate, rotations, shifted_rotations, sinusoids

# parameters that begin at zero: what writes to the residual stream, and parts of codes' scores
_ZERO = ("out.weight", "down.weight", "from_codes.weight", "precision.weight", "precisions.weight")

AttendInLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q [R, S, H, D], k, v [R, S, G, D]) -> [R, S, H, D]`."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the stack; vocabulary and latents come from the tokenizers.

    Attributes:
        heads, kv_heads: queries and shared keys and values; `kv_heads` divides `heads`.
        ffn: hidden width of the SwiGLU feed-forward.
        sees_start_noise: whether image positions enter with `x_T` beside `x_t`.
        noise_pool: how many noises images begin with, the same ones for all; 0 is a new one every
            time. The fewer, the sooner codes are learned by heart; drawing codes gives variety.
        history: whether a noisy block sees those of its image's earlier steps. Drawing shows all
            of them: learn all timesteps of an image at once, `data.steps_per_image` = T.
        code_geometry: whether the score of an image code has, beside its row of the table, a part
            that is linear in the code's vector and its squared length, as `-||r - e_k||^2` is:
            codes that lie near each other then score alike from the start.
        preconditioning: whether image positions enter with the guess of `z_0` that `(x_t, x_T)`
            make, in place of both, and the scores of codes begin from their guess of the residual,
            as sharply as the network says. Without `sees_start_noise` the guesses are of `x_t`
            alone. Needs `code_geometry`, see `estimates`.
        places: whether image positions enter with sines of their place in the grid, which RoPE
            shows only between two. Needs `norm_inputs`.
        init_from: weights to begin with, see `pretrained`: a language model's folder or hub id, or
            an earlier run. The shape is then that model's and can be left out.
        attention_width: of all queries of a position together; 0 is `width`.
        norm_weights: whether norms, those of queries and keys too, scale each channel.
        norm_eps: what norms add to the mean square; None is the machine epsilon.
        norm_inputs: whether positions enter the stack with a mean square of 1.
        rope: `split` has channel pairs of its own for each axis, every axis at all frequencies;
            `shifted` turns all pairs by the slot, as for text alone, and every other pair by the
            place in the grid besides.
        rope_base: the longest wavelength is nearly `2 pi rope_base` positions.
        tied: whether the table that embeds token ids also scores them.
    """

    layers: int = field(default=6, metadata={"min": 1, "max": 1000})
    width: int = field(default=256, metadata={"min": 8})
    heads: int = field(default=4, metadata={"min": 1})
    kv_heads: int = field(default=4, metadata={"min": 1})
    ffn: int = field(default=704, metadata={"min": 8})
    sees_start_noise: bool = True
    noise_pool: int = field(default=0, metadata={"min": 0})
    history: bool = False
    code_geometry: bool = False
    preconditioning: bool = False
    places: bool = False
    init_from: str = ""
    attention_width: int = field(default=0, metadata={"min": 0})
    norm_weights: bool = False
    norm_eps: float | None = field(default=None, metadata={"min": 0.0})
    norm_inputs: bool = True
    rope: Literal["split", "shifted"] = "split"
    rope_base: float = field(default=10_000.0, metadata={"min": 1.0})
    tied: bool = True

    def __post_init__(self) -> None:
        width = self.attention_width or self.width
        if width % self.heads or self.heads % self.kv_heads:
            name = "attention_width" if self.attention_width else "width"
            raise RecipeError(
                f"model: heads ({self.heads}) must divide {name} ({width}), and kv_heads"
                f" ({self.kv_heads}) must divide heads"
            )
        if self.head_dim % 2:
            raise RecipeError(
                f"model: a head has {self.head_dim} channels, but RoPE turns them in pairs: change"
                " width or heads"
            )
        if self.head_dim < 8 and not self.init_from:  # of a language model it is as it is
            raise RecipeError(
                f"model: a head has {self.head_dim} channels, but RoPE needs 8 to tell slots, rows"
                " and columns apart: raise width or lower heads"
            )
        if self.places and not self.norm_inputs:
            raise RecipeError(
                "model.places adds sinusoids of the size that normalised inputs have: it needs"
                " norm_inputs: true, which no language model has"
            )
        if self.preconditioning and not self.code_geometry:
            raise RecipeError(
                "model.preconditioning scores codes by their vectors: it needs code_geometry: true"
            )

    @property
    def head_dim(self) -> int:
        return (self.attention_width or self.width) // self.heads


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4) of the last dimension."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(width)) if config.norm_weights else None

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, x.shape[-1:], eps=self.eps)
        return normed if self.weight is None else normed * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        all_heads = config.heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.width, all_heads * config.head_dim, bias=False)
        self.eps, self.q_norm, self.k_norm = config.norm_eps, None, None
        if config.norm_weights:
            self.q_norm = nn.Parameter(torch.empty(config.head_dim))
            self.k_norm = nn.Parameter(torch.empty(config.head_dim))
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        return self.out(attend(*self.project(x, rotation)).flatten(-2))

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[R, S, width]` -> turned q `[R, S, H, D]` and k, and v, `[R, S, G, D]`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        turned = rotate(self.normalise(qk), rotation).to(v.dtype)  # autocast norms in float32
        q, k = turned.split((self.heads, self.kv_heads), dim=-2)
        return q, k, v

    def normalise(self, qk: Tensor) -> Tensor:
        """QK-norm (Henry et al. 2020, arXiv 2010.04245) of `[R, S, H + G, D]`, q first."""
        normed = rms_norm(qk, (self.head_dim,), eps=self.eps)
        weights = self.norm_weights()
        return normed if weights is None else normed * weights.to(normed.dtype)

    def norm_weights(self) -> Tensor | None:
        """Of the norm of queries and keys, `[H + G, D]`, None where it has none."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return torch.cat(
            [self.q_norm.expand(self.heads, -1), self.k_norm.expand(self.kv_heads, -1)]
        )


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
    """Packed rows in, logits over the shared vocabulary out.

    Args:
        vocab_size: V, of which the last ids are codes, see `know_codes`.
        latent_channels: C of the image positions' states.
        num_timesteps: T.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, latent_channels: int, num_timesteps: int
    ) -> None:
        super().__init__()
        self.config = config
        self.plan: Callable[[Layout], Attend] = sdpa.plan  # a run may choose another
        self.code_features: Tensor | None
        self.code_vectors: Tensor | None
        self.estimates: Tensor | None
        self.recompute = False  # whether layers are computed anew in the backward pass
        self.lengthening = 1.0  # of the mean code that an expected step adds, see `soft_labels`
        self.table = nn.Embedding(vocab_size, config.width)
        both = config.sees_start_noise and not config.preconditioning
        seen = 2 * latent_channels if both else latent_channels
        self.from_latents = nn.Linear(seen, config.width, bias=False)
        self.timesteps = nn.Embedding(num_timesteps + 1, config.width)
        if config.code_geometry:
            self.from_codes = nn.Linear(latent_channels + 1, config.width, bias=False)
        if config.preconditioning:
            self.precision = nn.Linear(config.width, 1, bias=False)
            self.precisions = nn.Embedding(num_timesteps + 1, 1)
        self.code_ids = slice(vocab_size, vocab_size)  # the last of all, see `know_codes`
        self.register_buffer("code_features", None, persistent=False)
        self.register_buffer("code_vectors", None, persistent=False)
        self.register_buffer("estimates", None, persistent=False)
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.layers))
        self.feed_forwards = nn.ModuleList(FeedForward(config) for _ in range(config.layers))
        # before each attention and each feed-forward, in their order, and after the last
        self.norms = nn.ModuleList(Norm(config, config.width) for _ in range(2 * config.layers + 1))
        if not config.tied:
            self.unembedding = nn.Linear(config.width, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            initialise(name, parameter)

    def know_codes(self, codes: Tensor, estimates: Tensor) -> None:
        """Takes what the configuration needs of an image tokeniser.

        That is the codebook `[S, K, C]`, whose codes are the last K ids, and `estimates.estimates`.
        They are the tokeniser's and not saved here: whoever builds a transformer, or gives it other
        memory, calls this. Tables per timestep count by the mean of those that have a code; rows of
        zeros are codes that a table lacks.
        """
        size = self.code_ids.stop
        self.code_ids = slice(size - codes.shape[1], size)
        if self.config.code_geometry:
            having = codes.any(-1, keepdim=True).sum(0).clamp(min=1)
            vectors = codes.float().sum(0) / having
            length = vectors.square().sum(1, keepdim=True)
            length, spread = length - length.mean(), length.std(correction=0).clamp(min=1e-6)
            features = torch.cat([vectors, length / spread], dim=1)
            self.code_features = features.to(self.table.weight.device)
            if self.config.preconditioning:
                scored = _padded(torch.cat([vectors, -length / 2], dim=1))
                self.code_vectors = scored.to(self.table.weight.device)
                self.estimates = estimates.to(self.table.weight.device)

    def forward(self, packed: Packed) -> Tensor:
        """Packed rows -> hidden states `[R, S, width]`, see `run`; `logits` scores them."""
        layout = packed.layout
        attend = self.plan(layout if self.config.history else layout.without_history())
        return self.run(
            packed.token_ids,
            packed.latents,
            packed.timesteps,
            packed.positions,
            lambda _, q, k, v: attend(q, k, v),
        )

    def embed(
        self, token_ids: Tensor, latents: Tensor, timesteps: Tensor, positions: Tensor
    ) -> Tensor:
        """One vector per position, `[R, S, width]`, with `norm_inputs` of unit mean square."""
        if self.config.preconditioning:
            seen = self.guess(0, latents, timesteps)
        else:
            seen = latents[..., : self.from_latents.in_features]  # x_t first, then x_T
        image = self.from_latents(seen) + self.timesteps(timesteps.clamp(min=0))
        if self.config.places:
            image = image + sinusoids(positions[..., 1:], self.config.width)
        text = self.table(token_ids)
        mixed = torch.where((timesteps >= 0)[..., None], image.to(text.dtype), text)
        return rms_norm(mixed, (self.config.width,)) if self.config.norm_inputs else mixed

    def guess(self, row: int, latents: Tensor, timesteps: Tensor) -> Tensor:
        """What the states tell of `z_0` (row 0) or `r_t / g_t` (row 1): `[R, S, C]`."""
        assert self.estimates is not None
        weights = self.estimates[timesteps.clamp(min=0), row]
        x_t, x_T = latents.chunk(2, dim=-1)
        return weights[..., :1] * x_t + weights[..., 1:] * x_T

    def run(
        self,
        token_ids: Tensor,
        latents: Tensor,
        timesteps: Tensor,
        positions: Tensor,
        attend: AttendInLayer,
    ) -> Tensor:
        """The stack on positions; `attend` may keep keys and values per layer.

        Returns:
            `[R, S, width]`, with `preconditioning` C + 1 more or a few, see `sharpened`.
        """
        config = self.config
        x = self.embed(token_ids, latents, timesteps, positions)
        rotation = self.rotation(positions)
        for index in range(config.layers):
            x = self.checkpointed(self.layer, index, x, rotation, attend)
        hidden = self.norms[-1](x)
        return self.sharpened(hidden, latents, timesteps) if config.preconditioning else hidden

    def rotation(self, positions: Tensor) -> Tensor:
        """How queries and keys at `positions` turn, see `rotations`."""
        turn = shifted_rotations if self.config.rope == "shifted" else rotations
        return turn(positions, self.config.head_dim, self.config.rope_base)

    def sharpened(self, hidden: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Hidden states, then the guess `m` of `r_t / g_t` and 1, both times a precision p.

        With the vector and length of a code they make `p (<m, e_k> - ||e_k||^2 / 2)`, up to what
        is the same for all codes `-p ||m - e_k||^2 / 2`: the codes are normally distributed about
        the guess. Text has none of it.
        """
        hidden = hidden.float()
        with torch.autocast(hidden.device.type, enabled=False):
            log_p = self.precision(hidden) * self.config.width**-0.5
            log_p = log_p + self.precisions(timesteps.clamp(min=0))
            precision = log_p.clamp(-5, 5).exp() * (timesteps > 0)[..., None]
            guess = self.guess(1, latents.float(), timesteps)
        return torch.cat([hidden, _padded(torch.cat([precision * guess, precision], -1))], -1)

    def layer(self, index: int, x: Tensor, rotation: Tensor, attend: AttendInLayer) -> Tensor:
        """One layer of the stack: attention and feed-forward, each beside the residual stream."""
        before, between = self.norms[2 * index], self.norms[2 * index + 1]
        x = x + self.attentions[index](before(x), rotation, partial(attend, index))
        return x + self.feed_forwards[index](between(x))

    def checkpointed(self, function: Callable[..., Any], *arguments: Any) -> Any:
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
        """Hidden states, as `run` gives them, -> scores of token ids `[..., V]` or only of some."""
        rows = self.scored(ids)
        return linear(hidden[..., : rows.shape[1]], rows)

    def scored(self, ids: slice = slice(None)) -> Tensor:
        """The rows of token ids whose products with hidden states are their scores."""
        scores = self.table if self.config.tied else self.unembedding
        rows = scores.weight[ids]
        first = self.code_ids.start
        start, stop, _ = ids.indices(len(scores.weight))
        if self.code_features is None or stop <= first:
            return rows
        codes = slice(max(0, start - first), stop - first)
        part = self.from_codes(self.code_features[codes])
        text = len(rows) - len(part)
        rows = torch.cat([rows[:text], rows[text:] + part])
        if self.code_vectors is None:
            return rows
        return torch.cat([rows, pad(self.code_vectors[codes], (0, 0, text, 0))], dim=-1)


def _padded(x: Tensor) -> Tensor:
    """The last dimension up to a multiple of 8, which GPUs' fast kernels want."""
    return pad(x, (0, -x.shape[-1] % 8))


@torch.no_grad()
def initialise(name: str, parameter: Tensor) -> None:
    """Draws one parameter, by its name, from torch's global generator."""
    if parameter.ndim == 1:  # of a norm
        nn.init.ones_(parameter)
    elif name.endswith(_ZERO):
        nn.init.zeros_(parameter)
    elif name.startswith(("table", "timesteps", "unembedding")):
        nn.init.normal_(parameter, std=0.02)
    else:
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
