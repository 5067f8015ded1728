"""How near a picture is to another: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW = 11  # pixels of SSIM's window


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image; float32 `[B, 3, H, W]` in [-1, 1] -> `[B]`.

    Equal images give infinity.
    """
    error = (images - references).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, at most 1; float32 `[B, 3, H, W]` in [-1, 1] -> `[B]`.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861), eq. 13: Gaussian window of 11 pixels with
    sigma 1.5, K1 = 0.01, K2 = 0.03, channels apart, borders left out.
    """
    place = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    line = torch.exp(-(place**2) / (2 * 1.5**2))
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return conv2d(x.flatten(0, 1)[:, None], window.to(x.device))

    x, y = (images + 1) / 2, (references + 1) / 2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return likeness.reshape(len(images), -1).mean(1)
