"""The terms that are equal: the recipe, the scene that all peers draw, and what a peer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmrdpm import machine, shipped, text_tokenizer
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.emoji_stream import latents_of
from mmrdpm.data.pictures import to_pictures
from mmrdpm.errors import RecipeError
from mmrdpm.machine import Precision
from mmrdpm.metrics.distance import LEAST_OF_KERNEL
from mmrdpm.model_recipe import Tokenizers
from mmrdpm.optim import OptimizerConfig
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.sampling.image import MOST_GUIDANCE

Caption = tuple[int, ...]
"""The text ids of a caption; () where it is dropped."""


@dataclass(frozen=True)
class Shape:
    """The size of one peer and how it is fed.

    Attributes:
        ffn: hidden width of the feed-forward.
        batch_size: pictures per update.
        lrs: learning rates; of several a search takes one.
        steps: network evaluations per picture (guidance counted as one), one entry per way of
            sampling that is measured; empty where the method fixes them.
        noise_pool: of ours alone, see `TransformerConfig`.
    """

    layers: int = field(metadata={"min": 1})
    width: int = field(metadata={"min": 8})
    heads: int = field(metadata={"min": 1})
    ffn: int = field(metadata={"min": 8})
    batch_size: int = field(default=32, metadata={"min": 1})
    lrs: tuple[float, ...] = (3e-3,)
    steps: tuple[int, ...] = ()
    noise_pool: int = field(default=0, metadata={"min": 0})

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise RecipeError(f"heads ({self.heads}) must divide width ({self.width})")
        if not self.lrs or min(self.lrs) <= 0:
            raise RecipeError("lrs: name at least one learning rate, each above 0")
        if min(self.steps, default=1) < 1:
            raise RecipeError(f"steps {list(self.steps)}: each must be at least 1")


@dataclass(frozen=True)
class OurShape(Shape):
    """What can be chosen of ours besides.

    Attributes:
        preconditioning, places, sees_start_noise: see `TransformerConfig`.
        soft_labels, codes_apart: see `objective.loss`.
        steps_per_image: timesteps of a picture that one update learns, all where it has fewer.
        expected_steps: see `Guided`; where it is all steps there is no temperature.
    """

    preconditioning: bool = False
    places: bool = False
    sees_start_noise: bool = True
    soft_labels: float = field(default=0.0, metadata={"min": 0.0})
    codes_apart: bool = True
    steps_per_image: int = field(default=4, metadata={"min": 1})
    expected_steps: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class Budget:
    """Training FLOPs as torch counts them: forward and backward of real updates.

    Attributes:
        flops: of the run that is judged.
        search_flops: of the run of each learning rate; not part of `flops`.
        points: how often the run is judged, evenly spaced, the last time at its end.
    """

    flops: float = field(default=9e13, metadata={"min": 1.0})
    search_flops: float = field(default=3e12, metadata={"min": 1.0})
    points: int = field(default=4, metadata={"min": 1})


@dataclass(frozen=True)
class Judging:
    """How pictures are drawn and judged.

    Attributes:
        concepts: training concepts without a skin tone that are drawn.
        guidance_scales, temperatures: all pairs are judged, the table shows the best by top 10;
            peers that draw no codes have no temperature.
        speed_batches: numbers of pictures drawn at once when sampling is timed.
        repeats: of each timing; the median counts.
    """

    concepts: int = field(default=200, metadata={"min": LEAST_OF_KERNEL})
    guidance_scales: tuple[float, ...] = field(
        default=(1.0, 1.5, 2.0, 4.0), metadata={"min": 1.0, "max": MOST_GUIDANCE}
    )
    temperatures: tuple[float, ...] = (0.4, 0.7)
    speed_batches: tuple[int, ...] = (1, 8, 64)
    repeats: int = field(default=3, metadata={"min": 1})
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})

    def __post_init__(self) -> None:
        if not self.guidance_scales:
            raise RecipeError("judging.guidance_scales: name at least one scale")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise RecipeError("judging.temperatures: name at least one, each above 0")
        if not self.speed_batches or min(self.speed_batches) < 1:
            raise RecipeError("judging.speed_batches: name at least one, each at least 1")


@dataclass(frozen=True)
class Equal:
    """What all peers share in training.

    Attributes:
        warmup: share of the updates in which the learning rate rises.
        tolerance: how far a peer's number of parameters may be from ours, as a share of it.
        levels: residual codes per place of the peers that draw codes: six leave the error of our
            tokens on `emoji-rdpm-32`.
        codebook_size: of these peers; 0: as the image tokenizer's.
    """

    caption_dropout: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0})
    warmup: float = field(default=0.05, metadata={"min": 0.0, "max": 1.0})
    tolerance: float = field(default=0.05, metadata={"min": 0.0})
    levels: int = field(default=6, metadata={"min": 1})
    codebook_size: int = field(default=0, metadata={"min": 0})
    precision: Precision = "auto"
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    threads: int = field(default=2, metadata={"min": 1, "max": 1024})


@dataclass(frozen=True)
class PeerBench:
    """A recipe of kind `peers`; the default shapes have about 6.4M parameters."""

    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    budget: Budget = field(default_factory=Budget)
    equal: Equal = field(default_factory=Equal)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    judging: Judging = field(default_factory=Judging)
    ours: OurShape = field(
        default_factory=lambda: OurShape(
            *(6, 256, 4, 704, 64),
            steps_per_image=1,
            preconditioning=True,
            places=True,
            sees_start_noise=False,
            soft_labels=2.0,
            expected_steps=10,
        )
    )
    flow: Shape = field(default_factory=lambda: Shape(4, 264, 4, 1056, 64, steps=(50, 10)))
    masked: Shape = field(default_factory=lambda: Shape(6, 256, 4, 416, steps=(10,)))
    raster: Shape = field(default_factory=lambda: Shape(6, 256, 4, 592))
    transfusion: Shape = field(default_factory=lambda: Shape(5, 160, 4, 656, 64, steps=(50, 10)))
    causal_flow: Shape = field(default_factory=lambda: Shape(6, 256, 4, 784, 64, steps=(50, 10)))
    scales: Shape = field(default_factory=lambda: Shape(6, 256, 4, 704))
    kind: Literal["peers"] = "peers"


@dataclass(frozen=True)
class Batch:
    """Pictures to learn: a caption and a latent each.

    Attributes:
        captions: one per picture.
        latents: float32 `[B, h, w, C]`.
        noise_seeds: int64 `[B]`, a fresh one for each picture and update.
    """

    captions: list[Caption]
    latents: Tensor
    noise_seeds: list[int]


class Scene:
    """Tokenizers, captions and latents that all peers learn from."""

    def __init__(self, recipe: PeerBench) -> None:
        names = recipe.tokenizers
        self.images = image_tokenizer.load(shipped.resolve("tokenizers", names.image))
        self.texts = text_tokenizer.load(shipped.resolve("tokenizers", names.text))
        self.data = load_emoji(self.images.image_size)
        self.captions: list[Caption] = [tuple(self.texts.encode(n)) for n in self.data.names]
        self.latents = latents_of(self.images, self.data)
        self.images.to(machine.device())
        self.equal = recipe.equal
        concepts: dict[str, list[int]] = {}
        for index in self.data.indices("train"):
            concepts.setdefault(self.data.concepts[index], []).append(index)
        self.concepts = list(concepts.values())

    @cached_property
    def training_latents(self) -> Tensor:
        """Of the training pictures, float32 `[n, h, w, C]`."""
        return self.latents[self.data.indices("train")]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one picture: height, width, channels."""
        height, width, channels = self.latents.shape[1:]
        return height, width, channels

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The pictures of one update: a concept, then half of the time its untoned variant."""
        random = np.random.default_rng((seed, step))
        chosen, captions = [], []
        for _ in range(size):
            variants = self.concepts[random.integers(len(self.concepts))]
            plain = [i for i in variants if not self.data.tones[i]]
            image = plain[0] if plain and random.random() < 0.5 else int(random.choice(variants))
            dropped = random.random() < self.equal.caption_dropout
            chosen.append(image)
            captions.append(() if dropped else self.captions[image])
        seeds = random.integers(2**62, size=size).tolist()
        return Batch(captions, self.latents[chosen], seeds)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents `[B, h, w, C]` -> pictures."""
        return to_pictures(self.images.decode_latents(latents))


@dataclass(frozen=True)
class How:
    """One way of drawing.

    Attributes:
        steps: network evaluations; a peer whose method fixes them does not look at it.
        temperature: of the codes, None where none are drawn.
    """

    steps: int
    guidance_scale: float
    temperature: float | None

    @property
    def warmth(self) -> float:
        """The temperature, of a peer that draws codes."""
        assert self.temperature is not None
        return self.temperature

    def __str__(self) -> str:
        warm = "" if self.temperature is None else f", temperature {self.temperature:g}"
        return f"{self.steps} steps, guidance {self.guidance_scale:g}{warm}"


class Peer(nn.Module, ABC):
    """One way to draw: a network with its own objective and its own sampler.

    Attributes:
        stack: beginnings of the names of the parameters whose matrices Muon takes.
        draws_codes: whether a temperature means something to it.
        tokens: codes or vectors that make a picture.
        steps: network evaluations per picture of each way of sampling.
    """

    stack: ClassVar[tuple[str, ...]]
    draws_codes: bool = True
    tokens: int
    steps: tuple[int, ...]

    def ways(self, plan: Judging) -> list[How]:
        """All ways of drawing that are judged."""
        temperatures = plan.temperatures if self.draws_codes else (None,)
        return [How(*way) for way in product(self.steps, plan.guidance_scales, temperatures)]

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The scalar that training lowers; randomness comes from torch's global generator."""

    @abstractmethod
    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        """Latents `[B, h, w, C]`; randomness comes from torch's global generator."""

    def reconstruct(self, latents: Tensor) -> Tensor:
        """What the peer's tokens leave of latents `[B, h, w, C]`; all of them where it has none."""
        return latents

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def exact(self) -> torch.autocast:
        """A context for choosing codes: float32 products inside training in bfloat16."""
        return torch.autocast(self.device.type, enabled=False)


def left_padded(
    captions: Sequence[Caption], first: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Captions behind the id `first`, padded on the left so that the picture follows at once.

    Returns:
        int64 ids `[B, L]` and bool `[B, L]`, True where there is a token.
    """
    longest = 1 + max(len(caption) for caption in captions)
    ids = torch.zeros(len(captions), longest, dtype=torch.int64)
    real = torch.zeros(len(captions), longest, dtype=torch.bool)
    for row, caption in enumerate(captions):
        start = longest - 1 - len(caption)
        ids[row, start:] = torch.tensor((first, *caption))
        real[row, start:] = True
    return ids.to(device), real.to(device)


def with_and_without(captions: Sequence[Caption]) -> list[Caption]:
    """The captions, then as many empty ones: what `guided` takes apart again."""
    return [*captions, *[()] * len(captions)]


def guided(network_output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6 with s = w + 1).

    Args:
        network_output: `[2 B, ...]`, with captions and then without.
    """
    cond, uncond = network_output.chunk(2)
    return uncond + scale * (cond - uncond)
