"""How well pictures show what was named: the one place that knows how peers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmrdpm.bench.peers.protocol import Judging, Scene
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.emoji import choose
from mmrdpm.metrics.interval import Interval


@dataclass(frozen=True)
class Figures:
    """Shares of pictures whose name is the nearest, or among the ten nearest, and the KID.

    Attributes:
        intervals: 95%, by the names of the three.
    """

    top1: float
    top10: float
    kid: float
    intervals: dict[str, Interval]


class Quality:
    """Judges pictures of the chosen training concepts.

    Attributes:
        chosen: positions of their records in the data.

    Raises:
        DataError: the extra `eval` is not installed.
    """

    def __init__(self, scene: Scene, plan: Judging) -> None:
        self.judge = drawn.emoji_judge()
        self.chosen = choose(scene.data, "train", plan.concepts, plan.seed)
        self.names = [scene.data.names[i] for i in self.chosen]
        self.real = [Image.fromarray(scene.data.images[i]) for i in self.chosen]

    def __call__(self, pictures: Sequence[Image.Image]) -> Figures:
        top_1, top_10 = drawn.named_in_top(self.judge, pictures, self.names)
        distance = drawn.kid(self.judge.features, pictures, self.real)
        intervals = {"top1": top_1.interval, "top10": top_10.interval, "kid": distance.interval}
        return Figures(top_1.value, top_10.value, distance.value, intervals)
