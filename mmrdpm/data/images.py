"""Pictures alone, as an image tokeniser learns from them: the embedded ones, or any sources.

With sources, each image of a batch is a lane of its own (`rows.Lanes`), so a place in the data
means the same to any number of ranks and worker processes. Image i of a batch is with rank
`i % world_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmrdpm import distributed
from mmrdpm.data.documents import Draft, ImageDraft
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.faults import SkippedLog
from mmrdpm.data.loader import check_unchanged, merge_states
from mmrdpm.data.mixture import Mixture
from mmrdpm.data.pictures import PictureError, open_picture, picture_of, to_square, to_tensor
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken, Interleaved, Pair, Picture, Record
from mmrdpm.data.rows import Lanes
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.sources.files import IMAGE_SUFFIXES, find
from mmrdpm.errors import DataError, RecipeError

_LANCZOS = Image.Resampling.LANCZOS
_WITHOUT_PICTURES = ("glosses", "text", "cache")

Encode = Callable[[Tensor], Tensor]
"""Images `[B, 3, H, W]` to latents `[B, h, w, C]`."""


@dataclass(frozen=True)
class ImagePlan:
    """The `data` section of an image tokeniser's recipe.

    Attributes:
        sources: what is mixed, by name, as in a model's recipe; captions are not looked at, and a
            folder needs none. Without, the training pictures of the embedded emoji, padded to a
            square.
        crop: pad shows the whole picture on a white square; centre takes the largest square in
            the middle; random takes a square anywhere, of `min_scale` to all of the shorter side.
        flip: whether half of the pictures are mirrored.
        max_broken_share: more broken records than this stop the run.
        workers: processes per rank that read and decode, 0 for none.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    crop: Literal["pad", "centre", "random"] = "pad"
    min_scale: float = field(default=0.6, metadata={"min": 0.05, "max": 1.0})
    flip: bool = False
    max_broken_share: float = field(default=0.05, metadata={"min": 0.0, "max": 0.9})
    workers: int = field(default=0, metadata={"min": 0})

    def __post_init__(self) -> None:
        self.rows(1)  # checks the weights
        for name, source in self.sources.items():
            if source.type in _WITHOUT_PICTURES:
                raise RecipeError(
                    f"data.sources.{name}.type is {source.type}, which holds no pictures: leave it"
                    " out"
                )
        if not self.sources and (self.crop != "pad" or self.flip):
            raise RecipeError(
                "data.crop and data.flip are for data.sources: name some, or leave them out"
            )

    def rows(self, batch_size: int) -> DataPlan:
        """The plan of a stream with one picture in each of `batch_size` rows."""
        return DataPlan(
            sources=self.sources,
            rows=batch_size,
            seq_len=1,
            look_ahead=1,
            max_broken_share=self.max_broken_share,
            workers=self.workers,
        )


class Images(Protocol):
    """Batches of pictures, of which each rank gets its share."""

    def images(self, count: int, generator: torch.Generator) -> Tensor:
        """This rank's share of `count` images, float32 `[B, 3, size, size]` in [-1, 1]."""

    def encoded(
        self, count: int, generator: torch.Generator, encode: Encode
    ) -> tuple[Tensor, Tensor]:
        """Images and their latents; `encode` is the same at every call."""

    def state(self) -> dict[str, Any]:
        """The place in the data of all ranks together. All ranks must call it."""

    def mark(self) -> None:
        """Takes this place for the one to go back to."""

    def undo(self) -> None:
        """Goes back to the marked place."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place."""

    def figures(self) -> dict[str, float]:
        """For the log. All ranks must call it."""

    def describe(self) -> str:
        """One line about the size of things."""


def open_images(
    plan: ImagePlan, seed: int, size: int, batch_size: int, skipped_log: Path | None = None
) -> Images:
    """The pictures that a plan names, in batches of multiples of `batch_size`.

    Raises:
        RecipeError, DataError: the plan or a source cannot be used.
    """
    if not plan.sources:
        return EmbeddedImages(size)
    return StreamedImages(plan, seed, size, batch_size, skipped_log)


class EmbeddedImages:
    """The training pictures of the emoji, all in memory; a batch is drawn by the generator."""

    def __init__(self, size: int) -> None:
        data = load_emoji(size)
        self.all = to_tensor(data.images[data.indices("train")])
        self.latents: Tensor | None = None

    def images(self, count: int, generator: torch.Generator) -> Tensor:
        return self.all[self._draw(count, generator)]

    def encoded(
        self, count: int, generator: torch.Generator, encode: Encode
    ) -> tuple[Tensor, Tensor]:
        """All are encoded once, at the first call."""
        chosen = self._draw(count, generator)
        if self.latents is None:
            self.latents = encode(self.all)
        return self.all[chosen], self.latents[chosen.to(self.latents.device)]

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.all), (count,), generator=generator)
        return chosen[distributed.rank() :: distributed.world_size()]

    def state(self) -> dict[str, Any]:
        return {}

    def mark(self) -> None:
        pass  # see `restore`

    def undo(self) -> None:
        pass

    def restore(self, state: Mapping[str, Any]) -> None:
        pass  # a batch follows from its generator alone

    def figures(self) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return f"{len(self.all)} embedded pictures"


class StreamedImages:
    """Pictures of any sources, read lane by lane, cropped and mirrored at random."""

    def __init__(
        self, plan: ImagePlan, seed: int, size: int, batch_size: int, skipped_log: Path | None
    ) -> None:
        self.batch_size = batch_size
        sources = {n: open_source(n, c, captions=False) for n, c in plan.sources.items()}
        weights = {name: config.weight for name, config in plan.sources.items()}
        self.stream = Mixture(sources, weights, seed, Cropper(plan, size))
        rank, ranks = distributed.rank(), distributed.world_size()
        rows, log = plan.rows(batch_size), SkippedLog(skipped_log)
        self.rows = Lanes(self.stream, rows, (1,), rank, ranks, log)
        self.mark()

    def images(self, count: int, generator: torch.Generator) -> Tensor:
        """As `Images`; all ranks must call it.

        Raises:
            DataError: a source failed, or too many of its records are broken.
            SystemExit: so on another rank.
        """
        return distributed.on_all(lambda: self._read(count))

    def _read(self, count: int) -> Tensor:
        squares = []
        for _ in range(count // self.batch_size):
            rows = self.rows.next()
            squares += [image.image for row in rows for draft in row for image in draft.images]
        return to_tensor(np.stack(squares))

    def encoded(
        self, count: int, generator: torch.Generator, encode: Encode
    ) -> tuple[Tensor, Tensor]:
        images = self.images(count, generator)
        return images, encode(images)

    def state(self) -> dict[str, Any]:
        mine = {"data": self.stream.fingerprints(), **self.rows.state()}
        return merge_states(distributed.gather_objects(mine))

    def mark(self) -> None:
        self._marked = self.rows.state()

    def undo(self) -> None:
        self.rows.restore(self._marked)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises DataError if the data are not those that the place was saved for."""
        check_unchanged(self.stream.fingerprints(), state["data"])
        self.rows.restore(state)

    def figures(self) -> dict[str, float]:
        """Records left out since the run began, by all ranks, which must all call it."""
        lanes = [state for state in self.rows.state()["lanes"].values() if state]
        mine = sum(sum(state["broken"].values()) for state in lanes)
        return {"data/skipped": sum(distributed.gather_objects(mine))}

    def describe(self) -> str:
        return self.stream.describe()


class Cropper:
    """Records to square pixels: every picture of a record becomes a draft of its own."""

    def __init__(self, plan: ImagePlan, size: int) -> None:
        self.plan, self.size = plan, size

    def drafts(self, record: Record, random: np.random.Generator) -> Iterable[Draft] | Broken:
        """One draft per picture, or why there is none."""
        pictures: list[Picture] = []
        if isinstance(record, Pair):
            pictures = [record.image]
        elif isinstance(record, Interleaved):
            pictures = [part for part in record.parts if not isinstance(part, str)]
        elif isinstance(record, Broken):
            return record
        if not pictures:
            return Broken(record.key, "no picture")
        try:
            return [Draft((self._draft(picture, random),)) for picture in pictures]
        except PictureError as error:
            return Broken(record.key, error.cause, error.detail)

    def _draft(self, content: Picture, random: np.random.Generator) -> ImageDraft:
        # `clean` gives it the length of its grid, which is one position
        return ImageDraft(self.square(picture_of(content), random), noise_seed=0, clean=True)

    def square(self, picture: Image.Image, random: np.random.Generator) -> np.ndarray:
        """uint8 `[size, size, 3]` of one RGB picture."""
        if self.plan.crop == "pad":
            square = to_square(picture, self.size)
        elif self.plan.crop == "centre":
            square = _centre(picture, self.size)
        else:
            box = _anywhere(picture.size, self.plan.min_scale, random)
            square = np.asarray(picture.resize((self.size, self.size), _LANCZOS, box=box))
        mirrored = self.plan.flip and random.random() < 0.5
        return np.ascontiguousarray(square[:, ::-1]) if mirrored else square


def load_squares(folder: Path, size: int, count: int) -> np.ndarray:
    """Up to `count` pictures of a folder and below, the same at every call, cropped to the middle.

    Returns:
        uint8 `[n, size, size, 3]`.

    Raises:
        DataError: no such folder, no pictures in it, or one of them is broken.
    """
    paths = find(str(folder), IMAGE_SUFFIXES)
    chosen = sorted(np.random.default_rng(0).permutation(len(paths))[:count])
    return np.stack([_centre(open_picture(paths[i]), size) for i in chosen])


def _centre(picture: Image.Image, size: int) -> np.ndarray:
    return np.asarray(ImageOps.fit(picture, (size, size), _LANCZOS))


def _anywhere(
    size: tuple[int, int], min_scale: float, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a square in a picture of that width and height."""
    side = min(size) * random.uniform(min_scale, 1.0)
    left, top = (random.random() * (length - side) for length in size)
    return left, top, left + side, top + side


def check_batches(plan: ImagePlan, batch_size: int, codebook_batch: int) -> None:
    """Checks that all ranks get whole and equal shares.

    Raises:
        RecipeError: they do not.
        DataError: a batch cannot be dealt evenly to the ranks.
    """
    ranks = distributed.world_size()
    for name, size in (("batch_size", batch_size), ("codebook_batch", codebook_batch)):
        if size % ranks:
            raise DataError(
                f"train.{name} is {size}, which {ranks} ranks cannot share evenly: make it a"
                f" multiple of {ranks}"
            )
    if plan.sources and codebook_batch % batch_size:
        raise RecipeError(
            f"train.codebook_batch is {codebook_batch}: with data.sources it must be a multiple of"
            f" train.batch_size, {batch_size}"
        )
