"""What a model draws and captions while it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from mmrdpm.api import Model
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.pictures import contact_sheet
from mmrdpm.monitor import Monitor

_BRIEF = 60  # characters of a caption on the console: an untrained model does not end one


@dataclass(frozen=True)
class Samples:
    """What is drawn and captioned while the run goes on, every `every` updates.

    Attributes:
        prompts: names of the embedded data; each is drawn, and its own picture captioned.
    """

    every: int = field(default=500, metadata={"min": 1})
    prompts: tuple[str, ...] = ("red heart", "red paper lantern", "dog face", "rainbow", "snowman")


def sample(model: Model, plan: Samples, step: int, monitor: Monitor) -> None:
    """Draws and captions the plan's prompts into the log and `RUN/samples/`.

    The sheet has two rows: the true pictures, white where the data holds none, and the drawn ones.
    """
    size = model.images.image_size
    data = load_emoji(size)
    index = {name: i for i, name in enumerate(data.names)}
    true = {p: Image.fromarray(data.images[index[p]]) for p in plan.prompts if p in index}
    white = Image.new("RGB", (size, size), "white")
    above = [true.get(prompt, white) for prompt in plan.prompts]
    sheet = contact_sheet([above, model.generate(plan.prompts)], scale=3)
    folder = monitor.run / "samples"
    folder.mkdir(exist_ok=True)
    sheet.save(folder / f"step-{step:07d}.png")
    monitor.picture("samples", step, sheet)
    captions = model.caption(list(true.values()))
    monitor.text("captions", step, _told(true, captions))
    brief = [c if len(c) <= _BRIEF else f"{c[:_BRIEF]}..." for c in captions]
    monitor.say(f"step {step}  captions: {_told(true, brief)}")


def _told(names: Iterable[str], captions: Iterable[str]) -> str:
    pairs = zip(names, captions, strict=True)
    return "; ".join(f"{name} -> {caption or '(nothing)'}" for name, caption in pairs)
