"""Trains models and tokenisers, and looks at what tokenisers do."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrdpm import api, distributed, recipe, shipped, text_tokenizer
from mmrdpm.cli.common import (
    INTERRUPTED,
    Commands,
    command,
    count,
    full_gpu,
    group,
    recipe_file,
    run_options,
)
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.images import load_squares
from mmrdpm.data.pictures import (
    contact_sheet,
    open_picture,
    save_picture,
    to_pictures,
    to_square,
    to_tensor,
)
from mmrdpm.errors import CheckpointError, TrainingError, UsageError
from mmrdpm.evaluation.suite import GROUPS
from mmrdpm.evaluation.tokenizer import WAYS, few, measure_images, measure_texts
from mmrdpm.export import export
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.train_model import train
from mmrdpm.train_tokenizer import (
    ImageTokenizerRecipe,
    TextTokenizerRecipe,
    train_image,
    train_text,
)

_LESS_OF_TOKENISER = (
    "lower train.batch_size and train.codebook_batch alike and begin anew, or share them among"
    " more GPUs by torchrun, on which a run may go on"
)


def add(commands: Commands) -> None:
    """Registers `train`, `tokenizer ...` and `export`."""
    run_options(command(commands, train_command, "train"))
    of = group(commands, "tokenizer", "Tokenisers of images and texts.")
    run_options(command(of, tokenizer_train, "train"))
    p = command(of, tokenizer_eval, "eval")
    shipped_one = "a shipped one or a folder; default: emoji-rdpm-32"
    p.add_argument(
        "tokenizer", nargs="?", default="emoji-rdpm-32", metavar="NAME|DIR", help=shipped_one
    )
    p.add_argument("--images", type=Path, metavar="DIR", help="default: the embedded pictures")
    p.add_argument("--count", type=count, default=256, help="of those images, at most")
    p = command(of, tokenizer_show, "show")
    p.add_argument("photo", metavar="PHOTO", help="any picture")
    p.add_argument("--tokenizer", default="emoji-rdpm-32", metavar="NAME|DIR", help=shipped_one)
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--out", type=Path, metavar="FILE.png", help="default: PHOTO-states.png, here")
    p = command(commands, export_command, "export")
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("folder", type=Path, metavar="DIR", help="to make")
    p.add_argument("--int8", action="store_true", help="matrices in half the space of float16")
    p.add_argument("overrides", nargs="*", metavar="sampling.key=value")


def train_command(options: argparse.Namespace) -> int:
    """Trains a model by a recipe."""
    loaded = recipe.load(ModelRecipe, recipe_file(options.recipe, ("model",)), options.overrides)
    return _train(train, loaded, options, "train")


def tokenizer_train(options: argparse.Namespace) -> int:
    """Trains an image or a text tokeniser by a recipe."""
    path = recipe_file(options.recipe, ("image", "text"))
    if recipe.read(path).get("kind") == "image":
        loaded = recipe.load(ImageTokenizerRecipe, path, options.overrides)
        try:
            return _train(train_image, loaded, options, "tokenizer train")
        except torch.OutOfMemoryError as error:
            raise TrainingError(full_gpu(error, _LESS_OF_TOKENISER)) from None
    if options.resume:
        raise UsageError(
            "a text tokeniser is trained in one go and saves nothing on the way: leave --resume out"
        )
    run = options.run or Path("runs") / path.stem
    texts = recipe.load(TextTokenizerRecipe, path, options.overrides)
    tokenizer = train_text(texts, run)
    if tokenizer.size < texts.vocab_size:
        print(f"the texts give {tokenizer.size} ids, not {texts.vocab_size}", file=sys.stderr)
    print(run)
    return 0


def _train(
    function: Callable[[Any, Path, bool], bool],
    loaded: ModelRecipe | ImageTokenizerRecipe,
    options: argparse.Namespace,
    command: str,
) -> int:
    run = options.run or Path("runs") / Path(options.recipe).stem
    finished = function(loaded, run, options.resume)
    if distributed.is_main() and finished:
        print(run)
    elif distributed.is_main():
        words = ["mmrdpm", *command.split(), options.recipe, *options.overrides, "--run", str(run)]
        print(f"stopped; go on with: {shlex.join(words)} --resume", file=sys.stderr)
    return 0 if finished else INTERRUPTED


def tokenizer_eval(options: argparse.Namespace) -> None:
    """Prints what a tokeniser loses and how it uses its codes."""
    folder = _tokenizer(options.tokenizer)
    if not (folder / image_tokenizer.SPEC_FILE).is_file():
        if options.images:
            raise UsageError(f"--images: {folder} is a text tokeniser: leave it out")
        figures = measure_texts(text_tokenizer.load(folder))
        print(f"ids {figures.size}, {figures.bytes_per_token:.2f} bytes per token")
        print(f"{figures.texts} embedded texts, {figures.broken} changed by a round trip")
        return
    tokenizer = image_tokenizer.load(folder)
    for title, squares in _measured_on(options, tokenizer.image_size):
        found = measure_images(tokenizer, squares)
        plain, coded = (found.psnr[way].mean().item() for way in WAYS)
        likeness = [found.ssim[way].mean().item() for way in WAYS]
        print(f"{title}: {len(found.psnr['codes'])} pictures")
        print(f"  PSNR  autoencoder {plain:.2f} dB, codes {coded:.2f} dB", end="")
        print(f" (cost {plain - coded:.2f} dB)")
        print(f"  SSIM  autoencoder {likeness[0]:.4f}, codes {likeness[1]:.4f}")
        steps = range(tokenizer.num_timesteps, 0, -1)
        print("  timestep         " + "".join(f"{t:7d}" for t in steps))
        print("  latent error     " + "".join(f"{e.mean():7.3f}" for e in found.latent_error))
        print("  codebook usage   " + "".join(f"{u:7.1%}" for u in found.usage))
        sizes = zip(found.code_indices, found.codebook_sizes, strict=True)
        notes = dict.fromkeys(few(codes.numel(), size) for codes, size in sizes)
        for note in filter(None, notes):
            print(f"  (usage is {note})")


def _measured_on(options: argparse.Namespace, size: int) -> Iterator[tuple[str, np.ndarray]]:
    if options.images:
        yield str(options.images), load_squares(options.images, size, options.count)
        return
    data = load_emoji(size)
    for title, split in GROUPS.items():
        yield title, data.images[data.indices(split)]


def tokenizer_show(options: argparse.Namespace) -> None:
    """Draws every state of a picture on its way from noise through its codes."""
    tokenizer = image_tokenizer.load(_tokenizer(options.tokenizer))
    photo = to_square(open_picture(Path(options.photo)), tokenizer.image_size)
    (record,) = tokenizer.encode(to_tensor(photo[None]), [api.check_seed(options.seed)])
    states = tokenizer.states([record])[:, 0].flip(0)
    strip = [*to_pictures(tokenizer.decode_latents(states)), Image.fromarray(photo)]
    path = options.out or Path(f"{Path(options.photo).stem}-states.png")
    save_picture(contact_sheet([strip], scale=max(1, 96 // tokenizer.image_size)), path)
    print(path)


def export_command(options: argparse.Namespace) -> None:
    """Makes a small model to ship of a run."""
    print(export(options.run, options.folder, options.overrides, options.int8))


def _tokenizer(name: str) -> Path:
    folder = shipped.resolve("tokenizers", name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a tokeniser is a folder, not a file")
    return folder
