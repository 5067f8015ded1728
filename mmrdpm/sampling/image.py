"""Draws images from noise: T forward passes, all positions of a step at once.

The same request gives the same image, to the last bit, whatever its company. Rounding may depend
on the shapes of a product, so images are computed in groups of fixed size with prompts padded to
fixed lengths. A GPU always computes full groups. On a CPU each group is the work of one core, and
several are drawn side by side; there are large and small ones, used only where they are seen to
give every image the bits it has alone, and what fills neither is drawn alone. Images of large
models are drawn one by one, by all cores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmrdpm import machine
from mmrdpm.document import TextSegment, grid_positions, pack
from mmrdpm.errors import UsageError
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.sampling.cache import Cache
from mmrdpm.sampling.choose import Choice, choose
from mmrdpm.transformer import Transformer
from mmrdpm.vocabulary import Vocabulary

_GROUPS = {"cpu": (64, 256), "cuda": (2048,)}  # image positions in a group, about, by device
_PROMPT_MULTIPLE = 16  # tokens to a multiple of which prompts are padded
MOST_GUIDANCE = 1000.0  # logits stay numbers
_LIGHT = 2e9  # FLOP of an image's step, below which its matrices are too small to be divided
_VECTOR = 64  # values, the most that a CPU computes at once: two registers of AVX-512 in bfloat16
_SEEN: WeakKeyDictionary[Transformer, tuple[int, dict[tuple, bool]]] = WeakKeyDictionary()
"""Whether bits agreed, by what decides the shapes; and the version of the weights it was tried on:
the first ones of a training are zeros, whose sums agree in any order."""


GuidanceSchedule = Literal["constant", "rising", "falling"]


@dataclass(frozen=True)
class Guided(Choice):
    """How codes are drawn.

    Attributes:
        guidance_scale: classifier-free guidance, `uncond + s (cond - uncond)` (Ho & Salimans
            2022, arXiv 2207.12598, eq. 6 with s = w + 1); 1 is off.
        guidance_schedule: the scale at every step alike, or on a straight line over the steps,
            `rising` from 1 or `falling` to 1.
        expected_steps: how many of the last steps add, in place of a code that is drawn, the mean
            of all codes by their probabilities: the error of a code is then not left. What was not
            decided before them is averaged, so that a few leave an image its variety and all of
            them (T or more) next to none. Temperature, top-k and top-p are not of these steps.

    Raises:
        UsageError: a number is out of range, or there is no such schedule.
    """

    guidance_scale: float = field(default=3.0, metadata={"min": 0.0})
    guidance_schedule: GuidanceSchedule = "constant"
    expected_steps: int = field(default=0, metadata={"min": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_schedule not in get_args(GuidanceSchedule):
            known = ", ".join(get_args(GuidanceSchedule))
            raise UsageError(f"guidance schedule {self.guidance_schedule!r}: choose one of {known}")
        scale, steps = self.guidance_scale, self.expected_steps
        if not isinstance(scale, Real) or not 0 <= scale <= MOST_GUIDANCE:
            raise UsageError(
                f"guidance scale {scale!s:.20}: it must be a number from 0 to {MOST_GUIDANCE:g}"
            )
        if not isinstance(steps, Integral) or steps < 0:
            raise UsageError(f"expected steps {steps!s:.20}: it must be a whole number, 0 or more")

    def at(self, scale: float | None) -> Guided:
        """The same at another guidance scale; None leaves it."""
        return self if scale is None else replace(self, guidance_scale=scale)


def guidance_at(how: Guided, timestep: int, num_timesteps: int) -> float:
    """The guidance scale of timestep T..1, T the first that is drawn."""
    place = (num_timesteps - timestep) / max(1, num_timesteps - 1)  # 0 at the first, 1 at the last
    share = {"constant": 1.0, "rising": place, "falling": 1 - place}[how.guidance_schedule]
    return 1 + (how.guidance_scale - 1) * share


@dataclass(frozen=True)
class Request:
    """One image to draw: the token ids of its caption, and the seed of its noise and draws."""

    caption: tuple[int, ...]
    seed: int


@torch.inference_mode()
def sample_images(
    model: Transformer,
    tokenizer: ImageTokenizer,
    vocabulary: Vocabulary,
    requests: Sequence[Request],
    how: Guided,
) -> Tensor:
    """One image per request; their captions may differ in length.

    Returns:
        Every state on the model's device, float32 `[T + 1, B, *grid, C]`, row 0 the images'
        latents.
    """
    sampler = Sampler(model, tokenizer, vocabulary, how)
    shape = (tokenizer.num_timesteps + 1, len(requests), *tokenizer.grid, tokenizer.latent_channels)
    states = model.table.weight.new_empty(shape, dtype=torch.float32)
    groups = sampler.groups(requests)
    parts = [[requests[i] for i in group] for group in groups]
    for group, drawn in zip(groups, sampler.draw_all(parts), strict=True):
        own = list(dict.fromkeys(group))  # one that fills up is written once
        states[:, own] = drawn[:, : len(own)]
    return states


@dataclass(frozen=True)
class Sampler:
    """Draws groups of images whose prompts have one padded length."""

    model: Transformer
    tokenizer: ImageTokenizer
    vocabulary: Vocabulary
    how: Guided

    @torch.inference_mode()
    def draw_all(self, groups: Sequence[Sequence[Request]]) -> list[Tensor]:
        """The states of each group's images."""
        if self._on_cpu and self._light:
            return machine.side_by_side(self.draw, groups)
        return [self.draw(group) for group in groups]

    @property
    def _on_cpu(self) -> bool:
        return self.model.table.weight.device.type == "cpu"

    @property
    def _light(self) -> bool:
        """Whether one core does a step about as soon as several; depends on no request."""
        weights = sum(p.numel() for p in self.model.parameters())
        positions = math.prod(self.tokenizer.grid) * (1 if self.how.guidance_scale == 1 else 2)
        return 2 * weights * positions < _LIGHT

    def draw(self, group: Sequence[Request]) -> Tensor:
        """The states of a group's images, `[T + 1, G, *grid, C]`."""
        prompts = self._read(group)
        generators = [_draws(request.seed) for request in group]
        start = self._start(group)
        states = [start]
        for timestep in range(self.tokenizer.num_timesteps, 0, -1):
            logits = self._code_logits(prompts, states[-1], start, timestep)
            logits = logits[..., : self.tokenizer.codebook.sizes[timestep - 1]]
            states.append(states[-1] + self._step(logits, timestep, generators).view_as(start))
        return torch.stack(states[::-1])

    def _step(self, logits: Tensor, timestep: int, generators: Sequence[torch.Generator]) -> Tensor:
        """What a step adds at every position, `[G, N, C]`, for scores `[G, N, K_t]`."""
        codebook = self.tokenizer.codebook
        if timestep > self.how.expected_steps:
            return codebook.lookup(choose(logits, self.how, generators), timestep)
        probabilities = logits.float().softmax(-1)
        # a product for each image where groups differ in size, so that its shape is always one
        parts = probabilities.split(1) if self._on_cpu else (probabilities,)
        means = torch.cat([codebook.expected(part, timestep) for part in parts])
        return self.model.lengthening * means

    def groups(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests, a group a list; one that is not full repeats its last request."""
        positions = math.prod(self.tokenizer.grid)
        of_device = _GROUPS["cpu" if self._on_cpu else "cuda"]
        sizes = sorted({max(1, group // positions) for group in of_device})
        alike: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(_padded_length(request), []).append(i)
        if not self._on_cpu:
            full = [part for waiting in alike.values() for part in _cut(waiting, sizes[-1])]
            return [group + group[-1:] * (sizes[-1] - len(group)) for group in full]
        found: list[list[int]] = []
        for waiting in alike.values():
            for size in reversed(self._trusted(sizes, [requests[i] for i in waiting])):
                whole = len(waiting) // size * size
                found += _cut(waiting[:whole], size)
                waiting = waiting[whole:]
            found += _cut(waiting, 1)
        return found

    def _trusted(self, sizes: Sequence[int], alike: Sequence[Request]) -> list[int]:
        """The sizes of groups, rising, that give every image the bits that it has alone.

        With history the keys grow from step to step, so that the first speaks for no other.
        """
        trusted, below = list[int](), 1
        if self.model.config.history or not self._light or not self._fills_vectors:
            return trusted
        for size in sizes:
            if size > 1:
                if len(alike) < size or not self._seen(alike[:size], below):
                    break
                trusted.append(size)
                below = size
        return trusted

    @property
    def _fills_vectors(self) -> bool:
        """Whether all values of an image, or of its prompt, are computed several at once.

        What is left over where they do not fill whole vectors goes through another exponential,
        sine and cosine, whose last bits may differ, and which values those are depends on the
        group.
        """
        config = self.model.config
        positions = math.gcd(math.prod(self.tokenizer.grid), _PROMPT_MULTIPLE)
        return all(positions * n % _VECTOR == 0 for n in (config.ffn, config.head_dim // 2))

    def _seen(self, group: Sequence[Request], below: int) -> bool:
        """The result of `bits_are_the_same`, tried once for a shape, type and state of weights."""
        version = sum(p._version for p in self.model.parameters() if not p.is_inference())
        seen_on, known = _SEEN.get(self.model, (None, {}))
        if seen_on != version:
            known = {}
            _SEEN[self.model] = (version, known)
        guided, autocast = self.how.guidance_scale != 1, torch.is_autocast_enabled("cpu")
        shape = (len(group), below, _padded_length(group[0]), self.tokenizer.grid, guided)
        types = (self.model.table.weight.dtype, autocast, torch.get_autocast_dtype("cpu"))
        key = shape + types
        if key not in known:
            as_drawn = machine.side_by_side(lambda it: self.bits_are_the_same(it, below), [group])
            known[key] = as_drawn[0]
        return known[key]

    @torch.no_grad()
    def bits_are_the_same(self, group: Sequence[Request], size: int = 1) -> bool:
        """Whether the first step of a group is, bit by bit, what its parts of `size` images give.

        The order of a sum does not depend on what is summed, so one step speaks for all.
        """
        together, *apart = map(self._first_logits, (group, *_cut(group, size)))
        return torch.equal(together, torch.cat(apart))

    def _first_logits(self, group: Sequence[Request]) -> Tensor:
        """The scores of the first step, `[G, N, K]`."""
        start = self._start(group)
        return self._code_logits(self._read(group), start, start, self.tokenizer.num_timesteps)

    def _start(self, group: Sequence[Request]) -> Tensor:
        noise = self.tokenizer.noise([request.seed for request in group])
        return self.tokenizer.trajectory.start(noise)

    def _read(self, group: Sequence[Request]) -> tuple[Cache, Tensor]:
        """The texts before the images, read once, and the positions of the images.

        With guidance the captions come first, then as many empty ones.
        """
        v, grid, device = self.vocabulary, self.tokenizer.grid, self.model.table.weight.device
        captions = [request.caption for request in group]
        if self.how.guidance_scale != 1:
            captions += [()] * len(group)
        prefixes = [v.prompt(caption) for caption in captions]
        rows = [[[TextSegment(prefix)]] for prefix in prefixes]
        length, channels = _padded_length(group[0]), self.tokenizer.latent_channels
        packed = pack(rows, length, v, channels, len(grid)).to(device)
        positions = torch.stack([grid_positions(grid, len(prefix)) for prefix in prefixes])
        blocks = self.tokenizer.num_timesteps if self.model.config.history else 1
        return Cache(self.model, packed, blocks * math.prod(grid)), positions.to(device)

    def _code_logits(
        self, prompts: tuple[Cache, Tensor], state: Tensor, start: Tensor, timestep: int
    ) -> Tensor:
        """Guided scores of this step's codes at every position: `[G, N, K]`."""
        (cache, positions), model = prompts, self.model
        latents = torch.cat([state, start], dim=-1).flatten(1, -2)
        guided = self.how.guidance_scale != 1
        if guided:
            latents = torch.cat([latents, latents])
        timesteps = torch.full(latents.shape[:2], timestep, device=latents.device)
        nothing = torch.full_like(timesteps, self.vocabulary.pad)
        hidden = model.run(nothing, latents, timesteps, positions, cache.attend)
        if model.config.history:
            cache.length += hidden.shape[1]
        logits = model.logits(hidden, slice(self.vocabulary.code_offset, None))
        if not guided:
            return logits
        cond, uncond = logits.chunk(2)
        scale = guidance_at(self.how, timestep, self.tokenizer.num_timesteps)
        return uncond + scale * (cond - uncond)


def _draws(seed: int) -> torch.Generator:
    """The generator of an image's draws, which must not repeat that of its start noise."""
    hashed = hashlib.sha256(f"draws {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8]) >> 1)


def _cut(things: Sequence[Any], size: int) -> list[Any]:
    return [list(things[i : i + size]) for i in range(0, len(things), size)]


def _padded_length(request: Request) -> int:
    """Tokens of a prompt, with its marks, up to a multiple."""
    return math.ceil((len(request.caption) + 2) / _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
