"""The autoencoder: pixels <-> latents, a small residual convolutional network.

Design choices: pixels enter and leave through a patch (space to depth), so that no convolution
runs at full resolution; each further level halves the grid; latents are normalised per channel by
a batch norm without parameters, whose running statistics are stored with the weights; noise is
added to the latents while training, so that the decoder tolerates quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmrdpm import distributed
from mmrdpm.errors import RecipeError

_GROUPS = 8  # of the group norms: widths are multiples of it
_MOMENTUM = 0.02  # of the running statistics of latents, per update


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shapes of the autoencoder; the downsampling factor is `patch * 2 ** (len(widths) - 1)`.

    Raises:
        RecipeError: the widths are not multiples of 8, or the image not one of the factor.
    """

    image_size: int = field(default=32, metadata={"min": 1})
    latent_channels: int = field(default=16, metadata={"min": 1})
    patch: int = field(default=4, metadata={"min": 1})
    widths: tuple[int, ...] = (128, 256)
    blocks: int = field(default=2, metadata={"min": 0, "max": 1000})

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 or width % _GROUPS for width in self.widths):
            raise RecipeError(
                f"tokenizer.autoencoder.widths is {list(self.widths)}: give at least one, each a"
                f" multiple of {_GROUPS}"
            )
        if self.image_size % self.factor:
            raise RecipeError(
                f"tokenizer.autoencoder.image_size is {self.image_size}: it must be a multiple of"
                f" {self.factor}, which the patch and the widths shrink it by"
            )
        if self.grid == (1, 1) and self.widths[-1] == _GROUPS:
            raise RecipeError(
                f"tokenizer.autoencoder: a grid of 1x1 places of width {_GROUPS} has one value for"
                " each group that is normalised: give the last of widths more"
            )

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.factor
        return side, side


class ResidualBlock(nn.Module):
    """Pre-norm residual block: norm, 3x3 convolution, SiLU, 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.expand = nn.Conv2d(width, width, 3, padding=1)
        self.project = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(nn.functional.silu(self.expand(self.norm(x))))


class LatentNorm(nn.BatchNorm2d):
    """Latents to mean 0 and variance 1 per channel; the running statistics are kept.

    While training, batches `[B, C, h, w]` are normalised by their own statistics, taken over all
    ranks (torch's SyncBatchNorm needs CUDA).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False, momentum=_MOMENTUM)

    def forward(self, latents: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(latents)
        from torch.distributed.nn.functional import all_reduce

        x = latents.float()
        centre = self.running_mean.clone()  # near the mean: else the difference would cancel
        deviation = x - centre[:, None, None]
        moments = torch.stack([deviation.mean((0, 2, 3)), deviation.square().mean((0, 2, 3))])
        shift, square = all_reduce(moments) / distributed.world_size()
        mean, variance = centre + shift, (square - shift.square()).clamp(min=0)
        count = x.numel() // x.shape[1] * distributed.world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, _MOMENTUM)
            self.running_var.lerp_(variance * count / max(1, count - 1), _MOMENTUM)
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return (x - mean[:, None, None]) * (variance + self.eps).rsqrt()[:, None, None]

    def set(self, mean: Tensor, variance: Tensor) -> None:
        """Takes statistics measured elsewhere, float `[C]` each."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def undo(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, C, h, w]` back to their own mean and variance."""
        scale = (self.running_var + self.eps).sqrt()
        return latents * scale[:, None, None] + self.running_mean[:, None, None]


class Autoencoder(nn.Module):
    """Encoder, latent normalisation and decoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.normalise = LatentNorm(config.latent_channels)
        self.decoder = _decoder(config)

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weights: where the parts of a loss are weighed against each other."""
        return self.decoder[-2].weight  # type: ignore[return-value]

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `[B, C, h, w]`, not yet normalised."""
        return self.encoder(images)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `z_0` `[B, h, w, C]`, mean 0, variance 1."""
        return self.normalise(self.raw_latents(images)).permute(0, 2, 3, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, h, w, C]` -> images `[B, 3, H, W]`, about [-1, 1], not clamped."""
        return self.decoder(latents.permute(0, 3, 1, 2))


def _encoder(config: AutoencoderConfig) -> nn.Sequential:
    first, last = config.widths[0], config.widths[-1]
    layers: list[nn.Module] = [nn.Conv2d(3, first, config.patch, stride=config.patch)]
    for level, width in enumerate(config.widths):
        if level:
            layers.append(nn.Conv2d(config.widths[level - 1], width, 2, stride=2))
        layers += [ResidualBlock(width) for _ in range(config.blocks)]
    return nn.Sequential(
        *layers, nn.GroupNorm(_GROUPS, last), nn.Conv2d(last, config.latent_channels, 1)
    )


def _decoder(config: AutoencoderConfig) -> nn.Sequential:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 1)]
    for level, width in enumerate(widths):
        if level:
            layers += [nn.Conv2d(widths[level - 1], width * 4, 1), nn.PixelShuffle(2)]
        layers += [ResidualBlock(width) for _ in range(config.blocks)]
    pixels = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)
    return nn.Sequential(
        *layers, nn.GroupNorm(_GROUPS, widths[-1]), nn.SiLU(), pixels, nn.PixelShuffle(config.patch)
    )
