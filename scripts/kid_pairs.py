"""By how much the pairs of one name lower the kernel distance from the real pictures.

    python scripts/kid_pairs.py [TOKENIZER] [COUNT ...]

Of that many training names (200, and 12) the real pictures against themselves, and through the
codes of an image tokeniser (emoji-rdpm-32, noise from seeds 0 on) against themselves. The note of
`mmrdpm eval`'s kernel distance says the same of drawn pictures.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from mmrdpm import shipped
from mmrdpm.cli.common import status_of
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.pictures import to_pictures
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.emoji import TRAINING, choose_group
from mmrdpm.evaluation.tokenizer import measure_images
from mmrdpm.metrics.features import EfficientNetLite0
from mmrdpm.rdpm import image_tokenizer


def main(name: str, counts: list[int]) -> None:
    tokenizer = image_tokenizer.load(shipped.resolve("tokenizers", name))
    features, data = EfficientNetLite0(), load_emoji(tokenizer.image_size)
    for count in counts:
        real = choose_group(data, TRAINING, count, seed=0).pictures
        squares = np.stack([np.asarray(picture) for picture in real])
        codes = to_pictures(measure_images(tokenizer, squares).images["codes"])
        for what, pictures in (("real", real), ("through the codes", codes)):
            figure = drawn.kid(features, pictures, real, paired=True)
            print(f"{what}: {figure}, {figure.note}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizer", nargs="?", default="emoji-rdpm-32")
    parser.add_argument("counts", nargs="*", type=int, default=[200, 12])
    given = parser.parse_args()
    sys.exit(status_of(lambda: main(given.tokenizer, given.counts)))
