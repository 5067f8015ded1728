"""The image tokeniser: pixels <-> latents <-> token records, and its folder on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrdpm import recipe, weights
from mmrdpm.errors import CheckpointError
from mmrdpm.rdpm.autoencoder import Autoencoder, AutoencoderConfig
from mmrdpm.rdpm.codebook import Codebook
from mmrdpm.rdpm.estimates import estimates
from mmrdpm.rdpm.published import PublishedAutoencoder, PublishedConfig
from mmrdpm.rdpm.schedule import Schedule
from mmrdpm.rdpm.trajectory import decode, encode, make_trajectory

SPEC_FILE = "tokenizer.yaml"
WEIGHTS_FILE = "tokenizer.safetensors"
FILES = (SPEC_FILE, WEIGHTS_FILE)


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """What an image tokeniser is, apart from its weights.

    Attributes:
        autoencoder: our own by its shapes, or a published one by `diffusers`.
        eta: share of fresh noise, of the trajectory `ancestral` alone.
        codebook_size: K; code indices are 0..K-1.
        codebook_sizes: of each timestep's table, each 1..K, in the order of drawing, T first; empty
            is K for all. Sizes that differ need `per_step_codebook`.
        per_step_codebook: whether each timestep has a table of its own.
    """

    autoencoder: PublishedConfig | AutoencoderConfig = field(default_factory=AutoencoderConfig)
    num_timesteps: int = field(default=10, metadata={"min": 1, "max": 1000})
    schedule: str = "linear"
    trajectory: str = "path"
    eta: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    codebook_size: int = field(default=1024, metadata={"min": 1})
    codebook_sizes: tuple[int, ...] = ()
    per_step_codebook: bool = False


@dataclass(frozen=True)
class TokenRecord:
    """An image as tokens: code indices are valid only with the noise that they were made from.

    Attributes:
        seed: of the noise, see `ImageTokenizer.noise`.
        code_indices: int64 `[T, *grid]`, 0..K-1, row `t - 1` holds the codes of timestep t.
    """

    seed: int
    code_indices: Tensor


class ImageTokenizer(nn.Module):
    """Autoencoder, schedule, trajectory and codebook as one thing.

    Attributes:
        noise_pool: how many noises there are; 0 is one for each seed. A model that knows no others
            sets it.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.noise_pool = 0
        self.autoencoder: Autoencoder | PublishedAutoencoder
        if isinstance(config.autoencoder, PublishedConfig):
            self.autoencoder = PublishedAutoencoder(config.autoencoder)
        else:
            self.autoencoder = Autoencoder(config.autoencoder)
        schedule = Schedule(config.schedule, config.num_timesteps)
        self.trajectory = make_trajectory(config.trajectory, schedule, config.eta)
        self.codebook = Codebook(
            config.num_timesteps,
            config.codebook_size,
            self.latent_channels,
            config.per_step_codebook,
            config.codebook_sizes[::-1],
        )

    @property
    def num_timesteps(self) -> int:
        return self.config.num_timesteps

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.config.autoencoder.latent_channels

    @property
    def grid(self) -> tuple[int, ...]:
        return self.config.autoencoder.grid

    @property
    def image_size(self) -> int:
        return self.config.autoencoder.image_size

    def estimates(self, sees_start_noise: bool) -> Tensor:
        """See `estimates.estimates`, float32 `[T + 1, 2, 2]`."""
        with torch.device("cpu"):  # a model may be being built on another device
            return estimates(self.trajectory, self.codebook, sees_start_noise)

    def noise(self, seeds: Sequence[int], grid: Sequence[int] | None = None) -> Tensor:
        """The noise of token records: float32 `[num_noises, B, *grid, C]`, by default square.

        Each record draws from its own generator on the CPU, so its noise depends on nothing but
        its seed: not on the batch, nor on the device. With a `noise_pool` of N, seeds that are
        equal modulo N have the same noise.
        """
        if self.noise_pool:
            seeds = [seed % self.noise_pool for seed in seeds]
        shape = (self.trajectory.num_noises, *(grid or self.grid), self.latent_channels)
        noises = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(noises, dim=1).to(self.codebook.codes.device)

    def residuals(self, latents: Tensor, seeds: Sequence[int], states: Tensor) -> Tensor:
        """What the codes of `encode_latents` are nearest to.

        Returns:
            float32 `[T, B, *grid, C]`, row `t - 1` holds `r_t / g_t`.
        """
        noise = self.noise(seeds, latents.shape[1:-1])
        steps = range(1, self.num_timesteps + 1)
        each = [self.trajectory.residual(latents, noise, states[t], t) for t in steps]
        return torch.stack(each) / self.codebook.gains.view(-1, *[1] * latents.ndim)

    def encode_latents(self, latents: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents `[B, *grid, C]` -> code indices `[T, B, *grid]` and states, see `encode`."""
        noise = self.noise(seeds, latents.shape[1:-1])
        return encode(self.trajectory, self.codebook, latents, noise)

    def encode(self, images: Tensor, seeds: Sequence[int]) -> list[TokenRecord]:
        """Images `[B, 3, H, W]` in [-1, 1] -> one token record each."""
        code_indices, _ = self.encode_latents(self.autoencoder.encode(images), seeds)
        return [TokenRecord(seed, code_indices[:, i].clone()) for i, seed in enumerate(seeds)]

    def states(self, records: Sequence[TokenRecord]) -> Tensor:
        """Every state on the records' way: `[T + 1, B, *grid, C]`, row t holds `x_t`."""
        code_indices = torch.stack([record.code_indices for record in records], dim=1)
        noise = self.noise([record.seed for record in records], code_indices.shape[2:])
        return decode(self.trajectory, self.codebook, code_indices.to(noise.device), noise)

    def decode(self, records: Sequence[TokenRecord]) -> Tensor:
        """Token records -> images `[B, 3, H, W]` in [-1, 1]."""
        return self.decode_latents(self.states(records)[0])

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents `[B, *grid, C]` -> images `[B, 3, H, W]` in [-1, 1].

        One image at a time: a convolution's rounding depends on the batch size, and the same
        latent must give the same picture whatever its company.
        """
        images = [self.autoencoder.decode(latent[None]) for latent in latents]
        return torch.cat(images).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Writes the spec and the weights, as float16, into a folder, which is made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        recipe.dump(self.config, folder / SPEC_FILE)
        half = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        weights.check_finite(half, folder / WEIGHTS_FILE)  # float16 ends at 65504
        weights.save(half, folder / WEIGHTS_FILE)


def load(folder: Path) -> ImageTokenizer:
    """The tokeniser saved in a folder, in evaluation mode, float32 on the CPU.

    Raises:
        RecipeError: its spec is wrong.
        CheckpointError: it is missing, or its weights are missing, damaged or do not fit it.
    """
    if folder.is_dir() and not (folder / SPEC_FILE).is_file():
        raise CheckpointError(
            f"{folder}: it is the folder of no image tokeniser ({SPEC_FILE} is missing): name"
            " another (a model's is in its folder tokenizers/image)"
        )
    config, path = recipe.load(ImageTokenizerConfig, folder / SPEC_FILE), folder / WEIGHTS_FILE
    with weights.as_large_as(path):
        tokenizer = ImageTokenizer(config)
    weights.load_into(tokenizer, path)
    return tokenizer.eval().requires_grad_(False)
