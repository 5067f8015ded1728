"""Measures a model on the embedded data: does it draw what was named, and name what it sees?

Drawn pictures are judged by retrieval: is the named emoji among the ten nearest of all those
without a skin tone? Captions are judged by equality with the emoji's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mmrdpm.api import Model
from mmrdpm.data.emoji import EmojiData, Split, load_emoji
from mmrdpm.metrics.features import EfficientNetLite0, ranks
from mmrdpm.metrics.proportion import Proportion

_NEAREST = 10
_FULL_SIZE = 72  # pixels of the pictures as they come

GROUPS: dict[str, Split] = {
    "training concepts": "train",
    "held-out concepts": "held_out_concept",
    "held-out skin tones": "held_out_tone",
}


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Attributes:
        names: at most this many emoji of each group.
        seed: chooses them; every picture is drawn with it too.
    """

    names: int = field(default=200, metadata={"min": 1})
    seed: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class Figures:
    """What came out for one group of emoji.

    Attributes:
        drawn: the named emoji is among the 10 nearest.
        real: the same for the emoji's own picture at the model's size, the most to be reached.
        coded: the same for that picture through the image tokeniser.
        captioned: the caption of the emoji's picture is its name.
        concept: the caption names the concept, whatever the skin tone.
        tone: of the concept's variants the drawn picture is nearest the named one; None where
            names have no tone.
    """

    drawn: Proportion
    real: Proportion
    coded: Proportion
    captioned: Proportion
    concept: Proportion
    tone: Proportion | None


def evaluate(model: Model, suite: Suite, say: Callable[[str], None]) -> dict[str, Figures]:
    """All figures per group; `say` is told what goes on.

    Raises:
        DataError: the packages of the extra `eval` are not installed.
    """
    features = EfficientNetLite0()
    data = load_emoji(_FULL_SIZE)
    say(f"features of {len(data.untoned())} emoji")
    judge = Judge(data, features)
    figures = {}
    for group, split in GROUPS.items():
        chosen = choose(data, split, suite)
        say(f"{group}: drawing and captioning {len(chosen)}")
        figures[group] = _measure(model, judge, chosen, suite.seed)
    return figures


def choose(data: EmojiData, split: Split, suite: Suite) -> list[int]:
    """Emoji of a group, at random; without skin tones, unless the group is about them."""
    with_picture = {data.concepts[i] for i in data.untoned()}
    wanted = [
        i
        for i in data.indices(split)
        if bool(data.tones[i]) == (split == "held_out_tone") and data.concepts[i] in with_picture
    ]
    random = np.random.default_rng(suite.seed)
    count = min(suite.names, len(wanted))
    return sorted(random.choice(wanted, count, replace=False).tolist())


class Judge:
    """The gallery of emoji without a skin tone, and their features."""

    def __init__(self, data: EmojiData, features: EfficientNetLite0) -> None:
        self.data, self.features = data, features
        untoned = data.untoned()
        self.place = {data.concepts[i]: place for place, i in enumerate(untoned)}
        self.gallery = features(self.pictures(untoned))

    def pictures(self, chosen: Sequence[int]) -> list[Image.Image]:
        """The true pictures, at full size."""
        return [Image.fromarray(self.data.images[i]) for i in chosen]

    def named(self, pictures: Sequence[Image.Image], chosen: Sequence[int]) -> Proportion:
        """How many pictures have their concept among the nearest."""
        truths = [self.place[self.data.concepts[i]] for i in chosen]
        places = ranks(self.features(pictures), self.gallery, truths)
        return Proportion(sum(place <= _NEAREST for place in places), len(places))

    def right_tone(self, pictures: Sequence[Image.Image], chosen: Sequence[int]) -> Proportion:
        """How many pictures are nearer their own variant than the other skin tones."""
        hits = 0
        for picture, index in zip(pictures, chosen, strict=True):
            concept = self.data.concepts[index]
            variants = [i for i, c in enumerate(self.data.concepts) if c == concept]
            gallery = self.features(self.pictures(variants))
            hits += ranks(self.features([picture]), gallery, [variants.index(index)]) == [1]
        return Proportion(hits, len(chosen))


def _measure(model: Model, judge: Judge, chosen: list[int], seed: int) -> Figures:
    data, size = judge.data, model.images.image_size
    small = load_emoji(size)
    real = [Image.fromarray(small.images[i]) for i in chosen]
    names, concepts = [data.names[i] for i in chosen], [data.concepts[i] for i in chosen]
    drawn, captions = model.generate(names, seed=seed), model.caption(real)
    toned = any(data.tones[i] for i in chosen)
    pairs = list(zip(captions, names, concepts, strict=True))
    return Figures(
        drawn=judge.named(drawn, chosen),
        real=judge.named(real, chosen),
        coded=judge.named(model.reconstruct(real), chosen),
        captioned=Proportion(sum(caption == name for caption, name, _ in pairs), len(pairs)),
        concept=Proportion(sum(c.startswith(concept) for c, _, concept in pairs), len(pairs)),
        tone=judge.right_tone(drawn, chosen) if toned else None,
    )
