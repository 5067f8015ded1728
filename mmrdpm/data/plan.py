"""The `data` section of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmrdpm.data.sources import SourceConfig
from mmrdpm.data.sources.files import at_home
from mmrdpm.data.sources.folder import METADATA
from mmrdpm.errors import RecipeError


@dataclass(frozen=True)
class DataPlan:
    """What the stream holds.

    Attributes:
        sources: what is mixed, by name; none for the embedded emoji and definitions.
        image_share, caption_share: of the documents, caption -> image and image -> caption; the
            rest is text. Of `sources`, only the ratio of the two counts, for every image-text
            pair; how much is text follows from the weights.
        caption_dropout: of the caption -> image documents, those with an empty caption, which
            classifier-free guidance needs.
        steps_per_image: how many of the T timesteps one document learns, drawn at random.
        timesteps: how often each is drawn: `alike`, or by the `path`: three quarters of the draws
            go by `sigma_t - sigma_{t-1}` of the tokeniser's schedule, how far the path goes in the
            step, as that much of a picture hangs on it.
        rows, seq_len: tokens per update of all ranks together, `rows * seq_len`.
        look_ahead: documents among which each row chooses those that fill it. None is 16 with
            `sources`; without, it takes the embedded documents in their order.
        max_caption_tokens: longer captions are cut.
        max_broken_share: more broken records than this stop the run.
        workers: processes per rank that read and decode, 0 for none.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    image_share: float = field(default=0.55, metadata={"min": 0.0, "max": 1.0})
    caption_share: float = field(default=0.25, metadata={"min": 0.0, "max": 1.0})
    caption_dropout: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0})
    steps_per_image: int = field(default=4, metadata={"min": 1})
    timesteps: Literal["alike", "path"] = "alike"
    rows: int = field(default=24, metadata={"min": 1})
    seq_len: int = field(default=256, metadata={"min": 16})
    look_ahead: int | None = field(default=None, metadata={"min": 1})
    max_caption_tokens: int = field(default=128, metadata={"min": 1})
    max_broken_share: float = field(default=0.05, metadata={"min": 0.0, "max": 0.9})
    workers: int = field(default=0, metadata={"min": 0})

    def __post_init__(self) -> None:
        total = math.fsum(source.weight for source in self.sources.values())
        if self.sources and abs(total - 1) > 1e-6:
            shares = ", ".join(f"{n}: {s.weight / total:.9g}" for n, s in self.sources.items())
            raise RecipeError(
                f"data.sources: the weights add up to {total:.9g}, not to 1: to keep their ratios"
                f" write {shares}"
            )
        if self.image_share + self.caption_share > 1 + 1e-9:
            raise RecipeError(
                f"data: image_share {self.image_share} and caption_share {self.caption_share} are"
                " together more than 1: lower one"
            )
        if self.image_share + self.caption_share == 0 and self.sources:
            raise RecipeError("data: image_share and caption_share are both 0: raise one")

    def check_outside(self, run: Path) -> None:
        """Raises RecipeError where a run would write its samples among the pictures of a folder."""
        for name, source in self.sources.items():
            folder = at_home(source.path).resolve()
            listed = (folder / METADATA).is_file() and not source.template
            within = source.type == "folder" and run.resolve().is_relative_to(folder)
            if within and not listed:
                raise RecipeError(
                    f"data.sources.{name}: its folder {source.path} would hold the run's, {run},"
                    " and the samples drawn there would be learned: give --run another place"
                )
