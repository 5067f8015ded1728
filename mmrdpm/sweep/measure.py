"""What is measured of a trained model: pictures, captions, losses, information per step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmrdpm.api import Model
from mmrdpm.data.emoji import load_emoji
from mmrdpm.evaluate import Judge, Suite, choose
from mmrdpm.metrics.features import EfficientNetLite0, ranks
from mmrdpm.sweep.information import information, text_loss
from mmrdpm.sweep.spec import Measures

_FULL_SIZE = 72  # pixels of the pictures as they come
_PART = 20  # pictures between two movements of the progress bar


class Measurer:
    """Measures one model after another against one gallery of real pictures.

    Raises:
        DataError: the packages of the extra `eval` are not installed.
    """

    def __call__(self, model: Model, plan: Measures) -> dict[str, Any]:
        """A line of results: see `drawing`, `captions` and `losses`."""
        data = self.judge.data
        chosen = choose(data, "train", Suite(plan.names, plan.seed))
        small = load_emoji(model.images.image_size).images[chosen]
        real = [Image.fromarray(square) for square in small]
        names = [data.names[i] for i in chosen]
        return {
            "pictures": len(chosen),
            **self.drawing(model, chosen, real, plan.seed),
            **captions(model, names, real),
            **losses(model, plan),
        }

    @cached_property
    def judge(self) -> Judge:
        """All emoji without a skin tone at full size, and their features."""
        return Judge(load_emoji(_FULL_SIZE), EfficientNetLite0())

    def drawing(
        self, model: Model, chosen: list[int], real: list[Image.Image], seed: int
    ) -> dict[str, float]:
        """`top1`, `top10`: shares of drawn pictures whose own emoji is among the nearest.

        `kid`: kernel distance of their features from those of the real pictures at their size.
        """
        judge = self.judge
        names = [judge.data.names[i] for i in chosen]
        drawn = [p for part in _parts(names, "drawing") for p in model.generate(part, seed=seed)]
        features = judge.features(drawn)
        truths = [judge.place[judge.data.concepts[i]] for i in chosen]
        places = np.array(ranks(features, judge.gallery, truths))
        return {
            "top1": float((places <= 1).mean()),
            "top10": float((places <= 10).mean()),
            "kid": kernel_distance(features, judge.features(real)),
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


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID: the unbiased squared MMD with the kernel `(x . y / F + 1)^3`; may be negative.

    Bińkowski et al. 2018 (arXiv 1801.01401, section 3); features `[n, F]` and `[m, F]`, n, m >= 2.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    within = off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y))
    return torch.sub(within, kernel(x, y).mean(), alpha=2).item()


def _parts(things: list[Any], title: str) -> Any:
    parts = [things[i : i + _PART] for i in range(0, len(things), _PART)]
    return track(parts, title, console=Console(stderr=True), transient=True)
