"""Prints the packing table of docs/data.md: useful tokens by row length and look-ahead.

With a model's recipe (`python scripts/packing.py recipes/emoji_cpu.yaml data.look_ahead=16`) it
prints those of the first batches that a run of that recipe would train on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count

import numpy as np

from mmrdpm import recipe, shipped, text_tokenizer
from mmrdpm.cli.common import status_of
from mmrdpm.data.documents import Draft
from mmrdpm.data.loader import Loader
from mmrdpm.data.mixture import Item
from mmrdpm.data.packing import Lane
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary

BATCHES = 50  # of a recipe
ROWS, SEED, STEPS = 400, 0, 4
MIXES = {  # positions of an image; mean and deviation of the logarithm of a text's length; row
    "16x16, web texts": (256, 5.5, 1.0, (8192, 4096, 2048)),
    "4x4, definitions": (16, 2.8, 0.3, (256,)),
}


def lengths(cells: int, mean: float, deviation: float) -> Iterator[int]:
    """55% caption -> image, 25% image -> caption, 20% text."""
    for n in count():
        random = np.random.default_rng((SEED, n))
        task = random.random()
        caption = int(np.clip(random.lognormal(2.7, 0.6), 2, 128))
        if task < 0.8:
            yield (STEPS * cells + caption + 2) if task < 0.55 else (cells + caption + 4)
        else:
            yield max(8, int(random.lognormal(mean, deviation)))


def useful(cells: int, mean: float, deviation: float, row: int, look_ahead: int) -> float:
    """The share of tokens that are no padding."""
    fitting = (n for n in lengths(cells, mean, deviation) if n <= row)
    items = (Item(i, "", Draft(((0,) * n,))) for i, n in enumerate(fitting))
    lane = Lane(lambda _: items, lambda draft: draft.length(()), row, look_ahead, 0.0)
    return sum(draft.length(()) for _ in range(ROWS) for draft in lane.row()[0]) / ROWS / row


def of_recipe(path: str, overrides: list[str]) -> float:
    """The share in the first batches of a run."""
    loaded = recipe.load(ModelRecipe, path, overrides)
    images = image_tokenizer.load(shipped.resolve("tokenizers", loaded.tokenizers.image))
    texts = text_tokenizer.load(shipped.resolve("tokenizers", loaded.tokenizers.text))
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    loader = Loader(loaded.data, loaded.train.seed, images, texts, vocabulary)
    batches = (loader.batch().layout.document_ids for _ in range(BATCHES))
    return float(np.mean([(ids >= 0).double().mean() for ids in batches]))


def table() -> None:
    for mix, (cells, mean, deviation, rows) in MIXES.items():
        for row in rows:
            shares = [useful(cells, mean, deviation, row, ahead) for ahead in (1, 4, 16, 64)]
            print(f"{mix:18} {row:5}", *(f"{share:6.1%}" for share in shares))


def main(arguments: list[str]) -> None:
    if arguments:
        print(f"{of_recipe(arguments[0], arguments[1:]):.1%}")
    else:
        table()


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(sys.argv[1:])))
