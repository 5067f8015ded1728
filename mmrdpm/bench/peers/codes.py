"""Image codes of the peers that draw tokens: residual quantisation of the same latents.

The sides of the levels make it what a peer needs: `(4, 4, 4, 4)` is the residual quantisation of
RQ-Transformer (Lee et al. 2022, arXiv 2203.01941, eq. 3), growing sides are the multi-scale one of
VAR (Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2) without its convolutions. One codebook
is shared by all levels, with a gain each, and is fitted as ours is, so that codebooks compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from mmrdpm import weights
from mmrdpm.rdpm.codebook import Codebook, CodebookFit

_FITS, _PICTURES = 220, 512  # updates of the fit, and pictures in each, as of emoji-rdpm-32


class ResidualCodes(nn.Module):
    """Latents `[B, h, w, C]` <-> code indices, int64 `[B, s_l * s_l]` for each level l."""

    def __init__(self, sides: Sequence[int], grid: Sequence[int], size: int, channels: int) -> None:
        super().__init__()
        self.sides, self.grid = tuple(sides), tuple(grid)
        self.codebook = Codebook(len(self.sides), size, channels)

    @property
    def lengths(self) -> list[int]:
        """Codes per level."""
        return [side * side for side in self.sides]

    def encode(self, latents: Tensor) -> list[Tensor]:
        """The codes of every level, coarse to fine."""
        codes: list[Tensor] = []

        def quantise(residual: Tensor, level: int) -> Tensor:
            codes.append(self.codebook.nearest(residual, level))
            return self.codebook.lookup(codes[-1], level)

        self._walk(latents, quantise)
        return [level.flatten(1) for level in codes]

    def partial(self, codes: Sequence[Tensor]) -> Tensor:
        """The latents `[B, h, w, C]` as far as the first levels' codes tell."""
        parts = []
        for level, indices in enumerate(codes, 1):
            side = self.sides[level - 1]
            squares = self.codebook.lookup(indices.unflatten(1, (side, side)), level)
            parts.append(_resize(squares, self.grid))
        return torch.stack(parts).sum(0)

    def coarse(self, latents: Tensor, level: int) -> Tensor:
        """Latents at the size of a level (1 is the first), `[B, s * s, C]`."""
        return _shrink(latents, self.sides[level - 1]).flatten(1, 2)

    def fit(self, latents: Tensor, seed: int) -> None:
        """Fits codebook and gains to latents `[n, h, w, C]` by EMA k-means."""
        fit, generator = CodebookFit(self.codebook), torch.Generator().manual_seed(seed)
        for _ in range(_FITS):
            chosen = torch.randint(len(latents), (_PICTURES,), generator=generator)
            self._walk(latents[chosen], lambda r, level: fit.observe(r, level, generator))

    def _walk(self, latents: Tensor, quantise: Callable[[Tensor, int], Tensor]) -> None:
        rest = latents
        for level, side in enumerate(self.sides, 1):
            rest = rest - _resize(quantise(_shrink(rest, side), level), self.grid)


def fitted(codes: ResidualCodes, latents: Tensor, seed: int, path: Path) -> ResidualCodes:
    """The codes fitted to latents; kept in a file, so that a resumed run has the same."""
    if path.exists():
        weights.load_into(codes, path)
    else:
        codes.fit(latents, seed)
        weights.save(codes.state_dict(), path)
    return codes.requires_grad_(False)


def _shrink(latents: Tensor, side: int) -> Tensor:
    return adaptive_avg_pool2d(latents.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def _resize(latents: Tensor, grid: Sequence[int]) -> Tensor:
    if latents.shape[1:3] == tuple(grid):
        return latents
    large = interpolate(latents.permute(0, 3, 1, 2), tuple(grid), mode="bicubic")
    return large.permute(0, 2, 3, 1)
