"""The main job in one go, for a first look: draw, caption, complete, then train for some minutes.

Everything lies in one folder, with an `index.html` to look at.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from mmrdpm import api, checkpoint, recipe, shipped
from mmrdpm.api import Model
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.pictures import contact_sheet
from mmrdpm.errors import CheckpointError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import train

PROMPTS = ("red heart", "red paper lantern", "snowman", "rainbow", "dog face", "pizza")
TEXTS = ("A lantern is", "A hospital is", "a cat is")
_RECIPE = "emoji_quick"
_COLUMNS = 4


def quickstart(folder: Path, say: Callable[[str], None]) -> Path:
    """Does all of it; gives the path of the page.

    Raises:
        CheckpointError: the training was stopped before its end; calling again goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = api.load()
    say(f"drawing {len(PROMPTS)} prompts with {api.DEFAULT_MODEL}")
    drawn = draw(model, folder)
    captions = caption(model, folder)
    for name, text in captions:
        say(f"caption of the picture {name!r}: {text}")
    texts = [model.complete(text) for text in TEXTS]
    for text in texts:
        say(f"completed: {text}")
    say("training a small model of the same kind for about three minutes")
    run = folder / "train"
    if not _train(run):
        raise CheckpointError(f"{run}: training was stopped: run the same command to go on")
    page = folder / "index.html"
    page.write_text(_page(drawn, captions, texts, run), encoding="utf-8")
    return page


def _train(run: Path) -> bool:
    """Trains the small model, or goes on with it; False if it was stopped."""
    if resume := (run / checkpoint.RECIPE_FILE).exists():
        return train(recipe.load(ModelRecipe, run / checkpoint.RECIPE_FILE), run, resume)
    path = shipped.resolve("recipes", _RECIPE)
    # nothing that would have to be compiled first
    return train(
        recipe.load(ModelRecipe, path, ["train.compile=false", "train.attention=sdpa"]), run
    )


def draw(model: Model, folder: Path) -> list[str]:
    """Draws the prompts, a row each, and one of them step by step; gives the files' names."""
    pictures = model.generate(PROMPTS, n=_COLUMNS)
    rows = [pictures[i : i + _COLUMNS] for i in range(0, len(pictures), _COLUMNS)]
    contact_sheet(rows, scale=3).save(folder / "drawn.png")
    contact_sheet([model.trace(PROMPTS[0])], scale=3).save(folder / "steps.png")
    return ["drawn.png", "steps.png"]


def caption(model: Model, folder: Path) -> list[tuple[str, str]]:
    """Captions the real pictures of the prompts: `(name, caption)`."""
    data = load_emoji(72)
    places = [data.names.index(prompt) for prompt in PROMPTS]
    pictures = [Image.fromarray(data.images[place]) for place in places]
    for prompt, picture in zip(PROMPTS, pictures, strict=True):
        picture.save(folder / f"{prompt.replace(' ', '-')}.png")
    return list(zip(PROMPTS, model.caption(pictures), strict=True))


def _page(drawn: list[str], captions: list[tuple[str, str]], texts: list[str], run: Path) -> str:
    before, *_, after = sorted((run / "samples").glob("*.png"))
    rows = "".join(
        f'<tr><td><img src="{name.replace(" ", "-")}.png" width="72"></td>'
        f"<td>{html.escape(text)}</td></tr>"
        for name, text in captions
    )
    lines = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"""<!doctype html><meta charset="utf-8"><title>mmrdpm quickstart</title>
<style>body {{ font: 16px sans-serif; max-width: 60em; margin: 2em auto }}
img {{ image-rendering: pixelated; max-width: 100% }}</style>
<h1>mmrdpm quickstart</h1>
<h2>Drawn by {api.DEFAULT_MODEL}</h2>
<p>Rows: {", ".join(map(html.escape, PROMPTS))}; four seeds each.</p><img src="{drawn[0]}">
<p>"{html.escape(PROMPTS[0])}" from noise, step by step:</p><img src="{drawn[1]}">
<h2>Captions of real pictures, by the same weights</h2><table>{rows}</table>
<h2>Texts completed by the same weights</h2><ul>{lines}</ul>
<h2>A small model trained just now</h2>
<p>{_losses(run)}</p>{_curves(run)}
<p>Before and after; in each, the upper row holds the real pictures.</p>
<img src="train/samples/{before.name}"><br><img src="train/samples/{after.name}">
<p>Pictures of the embedded data: Twemoji, (c) Twitter, Inc. and other contributors, CC-BY 4.0.</p>
"""


def _losses(run: Path) -> str:
    """Where the losses began and ended."""
    first, *_, last = _records(run)
    image, text = (f"{first[k]:.2f} to {last[k]:.2f}" for k in ("loss/image", "loss/text"))
    return (
        f"Losses in nats per token, updates {first['step']} to {last['step']}: images (blue)"
        f" {image}, texts (orange) {text}."
    )


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / checkpoint.LOG_FILE).read_text().splitlines()]


def _curves(run: Path) -> str:
    """The two losses as an SVG drawing."""
    records = _records(run)
    highest = max(max(r["loss/text"], r["loss/image"]) for r in records)
    lines = []
    for key, colour in (("loss/image", "steelblue"), ("loss/text", "darkorange")):
        points = " ".join(
            f"{600 * r['step'] / records[-1]['step']:.1f},{200 * (1 - r[key] / highest):.1f}"
            for r in records
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    return f'<svg width="620" height="210">{"".join(lines)}</svg>'
