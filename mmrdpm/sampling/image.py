"""Draws an image from noise: T forward passes, all positions of a step at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmrdpm.document import TextSegment, grid_positions, pack
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.sampling.cache import Cache
from mmrdpm.sampling.choose import Choice, choose
from mmrdpm.transformer import Transformer
from mmrdpm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Guided(Choice):
    """How codes are drawn.

    Attributes:
        guidance_scale: classifier-free guidance, `uncond + s (cond - uncond)` (Ho & Salimans
            2022, arXiv 2207.12598, eq. 6 with s = w + 1); 1 is off.
        guidance_schedule: the scale at every step alike, or on a straight line over the steps,
            `rising` from 1 or `falling` to 1.
    """

    guidance_scale: float = field(default=3.0, metadata={"min": 0.0})
    guidance_schedule: Literal["constant", "rising", "falling"] = "constant"


def guidance_at(how: Guided, timestep: int, num_timesteps: int) -> float:
    """The guidance scale of timestep T..1, T the first that is drawn."""
    place = (num_timesteps - timestep) / max(1, num_timesteps - 1)  # 0 at the first, 1 at the last
    share = {"constant": 1.0, "rising": place, "falling": 1 - place}[how.guidance_schedule]
    return 1 + (how.guidance_scale - 1) * share


@torch.no_grad()
def sample_image(
    model: Transformer,
    tokenizer: ImageTokenizer,
    vocabulary: Vocabulary,
    caption: tuple[int, ...],
    seed: int,
    how: Guided,
) -> Tensor:
    """One image for the token ids of a caption.

    Each image is computed by itself, so that it depends on caption and seed alone.

    Returns:
        Every state, float32 `[T + 1, *grid, C]`, row 0 the image's latent.
    """
    cond = _prompt(model, tokenizer, vocabulary, caption)
    uncond = _prompt(model, tokenizer, vocabulary, ()) if how.guidance_scale != 1 else None
    generator = torch.Generator().manual_seed(seed)
    start = tokenizer.trajectory.start(tokenizer.noise([seed]))[0]
    states = [start]
    for timestep in range(tokenizer.num_timesteps, 0, -1):
        logits = _code_logits(model, vocabulary, cond, states[-1], start, timestep)
        if uncond:
            without = _code_logits(model, vocabulary, uncond, states[-1], start, timestep)
            scale = guidance_at(how, timestep, tokenizer.num_timesteps)
            logits = without + scale * (logits - without)
        logits = logits[:, : tokenizer.codebook.sizes[timestep - 1]]
        code_indices = choose(logits, how, generator).reshape(tokenizer.grid)
        states.append(states[-1] + tokenizer.codebook.lookup(code_indices, timestep))
    return torch.stack(states[::-1])


def _prompt(
    model: Transformer,
    tokenizer: ImageTokenizer,
    vocabulary: Vocabulary,
    caption: tuple[int, ...],
) -> tuple[Cache, int]:
    """The text before the image, read once, and the slot of the image."""
    prefix = (vocabulary.bos, *caption, vocabulary.image_start)
    rank = len(tokenizer.grid)
    rows = [[[TextSegment(prefix)]]]
    cache = Cache()
    packed = pack(rows, len(prefix), vocabulary, tokenizer.latent_channels, rank)
    cache.read(model, packed.to(tokenizer.codebook.codes.device))
    return cache, len(prefix)


def _code_logits(
    model: Transformer,
    vocabulary: Vocabulary,
    prompt: tuple[Cache, int],
    state: Tensor,
    start: Tensor,
    timestep: int,
) -> Tensor:
    """Scores of this step's codes at every position: `[N, K]`."""
    cache, slot = prompt
    latents = torch.cat([state, start], dim=-1).flatten(0, -2)[None]
    timesteps = torch.full(latents.shape[:2], timestep, device=latents.device)
    x = model.embed(torch.full_like(timesteps, vocabulary.pad), latents, timesteps)
    positions = grid_positions(tuple(state.shape[:-1]), slot)[None].to(latents.device)
    see = cache.extend if model.config.history else cache.look
    hidden = see(model, x, positions)
    return model.logits(hidden)[0, :, vocabulary.code_offset :]
