"""The autoencoder: pixels <-> latents, a small residual convolutional network.

Design choices: pixels enter and leave through a patch (space to depth), so that no convolution
runs at full resolution; each further level halves the grid; latents are normalised per channel by
a batch norm without parameters, whose running statistics are stored with the weights; noise is
added to the latents while training, so that the decoder tolerates quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shapes of the autoencoder; the downsampling factor is `patch * 2 ** (len(widths) - 1)`."""

    image_size: int = 32
    latent_channels: int = 16
    patch: int = 4
    widths: tuple[int, ...] = (128, 256)
    blocks: int = 2

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
        self.norm = nn.GroupNorm(8, width)
        self.expand = nn.Conv2d(width, width, 3, padding=1)
        self.project = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(nn.functional.silu(self.expand(self.norm(x))))


class Autoencoder(nn.Module):
    """Encoder, latent normalisation and decoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.normalise = nn.BatchNorm2d(config.latent_channels, affine=False, momentum=0.02)
        self.decoder = _decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `z_0` `[B, h, w, C]`, mean 0, variance 1."""
        return self.normalise(self.encoder(images)).permute(0, 2, 3, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, h, w, C]` -> images `[B, 3, H, W]`, about [-1, 1], not clamped."""
        return self.decoder(latents.permute(0, 3, 1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of the images, codes left out."""
        return self.decode(self.encode(images))


def _encoder(config: AutoencoderConfig) -> nn.Sequential:
    first, last = config.widths[0], config.widths[-1]
    layers: list[nn.Module] = [nn.Conv2d(3, first, config.patch, stride=config.patch)]
    for level, width in enumerate(config.widths):
        if level:
            layers.append(nn.Conv2d(config.widths[level - 1], width, 2, stride=2))
        layers += [ResidualBlock(width) for _ in range(config.blocks)]
    return nn.Sequential(*layers, nn.GroupNorm(8, last), nn.Conv2d(last, config.latent_channels, 1))


def _decoder(config: AutoencoderConfig) -> nn.Sequential:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 1)]
    for level, width in enumerate(widths):
        if level:
            layers += [nn.Conv2d(widths[level - 1], width * 4, 1), nn.PixelShuffle(2)]
        layers += [ResidualBlock(width) for _ in range(config.blocks)]
    pixels = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)
    return nn.Sequential(
        *layers, nn.GroupNorm(8, widths[-1]), nn.SiLU(), pixels, nn.PixelShuffle(config.patch)
    )


def reconstruction_loss(output: Tensor, images: Tensor) -> Tensor:
    """Mean squared plus mean absolute error: the first for PSNR, the second for sharp edges."""
    error = output.float() - images
    return error.square().mean() + 0.5 * error.abs().mean()
