"""The embedded stream: documents drawn from the emoji and the definitions without end.

Document i is a function of (seed, i) alone, so its number is its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrdpm.data.documents import Draft, Drafter
from mmrdpm.data.emoji import EmojiData, load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.mixture import Item
from mmrdpm.data.pictures import to_tensor
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer


class EmojiStream:
    """Concepts are drawn alike, then one of a concept's variants; texts are drawn alike."""

    def __init__(self, seed: int, drafter: Drafter, image_tokenizer: ImageTokenizer) -> None:
        self.seed, self.drafter, self.plan = seed, drafter, drafter.plan
        data = load_emoji(image_tokenizer.image_size)
        self.concepts = _variants(data)
        self.captions = [tuple(drafter.texts.encode(name)) for name in data.names]
        glosses = load_glosses()
        self.texts = glosses + [text[:1].upper() + text[1:] for text in glosses]
        self.latents = latents_of(image_tokenizer, data).numpy()

    def describe(self) -> str:
        """One line about the size of things."""
        return f"{len(self.concepts)} concepts, {len(self.texts)} texts"

    def fingerprints(self) -> dict[str, str]:
        """What the numbers of documents depend on."""
        return {"embedded": f"{self.describe()}, {len(self.latents)} pictures"}

    def documents(self, lane: int, lanes: int, place: Any) -> Iterator[Item]:
        """Every `lanes`-th document from number `lane` on; a place is how many were read."""
        for n in count(place or 0):
            yield Item(n, "embedded", self.draft(lane + n * lanes))

    def draft(self, index: int) -> Draft:
        """Document `index`."""
        random, plan = np.random.default_rng((self.seed, index)), self.plan
        task = random.random()
        if task >= plan.image_share + plan.caption_share:
            text = self.texts[random.integers(len(self.texts))]
            return self.drafter.text(tuple(self.drafter.texts.encode(text)))
        concept = self.concepts[random.integers(len(self.concepts))]
        image = concept[0] if random.random() < 0.5 else concept[random.integers(len(concept))]
        caption, noise_seed = self.captions[image], int(random.integers(2**62))
        if task >= plan.image_share:
            return self.drafter.captioning(self.latents[image], (caption, True), noise_seed)
        if random.random() < plan.caption_dropout:
            caption = ()
        return self.drafter.drawing(self.latents[image], caption, noise_seed, random)


@torch.no_grad()
def latents_of(tokenizer: ImageTokenizer, data: EmojiData) -> Tensor:
    """The latents of all pictures, float32 `[n, *grid, C]`, on the CPU."""
    device, chunks = tokenizer.codebook.codes.device, to_tensor(data.images).split(256)
    return torch.cat([tokenizer.autoencoder.encode(chunk.to(device)).cpu() for chunk in chunks])


def _variants(data: EmojiData) -> list[list[int]]:
    """The training pictures of each concept, the one without a skin tone first.

    Drawing a concept first, then a variant, keeps the many toned people from crowding out the
    rest; the variant without a tone is drawn half of the time.
    """
    concepts: dict[str, list[int]] = {}
    for index in sorted(data.indices("train"), key=lambda i: bool(data.tones[i])):
        concepts.setdefault(data.concepts[index], []).append(index)
    return list(concepts.values())
