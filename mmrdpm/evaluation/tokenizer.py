"""Measures tokenizers: what is lost, and how well the codes are used; and the suite `tokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrdpm.data.emoji import EmojiData, load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.images import load_squares
from mmrdpm.data.pictures import contact_sheet, to_pictures, to_tensor
from mmrdpm.errors import DataError
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.figure import Figure, digest_of_pictures
from mmrdpm.evaluation.part import Part, Shown
from mmrdpm.evaluation.store import Store
from mmrdpm.evaluation.suite import GROUPS, TokenizerSuite
from mmrdpm.metrics.distance import LEAST_OF_KERNEL
from mmrdpm.metrics.features import EfficientNetLite0
from mmrdpm.metrics.interval import AT_LEAST_0, SHARE, bootstrap
from mmrdpm.metrics.reconstruction import WINDOW, psnr, ssim
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.rdpm.trajectory import walk
from mmrdpm.rdpm.usage import perplexity
from mmrdpm.text_tokenizer import TextTokenizer

_PIXELS = 2**18  # at once: 256 pictures of 32x32, four of 256x256
_SHOWN = 12  # pictures in the report
_PLENTY = 4  # codes seen for each of a codebook: equal use of them all would show 88%
WAYS = ("autoencoder", "codes")
_OWN = "pictures"  # the group of a user's own


@dataclass(frozen=True)
class ImageFigures:
    """Of every picture; the autoencoder alone is the limit that codes can reach.

    Attributes:
        images: by way, float32 `[B, 3, H, W]`, the autoencoder's own reconstruction and that
            from the codes.
        psnr, ssim: by way, float32 `[B]`.
        latent_error: float32 `[T, B]`, mean squared distance from the trajectory after each
            step, T first; the latent's own variance is 1.
        code_indices: int64 `[T, B, N]`, T first.
        codebook_sizes: how many codes each step has, T first.
    """

    images: dict[str, Tensor]
    psnr: dict[str, Tensor]
    ssim: dict[str, Tensor]
    latent_error: Tensor
    code_indices: Tensor
    codebook_sizes: tuple[int, ...]

    @property
    def usage(self) -> list[float]:
        """Codebook perplexity of each step over the codes it has, T first."""
        steps = zip(self.code_indices, self.codebook_sizes, strict=True)
        return [perplexity(codes, size) / size for codes, size in steps]


@torch.no_grad()
def measure_images(tokenizer: ImageTokenizer, squares: np.ndarray, seed: int = 0) -> ImageFigures:
    """Figures of uint8 pictures `[B, size, size, 3]`; picture i takes its noise from `seed + i`.

    Raises:
        DataError: there are none, or their size is not the tokeniser's, or below SSIM's window.
    """
    _check(tokenizer, squares)
    size = max(1, _PIXELS // tokenizer.image_size**2)
    parts = [
        _measured(tokenizer, to_tensor(squares[begin : begin + size]), seed + begin)
        for begin in range(0, len(squares), size)
    ]

    def joined(what: str) -> dict[str, Tensor]:
        return {way: torch.cat([getattr(part, what)[way] for part in parts]) for way in WAYS}

    return ImageFigures(
        images=joined("images"),
        psnr=joined("psnr"),
        ssim=joined("ssim"),
        latent_error=torch.cat([part.latent_error for part in parts], dim=1),
        code_indices=torch.cat([part.code_indices for part in parts], dim=1),
        codebook_sizes=parts[0].codebook_sizes,
    )


def _measured(tokenizer: ImageTokenizer, images: Tensor, seed: int) -> ImageFigures:
    """Of as many as go through the autoencoder at once."""
    latents = tokenizer.autoencoder.encode(images)
    noise = tokenizer.noise(range(seed, seed + len(images)))
    codebook, errors, codes, state = tokenizer.codebook, [], [], latents
    for t, x, residual, code_indices in walk(tokenizer.trajectory, codebook, latents, noise):
        step = codebook.lookup(code_indices, t)
        errors.append((residual - step).square().flatten(1).mean(1))
        codes.append(code_indices.flatten(1))
        state = x + step
    decoded = (tokenizer.autoencoder.decode(z).clamp(-1, 1) for z in (latents, state))
    made = dict(zip(WAYS, decoded, strict=True))
    return ImageFigures(
        images=made,
        psnr={way: psnr(x, images) for way, x in made.items()},
        ssim={way: ssim(x, images) for way, x in made.items()},
        latent_error=torch.stack(errors),
        code_indices=torch.stack(codes),
        codebook_sizes=tuple(codebook.sizes[::-1]),
    )


def codebook_use(found: ImageFigures) -> list[Figure]:
    """Perplexity over size at every step; its interval is over the choice of pictures."""
    figures, steps = [], range(len(found.codebook_sizes), 0, -1)
    rows = zip(steps, found.code_indices, found.codebook_sizes, found.usage, strict=True)
    for t, codes, size, value in rows:

        def use(chosen: np.ndarray, codes: Tensor = codes, size: int = size) -> float:
            return perplexity(codes[chosen], size) / size

        interval = bootstrap(use, value, len(codes), limits=SHARE)
        protocol = {
            "evaluator": "perplexity of the codes over their number",
            "count": len(codes),
            "t": t,
            "codebook_size": size,
        }
        name = f"codebook use at timestep {t}"
        note = few(codes.numel(), size)
        figures.append(Figure(name, value, interval, "of codebook", len(codes), protocol, note))
    return figures


@dataclass(frozen=True)
class TextFigures:
    """How long texts become; `broken` counts those that no round trip brings back."""

    texts: int
    size: int
    bytes_per_token: float
    broken: int


def measure_texts(tokenizer: TextTokenizer) -> TextFigures:
    """Figures over the embedded names and definitions."""
    texts = load_emoji(8).names + load_glosses()
    ids = [tokenizer.encode(text) for text in texts]
    broken = sum(tokenizer.decode(i) != text for i, text in zip(ids, texts, strict=True))
    length = sum(len(text.encode()) for text in texts)
    return TextFigures(len(texts), tokenizer.size, length / sum(map(len, ids)), broken)


class TokenizerEvaluation:
    """One suite over one image tokeniser.

    Raises:
        DataError: a group is smaller than a metric needs, or the suite's pictures cannot be read.
    """

    def __init__(self, tokenizer: ImageTokenizer, suite: TokenizerSuite, store: Store) -> None:
        self.tokenizer, self.suite, self.store = tokenizer, suite, store
        size = tokenizer.image_size
        if suite.images:
            self.chosen = {_OWN: load_squares(Path(suite.images), size, suite.names)}
        else:
            data = load_emoji(size)
            self.chosen = {name: data.images[_choose(data, name, suite)] for name in suite.groups}
        self.measured: dict[str, ImageFigures] = {}
        for name, squares in self.chosen.items():
            for metric in suite.metrics:
                least = LEAST_OF_KERNEL if metric == "kernel_distance" else 2
                if len(squares) < least:
                    raise DataError(
                        f"{metric} needs at least {least} pictures, but {name!r} has"
                        f" {len(squares)}: raise names, or give more pictures"
                    )

    def parts(self) -> Iterator[Part]:
        """Everything to compute, in order."""
        for group, squares in self.chosen.items():
            for metric in self.suite.metrics:

                def make(metric: str = metric, group: str = group) -> Sequence[Figure]:
                    return self._named(group, getattr(self, metric)(group))

                of = [metric, self.suite.seed, self._protocol(group, squares)]
                yield Part(f"{metric}, {group}", of, make)

    def psnr(self, group: str) -> list[Figure]:
        values = self._measure(group).psnr
        how = {"evaluator": "PSNR, the mean over pictures"}
        return [Figure.mean(f"PSNR, {w}", v.tolist(), "dB", how) for w, v in values.items()]

    def ssim(self, group: str) -> list[Figure]:
        values = self._measure(group).ssim
        how = {"evaluator": "SSIM, window of 11 pixels"}
        return [
            Figure.mean(f"SSIM, {w}", v.tolist(), "", how, (-1.0, 1.0)) for w, v in values.items()
        ]

    def kernel_distance(self, group: str) -> list[Figure]:
        return self._distances(group, partial(drawn.kid, paired=True))

    def frechet_distance(self, group: str) -> list[Figure]:
        return self._distances(group, drawn.frechet)

    def codebook_use(self, group: str) -> list[Figure]:
        return codebook_use(self._measure(group))

    def latent_error(self, group: str) -> list[Figure]:
        errors = self._measure(group).latent_error
        steps = range(self.tokenizer.num_timesteps, 0, -1)
        how = {"evaluator": "mean squared distance from the trajectory"}
        return [
            Figure.mean(
                f"latent error at timestep {t}",
                e.tolist(),
                "of variance",
                {**how, "t": t},
                AT_LEAST_0,
            )
            for t, e in zip(steps, errors, strict=True)
        ]

    def shown(self) -> Iterator[Shown]:
        """Pictures for the report: as they are, by the autoencoder, through the codes."""
        for group, squares in self.chosen.items():
            made = self._measure(group).images
            rows = [[Image.fromarray(square) for square in squares[:_SHOWN]]]
            rows += [to_pictures(made[way][:_SHOWN]) for way in WAYS]
            title = f"Real, by the autoencoder, through the codes: {group}"
            yield Shown(title, contact_sheet(rows, 2))

    @cached_property
    def features(self) -> EfficientNetLite0:
        return EfficientNetLite0()

    def _distances(self, group: str, distance: Callable[..., Figure]) -> list[Figure]:
        real = [Image.fromarray(square) for square in self.chosen[group]]
        found = self._measure(group).images
        return [
            replace(figure, name=f"{figure.name}, {way}")
            for way in WAYS
            for figure in [distance(self.features, to_pictures(found[way]), real)]
        ]

    def _measure(self, group: str) -> ImageFigures:
        if group not in self.measured:
            squares = self.chosen[group]
            self.measured[group] = measure_images(self.tokenizer, squares, self.suite.seed)
        return self.measured[group]

    def _named(self, group: str, figures: Sequence[Figure]) -> list[Figure]:
        protocol = self._protocol(group, self.chosen[group])
        return [
            replace(f, name=f"tokenizer/{group}/{f.name}", protocol={**protocol, **f.protocol})
            for f in figures
        ]

    def _protocol(self, group: str, squares: np.ndarray) -> dict:
        return {
            "data": group if self.suite.images else f"Twemoji, {group}",
            "data_sha256": digest_of_pictures([Image.fromarray(s) for s in squares], ()),
            "count": len(squares),
            "resolution": f"{squares.shape[2]}x{squares.shape[1]}",
            **({"preprocessing": "cropped to the middle, Lanczos"} if self.suite.images else {}),
            "seed": self.suite.seed,
        }


def _choose(data: EmojiData, group: str, suite: TokenizerSuite) -> list[int]:
    indices = data.indices(GROUPS[group])
    random = np.random.default_rng(suite.seed)
    count = min(suite.names, len(indices))
    return sorted(random.choice(indices, count, replace=False).tolist())


def few(codes: int, size: int) -> str:
    """What a reader has to know where perplexity is that of the sample rather than of the codes."""
    if codes >= _PLENTY * size:
        return ""
    most = f", at most {codes / size:.1%} of them" if codes < size else ""
    return f"too low: {codes:,} codes cannot show how evenly {size:,} are used{most}"


def _check(tokenizer: ImageTokenizer, squares: np.ndarray) -> None:
    if not len(squares):
        raise DataError("an image tokeniser cannot be measured on an empty data set")
    if tokenizer.image_size < WINDOW:
        raise DataError(
            f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, and the tokeniser's have"
            f" {tokenizer.image_size}: measure one of larger pictures"
        )
    if squares.shape[1:3] != (tokenizer.image_size, tokenizer.image_size):
        raise DataError(
            f"mismatched resolutions: pictures of {squares.shape[2]}x{squares.shape[1]}, a"
            f" tokeniser of {tokenizer.image_size}x{tokenizer.image_size}: resize the pictures"
        )
