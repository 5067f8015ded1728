"""A latent cache as a source; `mmrdpm.data.cache` writes it, and this is its format.

DIR/manifest.json             what it was made of and by which autoencoder
DIR/shard-00000.safetensors   latents/HxW   float16 [n, H, W, C], a tensor per bucket
                              records       int64 [records, 3]: H, W, row in that tensor
                              ends          int64 [records]: where a record's text ends in
                              texts         uint8: `[key, [caption, ...]]` as JSON, in UTF-8
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmrdpm import recipe
from mmrdpm.data.records import Broken, Indexed, Pair
from mmrdpm.data.sources.files import at_home
from mmrdpm.errors import DataError, RecipeError

MANIFEST = "manifest.json"
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Manifest:
    """What a cache was made of.

    Attributes:
        autoencoder: fingerprint of the encoder and its statistics, see `cache.fingerprint`.
        tokenizer: name of the image tokeniser, for messages.
        source: fingerprint of the source.
        shards: how many there are once it is finished.
        per_shard: records of the source in each; 0 for one shard per shard of the source.
        buckets: whether aspect ratios are kept.
        taken: the keys of the source, see `SourceConfig.taken`; "" where they were not noted.
    """

    autoencoder: str
    tokenizer: str
    source: str
    shards: int = field(metadata={"min": 0, "max": 99_999_999})
    per_shard: int = field(metadata={"min": 0})
    buckets: bool
    taken: str = ""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        return recipe.from_dict(Manifest, mapping, str(path))
    except OSError as error:
        raise DataError(
            f"{folder}: no latent cache ({MANIFEST}: {error.strerror}): name the folder of one"
            " source that mmrdpm data cache wrote"
        ) from None
    except (ValueError, RecipeError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {error}: make the cache anew") from None


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{index:05d}.safetensors"


class CachedLatents(Indexed):
    """The pairs of a finished cache.

    Raises:
        DataError: there is none, it is unfinished or damaged.
    """

    def __init__(self, path: str) -> None:
        self.folder = at_home(path)
        self.manifest = read_manifest(self.folder)
        paths = [shard_path(self.folder, i) for i in range(self.manifest.shards)]
        missing = sum(not path.is_file() for path in paths)
        if missing:
            raise DataError(
                f"{path}: {missing} of {len(paths)} shards of the cache are still to be made: go"
                " on with the same mmrdpm data cache command"
            )
        self.totals = np.cumsum([_count(path) for path in paths])
        if not len(self):
            raise DataError(f"{path}: the cache holds no records")

    def check_autoencoder(self, fingerprint: str) -> None:
        """Raises DataError unless the cache was made by that autoencoder."""
        if fingerprint != self.manifest.autoencoder:
            raise DataError(
                f"{self.folder}: its latents are of autoencoder {self.manifest.autoencoder[:12]}"
                f" ({self.manifest.tokenizer}), the run's image tokeniser has"
                f" {fingerprint[:12]}: name that tokeniser, or make the cache anew"
            )

    def __len__(self) -> int:
        return int(self.totals[-1]) if len(self.totals) else 0

    def record(self, index: int) -> Pair | Broken:
        shard = int(np.searchsorted(self.totals, index, side="right"))
        row = index - int(self.totals[shard - 1] if shard else 0)
        try:
            return _pair(_open(shard_path(self.folder, shard)), row)
        except (
            OSError,
            SafetensorError,
            ValueError,
            LookupError,
            ArithmeticError,
            TypeError,
            RecursionError,
        ) as error:
            return Broken(f"{self.folder}#{index}", "cache shard cannot be read", str(error))

    def fingerprint(self) -> str:
        return f"{self.manifest.autoencoder} {self.manifest.source} {len(self)}"


def _pair(file: Any, row: int) -> Pair:
    height, width, place = (int(n) for n in file.get_slice("records")[row])
    ends = file.get_slice("ends")
    begin, end = (int(ends[row - 1]) if row else 0), int(ends[row])
    if not (0 <= begin <= end and place >= 0):
        raise ValueError("its places are none")
    key, captions = json.loads(bytes(file.get_slice("texts")[begin:end]))
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise ValueError("its captions are no texts")
    if not isinstance(key, str) or not captions:
        raise ValueError("it has no key or no caption")
    latents = file.get_slice(f"latents/{height}x{width}")[place]
    if latents.dtype != np.float16 or not np.isfinite(latents).all():
        raise ValueError("its latents are no finite float16")
    if latents.ndim != 3 or latents.shape[:2] != (height, width):
        raise ValueError(f"its latents are not [{height}, {width}, C]")
    return Pair(key, latents, tuple(captions))


@lru_cache(_OPEN_SHARDS)
def _open(path: Path) -> Any:
    return safe_open(path, framework="np")


def _count(path: Path) -> int:
    try:
        with safe_open(path, framework="np") as file:
            return file.get_slice("ends").get_shape()[0]
    except (OSError, SafetensorError, IndexError) as error:
        raise DataError(f"{path}: damaged ({error}): delete it and make it anew") from None
