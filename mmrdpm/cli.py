"""The command line: every command is one function; a user's mistake is one line on stderr."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmrdpm import api, evaluate, machine, recipe, shipped, text_tokenizer
from mmrdpm.bench.train import bench_train
from mmrdpm.data.pictures import contact_sheet, open_picture, to_pictures, to_square, to_tensor
from mmrdpm.errors import CheckpointError, MmrdpmError, RecipeError, UsageError
from mmrdpm.evaluate_tokenizer import evaluate_images, evaluate_texts
from mmrdpm.export import export
from mmrdpm.quickstart import quickstart
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.train_model import ModelRecipe, train
from mmrdpm.train_tokenizer import (
    ImageTokenizerRecipe,
    TextTokenizerRecipe,
    train_image,
    train_text,
)

_INTERRUPTED = 130  # the shell's code for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit status."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    wrong = [o for o in overrides if o.startswith("-") or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if overrides:  # argparse does not take positional arguments after options
        options.overrides = [*options.overrides, *overrides]
    try:
        return options.command(options) or 0
    except MmrdpmError as error:
        print(f"mmrdpm: error: {error}", file=sys.stderr)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"mmrdpm: error: {place}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 1


def generate(options: argparse.Namespace) -> None:
    """Draws pictures; prints the path of every file written."""
    model = api.load(options.model)
    how = {
        name: value
        for name in ("guidance_scale", "temperature", "top_k", "top_p")
        if (value := getattr(options, name)) is not None
    }
    jobs = [(p, options.seed + j) for p in options.prompts for j in range(options.n)]
    pictures = [model.trace(prompt, seed, **how) for prompt, seed in jobs]
    paths = _paths(options.out, [f"{_slug(prompt)}-{seed}" for prompt, seed in jobs])
    for path, states in zip(paths, pictures, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        states[-1].save(path)
        print(path)
        if options.trace:
            strip, film = (path.with_name(f"{path.stem}-trace.{e}") for e in ("png", "gif"))
            contact_sheet([states]).save(strip)
            states[0].save(film, save_all=True, append_images=states[1:], duration=200, loop=0)
            print(strip, film, sep="\n")


def caption(options: argparse.Namespace) -> None:
    """Names pictures, a line each."""
    model = api.load(options.model)
    pictures = [open_picture(Path(path)) for path in options.images]
    for path, text in zip(options.images, model.caption(pictures), strict=True):
        print(json.dumps({"image": path, "caption": text}) if options.json else _line(text))


def complete(options: argparse.Namespace) -> None:
    """Continues a text."""
    model = api.load(options.model)
    text = model.complete(options.text, options.max_tokens, options.temperature, options.seed)
    print(_line(text))


def train_command(options: argparse.Namespace) -> int:
    """Trains a model by a recipe."""
    loaded = recipe.load(ModelRecipe, _recipe(options.recipe, ("model",)), options.overrides)
    return _train(train, loaded, options, "train")


def tokenizer_train(options: argparse.Namespace) -> int:
    """Trains an image or a text tokeniser by a recipe."""
    path = _recipe(options.recipe, ("image", "text"))
    if recipe.read(path).get("kind") == "image":
        loaded = recipe.load(ImageTokenizerRecipe, path, options.overrides)
        return _train(train_image, loaded, options, "tokenizer train")
    if options.resume:
        raise UsageError("a text tokeniser trains in seconds: there is nothing to resume")
    run = options.run or Path("runs") / path.stem
    train_text(recipe.load(TextTokenizerRecipe, path, options.overrides), run)
    print(run)
    return 0


def _train(function, loaded, options: argparse.Namespace, command: str) -> int:  # type: ignore[no-untyped-def]
    run = options.run or Path("runs") / Path(options.recipe).stem
    if function(loaded, run, options.resume):
        print(run)
        return 0
    again = " ".join(["mmrdpm", command, options.recipe, *options.overrides])
    print(f"stopped; go on with: {again} --run {run} --resume", file=sys.stderr)
    return _INTERRUPTED


def tokenizer_eval(options: argparse.Namespace) -> None:
    """Prints what a tokeniser loses and how it uses its codes."""
    folder = _tokenizer(options.tokenizer)
    if not (folder / image_tokenizer.SPEC_FILE).is_file():
        figures = evaluate_texts(text_tokenizer.load(folder))
        print(f"ids {figures.size}, {figures.bytes_per_token:.2f} bytes per token")
        print(f"{figures.texts} texts, {figures.broken} changed by a round trip")
        return
    tokenizer = image_tokenizer.load(folder)
    for title, split in evaluate.GROUPS.items():
        f = evaluate_images(tokenizer, split)
        print(f"{title}: {f.count} pictures")
        print(f"  PSNR  autoencoder {f.psnr[0]:.2f} dB, codes {f.psnr[1]:.2f} dB", end="")
        print(f" (cost {f.psnr[0] - f.psnr[1]:.2f} dB)")
        print(f"  SSIM  autoencoder {f.ssim[0]:.4f}, codes {f.ssim[1]:.4f}")
        steps = range(tokenizer.num_timesteps, 0, -1)
        print("  timestep         " + "".join(f"{t:7d}" for t in steps))
        print("  latent error     " + "".join(f"{e:7.3f}" for e in f.latent_error))
        print("  codebook usage   " + "".join(f"{u:7.1%}" for u in f.usage))


def tokenizer_show(options: argparse.Namespace) -> None:
    """Draws every state of a picture on its way from noise through its codes."""
    tokenizer = image_tokenizer.load(_tokenizer(options.tokenizer))
    photo = to_square(open_picture(Path(options.photo)), tokenizer.image_size)
    (record,) = tokenizer.encode(to_tensor(photo[None]), [options.seed])
    states = tokenizer.states([record])[:, 0].flip(0)
    strip = [*to_pictures(tokenizer.decode_latents(states)), Image.fromarray(photo)]
    path = options.out or Path(f"{Path(options.photo).stem}-states.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([strip], scale=max(1, 96 // tokenizer.image_size)).save(path)
    print(path)


def eval_command(options: argparse.Namespace) -> None:
    """Measures a model by a suite."""
    suite = recipe.load(evaluate.Suite, shipped.resolve("eval", options.suite), options.overrides)
    machine.prepare(options.threads)
    report = evaluate.evaluate(
        api.load(options.model), suite, lambda line: print(line, file=sys.stderr)
    )
    for group, figures in report.items():
        print(f"{group}")
        print(f"  drawn: named emoji in the 10 nearest   {figures.drawn}")
        print(f"    the real pictures at this size       {figures.real}")
        print(f"    the same through the codes           {figures.coded}")
        if figures.tone:
            print(f"  drawn with the named skin tone         {figures.tone}")
        print(f"  caption is the name                    {figures.captioned}")
        print(f"  caption begins with the concept        {figures.concept}")


def bench_train_command(options: argparse.Namespace) -> None:
    """Training speed beside the machine's own matrix product."""
    loaded = recipe.load(ModelRecipe, _recipe(options.recipe, ("model",)), options.overrides)
    for line in bench_train(loaded, options.rounds):
        print(line)


def export_command(options: argparse.Namespace) -> None:
    """Makes a small model to ship of a run."""
    print(export(options.run, options.folder, options.overrides))


def quickstart_command(options: argparse.Namespace) -> None:
    """Draws, captions, completes and trains a little, and makes a page of it."""
    print(quickstart(options.out, lambda line: print(line, file=sys.stderr)))


def _recipe(name: str, kinds: tuple[str, ...]) -> Path:
    """The file of a recipe, which must be of one of the kinds."""
    try:
        path = shipped.resolve("recipes", name)
    except MmrdpmError as error:
        raise RecipeError(str(error)) from None
    kind = recipe.read(path).get("kind")
    if kind not in kinds:
        command = "train" if kind == "model" else "tokenizer train"
        raise RecipeError(
            f"{path}: kind is {kind!r}, not {' or '.join(map(repr, kinds))}"
            + (f": use mmrdpm {command}" if kind in ("model", "image", "text") else "")
        )
    return path


def _tokenizer(name: str) -> Path:
    folder = shipped.resolve("tokenizers", name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a tokeniser is a folder, not a file")
    return folder


def _paths(out: Path, names: list[str]) -> list[Path]:
    """Where the pictures go: files in a folder, or, for one picture, the very file."""
    if out.suffix.lower() == ".png":
        if len(names) == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(len(names))]
    paths: list[Path] = []
    for name in names:
        same = sum(path.stem == name or path.stem.startswith(f"{name}_") for path in paths)
        paths.append(out / (f"{name}_{same}.png" if same else f"{name}.png"))
    return paths


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "picture"


def _line(text: str) -> str:
    return " ".join(text.splitlines())


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: it must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmrdpm", description="One transformer that draws, captions and writes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name: str, of=commands) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
        added = of.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(command=function)
        return added

    def model_option(to: argparse.ArgumentParser) -> None:
        to.add_argument("--model", default=api.DEFAULT_MODEL, help="name or folder of a model")

    def recipe_options(to: argparse.ArgumentParser) -> None:
        to.add_argument("recipe", metavar="RECIPE", help="file, or name of a shipped recipe")
        to.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.lr=1e-3")

    def run_options(to: argparse.ArgumentParser) -> None:
        recipe_options(to)
        to.add_argument("--run", type=Path, metavar="DIR", help="default: runs/RECIPE's name")
        to.add_argument("--resume", action="store_true", help="go on where the run stopped")

    p = command(generate, "generate")
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    model_option(p)
    p.add_argument("--n", type=_count, default=1, help="pictures per prompt")
    p.add_argument("--seed", type=int, default=0, help="of a prompt's first picture")
    p.add_argument("--guidance", dest="guidance_scale", type=float, help="1 is off")
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--trace", action="store_true", help="save every step, as a strip and a GIF")
    p.add_argument("--out", type=Path, default=Path(), metavar="DIR|FILE.png")

    p = command(caption, "caption")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    model_option(p)
    p.add_argument("--json", action="store_true", help="an object a line")

    p = command(complete, "complete")
    p.add_argument("text", metavar="TEXT")
    model_option(p)
    p.add_argument("--max-tokens", type=_count, default=64)
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    p.add_argument("--seed", type=int, default=0)

    run_options(command(train_command, "train"))

    tokenizer = commands.add_parser("tokenizer", help="Tokenisers of images and texts.")
    of = tokenizer.add_subparsers(required=True, metavar="COMMAND")
    run_options(command(tokenizer_train, "train", of))
    p = command(tokenizer_eval, "eval", of)
    p.add_argument("tokenizer", nargs="?", default="emoji-rdpm-32", metavar="NAME|DIR")
    p = command(tokenizer_show, "show", of)
    p.add_argument("photo", metavar="PHOTO")
    p.add_argument("--tokenizer", default="emoji-rdpm-32", metavar="NAME|DIR")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--out", type=Path, metavar="FILE.png")

    p = command(eval_command, "eval")
    p.add_argument("model", nargs="?", default=api.DEFAULT_MODEL, metavar="MODEL")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the suite")
    p.add_argument("--suite", default="emoji", help="file, or name of a shipped suite")
    p.add_argument("--threads", type=_count, default=2)

    p = command(export_command, "export")
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("overrides", nargs="*", metavar="sampling.key=value")

    p = command(quickstart_command, "quickstart")
    p.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR")

    bench = commands.add_parser("bench", help="Speed, side by side in one run.")
    of = bench.add_subparsers(required=True, metavar="COMMAND")
    p = command(bench_train_command, "train", of)
    recipe_options(p)
    p.add_argument("--rounds", type=_count, default=5)
    return parser
