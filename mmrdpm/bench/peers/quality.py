"""How well pictures show what was named: the one place that knows how peers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmrdpm.bench.peers.protocol import Judging, Scene
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.emoji import TRAINING, choose_group
from mmrdpm.evaluation.figure import Protocol
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
    """Judges pictures of the chosen emoji of a group.

    Attributes:
        group: those emoji, and their true pictures.
        protocol: of all figures, by the keys that `mmrdpm eval` has.
    """

    def __init__(
        self, scene: Scene, plan: Judging, judge: drawn.Judge, group: str = TRAINING
    ) -> None:
        self.judge = judge
        self.group = choose_group(scene.data, group, plan.concepts, plan.seed)
        real, features = self.group.pictures, self.judge.features
        self.protocol: Protocol = {
            **self.group.protocol,
            "seed": plan.seed,
            "noise": "torch's generator, from the seed anew for each way of drawing",
            **self.judge.protocol,
            **drawn.kid_protocol(features, real, real, paired=True),
        }

    def __call__(self, pictures: Sequence[Image.Image]) -> Figures:
        top_1, top_10 = drawn.named_in_top(self.judge, pictures, self.group.concepts)
        real = self.group.pictures
        distance = drawn.kid(self.judge.features, pictures, real, paired=True)
        intervals = {"top1": top_1.interval, "top10": top_10.interval, "kid": distance.interval}
        return Figures(top_1.value, top_10.value, distance.value, intervals)
