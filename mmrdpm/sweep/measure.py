"""What is measured of a trained model: pictures, captions, losses, information per step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from mmrdpm.api import Model
from mmrdpm.data.emoji import load_emoji
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.drawn import Judge
from mmrdpm.evaluation.emoji import choose
from mmrdpm.evaluation.store import picture_seeds
from mmrdpm.sweep.information import information, text_loss
from mmrdpm.sweep.spec import Measures

_OF_WEIGHTS = (  # figures that have nothing to do with how pictures are drawn
    *("captioned", "loss_text", "loss_image", "loss_steps", "information"),
    *("independence", "independence_steps", "divergence", "divergence_steps"),
)
_PART = 32  # pictures between two movements of the progress bar: two groups of small ones


class Measurer:
    """Measures one model after another against one gallery of real pictures.

    Raises:
        DataError: the packages of the extra `eval` are not installed.
    """

    def __call__(
        self, model: Model, plan: Measures, alike: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A line of results: see `drawing`, `captions` and `losses`.

        Args:
            alike: a line of the same weights drawn in another way: all but its drawing holds here.
        """
        data = load_emoji(model.images.image_size)
        chosen = choose(data, "train", plan.names, plan.seed)
        real = [Image.fromarray(data.images[i]) for i in chosen]
        names = [data.names[i] for i in chosen]
        drawing = {"pictures": len(chosen), **self.drawing(model, names, real, plan.seed)}
        if alike:
            return {**drawing, **{key: alike[key] for key in _OF_WEIGHTS if key in alike}}
        return {**drawing, **captions(model, names, real), **losses(model, plan)}

    @property
    def protocol(self) -> dict[str, Any]:
        """What judges: the evaluator's hash, the gallery's, the kernel of the distance.

        Raises:
            DataError: a package is missing.
        """
        return {**self.judge.protocol, "kernel": drawn.kernel(paired=True)}

    @cached_property
    def judge(self) -> Judge:
        """All emoji without a skin tone at full size, and their features."""
        return drawn.emoji_judge()

    def drawing(
        self, model: Model, names: list[str], real: list[Image.Image], seed: int
    ) -> dict[str, Any]:
        """`top1`, `top10`: shares of drawn pictures whose own emoji is among the nearest.

        `kid`: kernel distance of their features from those of the real pictures at their size.
        `intervals`: of the three, 95% over the pictures; seeds of training are not in them.
        `judge`: see `protocol`.
        """
        seeds = dict(zip(names, picture_seeds(seed, len(names)), strict=True))
        pictures = [
            picture
            for part in _parts(names, "drawing")
            for picture in model.generate(part, [seeds[name] for name in part])
        ]
        top_1, top_10 = drawn.named_in_top(self.judge, pictures, names)
        distance = drawn.kid(self.judge.features, pictures, real, paired=True)
        figures = {"top1": top_1, "top10": top_10, "kid": distance}
        return {
            **{name: figure.value for name, figure in figures.items()},
            "intervals": {name: list(figure.interval) for name, figure in figures.items()},
            "judge": self.protocol,
        }


def captions(model: Model, names: list[str], real: list[Image.Image]) -> dict[str, float]:
    """`captioned`: the share of real pictures whose caption is their very name."""
    found = [text for part in _parts(real, "captioning") for text in model.caption(part)]
    return {"captioned": sum(f == n for f, n in zip(found, names, strict=True)) / len(names)}


def losses(model: Model, plan: Measures) -> dict[str, Any]:
    """Cross-entropies under fresh noise, and what drawing positions independently loses.

    `loss_text` in nats per token, `loss_image` in nats per code; `loss_steps`,
    `independence_steps` and `divergence_steps` in nats per code and step, T first; `information`,
    `independence` and `divergence` in nats per picture. See `information`.
    """
    found = information(model, plan.batches, plan.joint_steps, plan.seed)
    positions = model.images.noise([0])[0, 0, ..., 0].numel()
    figures: dict[str, Any] = {
        "loss_text": text_loss(model, plan.batches, plan.seed),
        "loss_image": sum(found.loss) / len(found.loss),
        "loss_steps": found.loss,
        "information": positions * sum(found.loss),
    }
    if found.joint:
        for name, upper in (("independence", found.marginal), ("divergence", found.loss)):
            steps = [u - j for u, j in zip(upper, found.joint, strict=True)]
            figures |= {f"{name}_steps": steps, name: positions * sum(steps)}
    return figures


def _parts(things: list[Any], title: str) -> Any:
    parts = [things[i : i + _PART] for i in range(0, len(things), _PART)]
    return track(parts, title, console=Console(stderr=True), transient=True)
