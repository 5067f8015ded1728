"""Writes latent caches: what the autoencoder makes of every image, once, for many epochs.

Which records a shard holds follows from its number alone, and a shard's file appears when it is
complete; so any number of processes can share the work without talking to each other, and an
interrupted cache goes on with the shards that are missing. Format: `sources/cached.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmrdpm import weights
from mmrdpm.data.pictures import PictureError, picture_of, to_square, to_tensor
from mmrdpm.data.records import Broken, Indexed, Pair, Record, Sharded, Source
from mmrdpm.data.sources.cached import MANIFEST, Manifest, read_manifest, shard_path
from mmrdpm.errors import CheckpointError, DataError
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer

_BATCH = 32  # images through the autoencoder at once
_MOST_OBLONG = 2.0  # sides of the most oblong bucket


def fingerprint(tokenizer: ImageTokenizer) -> str:
    """SHA-256 of all that latents depend on: the encoder and the latents' statistics."""
    digest = hashlib.sha256(repr(tokenizer.config.autoencoder).encode())
    for name, tensor in sorted(tokenizer.autoencoder.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class CacheWriter:
    """The cache of one source.

    Args:
        name: of the tokeniser, for messages.
        per_shard: records in a shard, for sources that have numbers.
        buckets: keep aspect ratios: each image is cropped to the nearest of some sizes of about
            the tokeniser's number of pixels. Else it is padded to a square, as in training.
        taken: what is taken of the source's data, as `SourceConfig.taken` has it.

    Raises:
        DataError: the folder holds a cache of other data or of another autoencoder.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: ImageTokenizer,
        folder: Path,
        name: str,
        per_shard: int = 1000,
        buckets: bool = False,
        taken: str = "",
    ) -> None:
        self.source, self.tokenizer, self.folder = source, tokenizer, folder
        shards = (
            -(-len(source) // per_shard)
            if isinstance(source, Indexed)
            else source.num_shards()
            if isinstance(source, Sharded)
            else 0
        )
        self.manifest = Manifest(
            autoencoder=fingerprint(tokenizer),
            tokenizer=name,
            source=source.fingerprint(),
            shards=shards,
            per_shard=per_shard if isinstance(source, Indexed) else 0,
            buckets=buckets,
            taken=taken,
        )
        shape = tokenizer.config.autoencoder
        self.sizes = bucket_sizes(shape.image_size, shape.factor) if buckets else []
        self._begin()

    def _begin(self) -> None:
        """Writes the manifest, or checks that the one there is the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            partial = self.folder / f"{MANIFEST}.{uuid4().hex}.partial"  # several may begin it
            self.manifest.write(partial)
            os.replace(partial, self.folder / MANIFEST)
        there = read_manifest(self.folder)
        for key, old in vars(replace(there, tokenizer=self.manifest.tokenizer)).items():
            new = getattr(self.manifest, key)
            if old != new and not (key == "taken" and not old):  # older ones do not say
                told = f"{key} {str(old)[:60]}, not {str(new)[:60]}"
                if key == "source":
                    told = "other records, or files of other names or sizes"
                raise DataError(
                    f"{self.folder}: holds a cache with {told} (its image tokeniser is"
                    f" {there.tokenizer}, the one given {self.manifest.tokenizer}): name another"
                    " folder"
                )

    def missing(self) -> list[int]:
        """The shards that are still to be made."""
        every = range(self.manifest.shards)
        return [i for i in every if not shard_path(self.folder, i).exists()]

    def totals(self) -> tuple[int, Counter[str]]:
        """Over the shards that are there: records seen, and those left out by cause.

        Raises:
            DataError: a shard is damaged, or another kind of file.
        """
        seen, broken = 0, Counter[str]()
        for index in set(range(self.manifest.shards)) - set(self.missing()):
            path = shard_path(self.folder, index)
            try:
                causes = Counter[str](weights.metadata(path)["skipped"])
                seen += weights.shapes(path)["ends"][0] + causes.total()
            except (CheckpointError, LookupError, TypeError):
                raise DataError(
                    f"{path}: is damaged, or no shard of a latent cache: delete it and run the"
                    " same command again, which makes it anew"
                ) from None
            broken += causes
        return seen, broken

    def write(self, index: int) -> tuple[int, list[Broken]]:
        """Makes one shard; gives the number of its records, and those left out.

        Raises:
            DataError: the source cannot be read, or holds other things than pairs.
            CheckpointError: the shard could not be written.
        """
        shard = _Shard(self.tokenizer)
        skipped = []
        for record in self._records(index):
            try:
                if isinstance(record, Pair):
                    shard.add(record, self._pixels(record))
                elif isinstance(record, Broken):
                    skipped.append(record)
                else:
                    raise DataError(
                        f"{record.key}: is no image-text pair: leave its source out of the recipe"
                        " for caching"
                    )
            except PictureError as error:
                skipped.append(Broken(record.key, error.cause, error.detail))
        causes = Counter(broken.cause for broken in skipped)
        weights.save(shard.tensors(), shard_path(self.folder, index), {"skipped": causes})
        return len(shard.texts), skipped

    def write_by_ray(self, shards: Sequence[int]) -> Iterator[tuple[int, list[Broken]]]:
        """As `write`, shared out by Ray Data over a cluster whose nodes all see the folder.

        Where the tokeniser is on CUDA each worker takes one GPU.

        Raises:
            DataError: Ray is not installed, or its cluster has no GPU where this machine uses one.
        """
        try:
            import ray.data
        except ModuleNotFoundError:
            raise DataError("--ray needs: pip install 'mmrdpm[ray]'") from None

        device = self.tokenizer.codebook.codes.device.type
        ray.init(ignore_reinit_error=True)
        if device == "cuda" and not ray.cluster_resources().get("GPU"):  # else it waits for ever
            raise DataError(
                "--ray: this machine encodes on a GPU, but Ray's cluster has none: start its nodes"
                " with GPUs, or hide this one by CUDA_VISIBLE_DEVICES="
            )
        self.tokenizer.cpu()  # travels so: where a worker starts, no GPU is known to be its own
        try:
            rows = ray.data.from_items([{"shard": i} for i in shards]).map(
                _RayWorker,
                fn_constructor_args=(self, device),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, len(shards))),
                num_gpus=1 if device == "cuda" else None,
            )
            for row in rows.iter_rows() if shards else ():
                count, skipped = json.loads(row["made"])
                yield count, [Broken(**broken) for broken in skipped]
        finally:
            self.tokenizer.to(device)

    def _records(self, index: int) -> Iterator[Record]:
        if isinstance(self.source, Sharded):
            yield from self.source.shard(index)
        elif isinstance(self.source, Indexed):
            begin = index * self.manifest.per_shard
            for i in range(begin, min(begin + self.manifest.per_shard, len(self.source))):
                yield self.source.record(i)

    def _pixels(self, record: Pair) -> np.ndarray:
        """uint8 `[H, W, 3]`."""
        image = record.image
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            raise DataError(f"{record.key}: is cached already: leave the source out of the recipe")
        picture = picture_of(image)
        if not self.sizes:
            return to_square(picture, self.tokenizer.image_size)
        size = nearest_size(picture.size, self.sizes)
        return np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


class _RayWorker:
    """A process of Ray's with a writer of its own, on the device that Ray gave it."""

    def __init__(self, writer: CacheWriter, device: str) -> None:
        writer.tokenizer.to(device)
        self.writer = writer

    def __call__(self, row: dict[str, int]) -> dict[str, str]:
        count, skipped = self.writer.write(row["shard"])
        return {"made": json.dumps([count, [vars(broken) for broken in skipped]])}


class _Shard:
    """The records of one shard; images of a size go through the autoencoder in batches."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer
        self.device = tokenizer.codebook.codes.device
        self.texts: list[bytes] = []
        self.places: list[tuple[int, int, int]] = []
        self.waiting: dict[tuple[int, int], list[np.ndarray]] = {}
        self.latents: dict[tuple[int, int], list[Tensor]] = {}
        self.counts: Counter[tuple[int, int]] = Counter()

    def add(self, record: Pair, pixels: np.ndarray) -> None:
        """Takes one pair."""
        factor = self.tokenizer.config.autoencoder.factor
        grid = (pixels.shape[0] // factor, pixels.shape[1] // factor)
        self.texts.append(json.dumps([record.key, record.captions]).encode())
        self.places.append((*grid, self.counts[grid]))
        self.counts[grid] += 1
        self.waiting.setdefault(grid, []).append(pixels)
        if len(self.waiting[grid]) == _BATCH:
            self._encode(grid)

    @torch.no_grad()
    def _encode(self, grid: tuple[int, int]) -> None:
        if waiting := self.waiting.pop(grid, []):
            images = to_tensor(np.stack(waiting)).to(self.device)
            latents = self.tokenizer.autoencoder.encode(images)
            self.latents.setdefault(grid, []).append(latents.half().cpu())

    def tensors(self) -> dict[str, Tensor]:
        """All of the shard, as its file holds it."""
        for grid in list(self.waiting):
            self._encode(grid)
        ends = np.cumsum([len(text) for text in self.texts], dtype=np.int64)
        return {
            "records": torch.tensor(self.places, dtype=torch.int64).reshape(-1, 3),
            "ends": torch.from_numpy(ends),
            "texts": torch.frombuffer(bytearray(b"".join(self.texts) or b"\0"), dtype=torch.uint8),
            **{f"latents/{h}x{w}": torch.cat(parts) for (h, w), parts in self.latents.items()},
        }


def bucket_sizes(image_size: int, factor: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels of about `image_size ** 2` pixels, never more.

    Both are multiples of the autoencoder's factor, and no side is over twice the other.
    """
    side = image_size // factor
    sizes = set()
    for short in range(1, side + 1):
        long = side * side // short
        if long <= _MOST_OBLONG * short:
            sizes |= {(short * factor, long * factor), (long * factor, short * factor)}
    return sorted(sizes)


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to the picture's, by the ratio of the two."""
    ratio = np.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(np.log(s[0] / s[1]) - ratio), s))
