"""How well pictures show what was named: the one place that knows how peers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from mmrdpm.bench.peers.protocol import Judging, Scene
from mmrdpm.data.emoji import load_emoji
from mmrdpm.evaluate import Judge, Suite, choose
from mmrdpm.metrics.features import EfficientNetLite0, ranks

_FULL_SIZE = 72  # pixels of the pictures as they come


@dataclass(frozen=True)
class Figures:
    """Shares of pictures whose name is the nearest, or among the ten nearest, and the KID."""

    top1: float
    top10: float
    kid: float


class Quality:
    """Judges pictures of the chosen training concepts.

    Attributes:
        chosen: positions of their records in the data.

    Raises:
        DataError: the extra `eval` is not installed.
    """

    def __init__(self, scene: Scene, plan: Judging) -> None:
        self.judge = Judge(load_emoji(_FULL_SIZE), EfficientNetLite0())
        self.chosen = choose(self.judge.data, "train", Suite(plan.concepts, plan.seed))
        real = [Image.fromarray(scene.data.images[i]) for i in self.chosen]
        self.real = self.judge.features(real)

    def __call__(self, pictures: Sequence[Image.Image]) -> Figures:
        features = self.judge.features(pictures)
        truths = [self.judge.place[self.judge.data.concepts[i]] for i in self.chosen]
        places = ranks(features, self.judge.gallery, truths)
        return Figures(
            top1=sum(place == 1 for place in places) / len(places),
            top10=sum(place <= 10 for place in places) / len(places),
            kid=kernel_distance(features, self.real),
        )


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel `(x . y / d + 1)^3`, of features `[n, d]`.

    Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401, section 4), without its
    division into subsets; may be negative.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()
