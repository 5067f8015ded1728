"""The tokenisers of a sweep: each trained once, measured once, a line each in tokenizers.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrdpm import checkpoint
from mmrdpm.data.emoji import Split, load_emoji
from mmrdpm.evaluation.tokenizer import WAYS, measure_images
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.sweep.records import Records
from mmrdpm.sweep.spec import Sweep, Variant, tokenizer_owner, tokenizer_recipe
from mmrdpm.train_tokenizer import train_image

SPLIT: Split = "held_out_concept"  # that figures are taken on


def train_tokenizer(
    sweep: Sweep, variant: Variant, out: Path, say: Callable[[str], None]
) -> Path | None:
    """The folder of the variant's tokeniser, trained if it is not yet; None if stopped.

    Raises:
        CheckpointError: its folder holds one of another recipe.
    """
    name = tokenizer_owner(sweep, variant)
    folder, records = out / "tokenizers" / name, Records(out / "tokenizers.jsonl")
    recipe = tokenizer_recipe(sweep, variant)
    begun = (folder / checkpoint.RECIPE_FILE).exists()
    if begun:
        checkpoint.begin(folder, recipe, resume=True)  # the same recipe, or an error
    if begun and records.find(name=name):
        return folder
    say(f"tokeniser {name}: {' '.join(variant.tokenizer) or 'the base'}")
    if not train_image(recipe, folder, resume=begun):
        return None
    records.append({"name": name, "overrides": list(variant.tokenizer), **figures(folder)})
    return folder


def figures(folder: Path) -> dict[str, Any]:
    """What a tokeniser loses on held-out concepts, and how it uses its codes.

    Keys: `psnr_autoencoder` and `psnr` in dB, `psnr_cost` their difference, `ssim`, and per step,
    T first, `latent_error` (mean square, the latent's variance is 1) and `usage` (0..1).
    """
    tokenizer = image_tokenizer.load(folder)
    data = load_emoji(tokenizer.image_size)
    measured = measure_images(tokenizer, data.images[data.indices(SPLIT)])
    alone, coded = (measured.psnr[way].mean().item() for way in WAYS)
    return {
        "split": SPLIT,
        "pictures": len(measured.psnr[WAYS[0]]),
        "psnr_autoencoder": alone,
        "psnr": coded,
        "psnr_cost": alone - coded,
        "ssim": measured.ssim[WAYS[1]].mean().item(),
        "latent_error": measured.latent_error.mean(1).tolist(),
        "usage": measured.usage,
    }
