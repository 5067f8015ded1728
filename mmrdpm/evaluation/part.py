"""A part of a suite: what is computed, kept and reported as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmrdpm.api import Model
from mmrdpm.data.pictures import contact_sheet
from mmrdpm.evaluation.figure import Figure
from mmrdpm.metrics.features import MissingEvaluator

_LARGE = 128  # pixels a side, from which on pictures are shown as they are


@dataclass(frozen=True)
class Shown:
    """Something to look at in the report.

    Attributes:
        rows: of a table below the picture; the first is its head.
    """

    title: str
    picture: Image.Image | None = None
    rows: Sequence[Sequence[str]] = ()


def strips(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float
) -> Shown:
    """The way of each picture from noise, a row each."""
    pairs = zip(prompts, seeds, strict=True)
    rows = [model.trace(prompt, seed, guidance_scale=guidance_scale) for prompt, seed in pairs]
    scale = 2 if model.images.image_size < _LARGE else 1
    return Shown(f"From noise, step by step: {', '.join(prompts)}", contact_sheet(rows, scale))


@dataclass(frozen=True)
class Part:
    """Figures to be made.

    Attributes:
        of: all that they follow from besides the weights, as JSON can hold it.
        make: raises MissingEvaluator where a package or weights are missing.
    """

    name: str
    of: Any
    make: Callable[[], Sequence[Figure]]

    @classmethod
    def left_out(cls, name: str, why: str) -> Part:
        """One that cannot be computed, for the report to say so."""

        def refuse() -> Sequence[Figure]:
            raise MissingEvaluator(why)

        return cls(name, None, refuse)
