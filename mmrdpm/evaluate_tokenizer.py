"""Measures a tokeniser on the embedded data: what is lost, and how well the codes are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrdpm.data.emoji import Split, load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.pictures import to_tensor
from mmrdpm.metrics.reconstruction import psnr, ssim
from mmrdpm.rdpm.codebook import perplexity
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.rdpm.trajectory import walk
from mmrdpm.text_tokenizer import TextTokenizer

_CHUNK = 256  # pictures at once


@dataclass(frozen=True)
class ImageFigures:
    """Means over pictures; the autoencoder alone is the limit that codes can reach.

    Attributes:
        psnr, ssim: of the autoencoder's own reconstruction and of that from the codes.
        latent_error: mean squared distance from the trajectory after each step, T first; the
            latent's own variance is 1.
        usage: codebook perplexity of each step over the codes it has, T first.
    """

    count: int
    psnr: tuple[float, float]
    ssim: tuple[float, float]
    latent_error: list[float]
    usage: list[float]


@torch.no_grad()
def evaluate_images(tokenizer: ImageTokenizer, split: Split) -> ImageFigures:
    """Figures over one split of the embedded data; picture i takes its noise from seed i."""
    data = load_emoji(tokenizer.image_size)
    images = to_tensor(data.images[data.indices(split)])
    chunks = images.split(_CHUNK)
    latents = torch.cat([tokenizer.autoencoder.encode(chunk) for chunk in chunks])
    noise = tokenizer.noise(range(len(images)))
    codebook, errors, usage, state = tokenizer.codebook, [], [], latents
    for t, x, residual, code_indices in walk(tokenizer.trajectory, codebook, latents, noise):
        step = codebook.lookup(code_indices, t)
        errors.append((residual - step).square().mean().item())
        size = codebook.sizes[t - 1]
        usage.append(perplexity(code_indices, size) / size)
        state = x + step
    both = [_decode(tokenizer, latents), _decode(tokenizer, state)]
    return ImageFigures(
        count=len(images),
        psnr=_pair(*(psnr(x, images) for x in both)),
        ssim=_pair(*(ssim(x, images) for x in both)),
        latent_error=errors,
        usage=usage,
    )


@dataclass(frozen=True)
class TextFigures:
    """How long texts become; `broken` counts those that no round trip brings back."""

    texts: int
    size: int
    bytes_per_token: float
    broken: int


def evaluate_texts(tokenizer: TextTokenizer) -> TextFigures:
    """Figures over the embedded names and definitions."""
    texts = load_emoji(8).names + load_glosses()
    ids = [tokenizer.encode(text) for text in texts]
    broken = sum(tokenizer.decode(i) != text for i, text in zip(ids, texts, strict=True))
    length = sum(len(text.encode()) for text in texts)
    return TextFigures(len(texts), tokenizer.size, length / sum(map(len, ids)), broken)


def _decode(tokenizer: ImageTokenizer, latents: Tensor) -> Tensor:
    chunks = [tokenizer.autoencoder.decode(chunk) for chunk in latents.split(_CHUNK)]
    return torch.cat(chunks).clamp(-1, 1)


def _pair(first: Tensor, second: Tensor) -> tuple[float, float]:
    return first.mean().item(), second.mean().item()
