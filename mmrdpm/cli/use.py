"""Uses a model: draws, captions, completes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from mmrdpm import api
from mmrdpm.cli.common import Commands, command, count, model_option
from mmrdpm.data.pictures import contact_sheet, open_picture, save_picture, to_square
from mmrdpm.errors import UsageError, printable

_AT_ONCE = 128  # pictures drawn before they are saved: whole groups, of whatever device
_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def add(commands: Commands) -> None:
    """Registers `generate`, `caption` and `complete`."""
    p = command(commands, generate, "generate")
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    model_option(p)
    p.add_argument("--n", type=count, default=1, help="pictures per prompt")
    p.add_argument("--seed", type=int, default=0, help="of a prompt's first picture")
    own = "; the model's own where it is left out"
    p.add_argument(
        "--guidance",
        dest="guidance_scale",
        type=float,
        help=f"how strongly the words count, 1 is off{own}",
    )
    p.add_argument("--temperature", type=float, help=f"0 takes the likeliest codes{own}")
    p.add_argument("--top-k", type=int, help=f"draw among the k likeliest codes{own}")
    p.add_argument("--top-p", type=float, help=f"draw among the likeliest of this share{own}")
    p.add_argument(
        "--expected-steps",
        type=int,
        metavar="N",
        help=f"the last N steps add the mean of all codes in place of one that is drawn{own}",
    )
    p.add_argument("--trace", action="store_true", help="save every step, as a strip and a GIF")
    p.add_argument("--out", type=Path, default=Path(), metavar="DIR|FILE.png", help="default: here")

    p = command(commands, caption, "caption")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    model_option(p)
    p.add_argument("--json", action="store_true", help="an object a line")

    p = command(commands, complete, "complete")
    p.add_argument("text", metavar="TEXT")
    model_option(p)
    p.add_argument("--max-tokens", type=count, default=64, help="at most so many more")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn at other temperatures")


def generate(options: argparse.Namespace) -> None:
    """Draws pictures; prints the path of every file written."""
    names = [f"{_slug(p)}-{options.seed + j}" for p in options.prompts for j in range(options.n)]
    paths = _paths(options.out, names)
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    model = api.load(options.model)
    how = {
        name: value
        for name in ("guidance_scale", "temperature", "top_k", "top_p", "expected_steps")
        if (value := getattr(options, name)) is not None
    }
    jobs = [(p, options.seed + j) for p in options.prompts for j in range(options.n)]
    for prompt, seed in jobs:  # what is wrong with the last should show before the first is drawn
        model.prompt_ids(prompt)
        api.check_seed(seed)
    parts = [slice(start, start + _AT_ONCE) for start in range(0, len(jobs), _AT_ONCE)]
    quiet = len(parts) == 1 or sys.stdout.isatty()  # the paths show how far it is
    with Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=False, disable=quiet
    ) as bar:
        for part in bar.track(parts, description="drawing"):
            prompts, seeds = zip(*jobs[part], strict=True)
            if options.trace:
                pictures = [model.trace(*job, **how) for job in jobs[part]]
            else:
                pictures = [[picture] for picture in model.generate(prompts, seeds, **how)]
            for path, states in zip(paths[part], pictures, strict=True):
                _save(path, states, options.trace)


def _save(path: Path, states: list[Image.Image], trace: bool) -> None:
    """Writes the last state, with `trace` all of them beside it, and prints the paths."""
    save_picture(states[-1], path)
    print(path, flush=True)
    if trace:
        strip, film = (path.with_name(f"{path.stem}-trace.{e}") for e in ("png", "gif"))
        save_picture(contact_sheet([states]), strip)
        frames = {"save_all": True, "append_images": states[1:], "duration": 200, "loop": 0}
        save_picture(states[0], film, **frames)
        print(strip, film, sep="\n", flush=True)


def caption(options: argparse.Namespace) -> None:
    """Names pictures, a line each."""
    model = api.load(options.model)
    side = model.images.image_size  # at once, so that many large photos fit into memory
    squares = (to_square(open_picture(Path(path)), side) for path in options.images)
    pictures = [Image.fromarray(square) for square in squares]
    for path, text in zip(options.images, model.caption(pictures), strict=True):
        print(json.dumps({"image": path, "caption": text}) if options.json else _line(text))


def complete(options: argparse.Namespace) -> None:
    """Continues a text."""
    model = api.load(options.model)
    text = model.complete(options.text, options.max_tokens, options.temperature, options.seed)
    print(_line(text))


def _paths(out: Path, names: list[str]) -> list[Path]:
    """Where the pictures go: files in a folder, or, for one picture, the very file."""
    if out.suffix.lower() in _OTHER_PICTURES:
        raise UsageError(f"--out {out}: pictures are written as PNG: name a folder or a .png file")
    if out.suffix.lower() == ".png":
        if len(names) == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(len(names))]
    paths, taken = [], Counter[str]()
    for name in names:
        same = taken[name]
        taken[name] += 1
        paths.append(out / (f"{name}_{same}.png" if same else f"{name}.png"))
    return paths


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "picture"


def _line(text: str) -> str:
    return printable(" ".join(text.splitlines()))
