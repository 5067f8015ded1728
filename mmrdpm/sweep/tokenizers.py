"""The tokenisers of a sweep: each trained once, measured once, a line each in tokenizers.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrdpm import checkpoint, shipped
from mmrdpm.data.emoji import Split, load_emoji
from mmrdpm.errors import CheckpointError
from mmrdpm.evaluation.figure import digest
from mmrdpm.evaluation.tokenizer import WAYS, measure_images
from mmrdpm.metrics.features import sha256_of
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
        CheckpointError: its folder holds one of another recipe, or it is not the one that its
            line in tokenizers.jsonl was measured on.
    """
    name = tokenizer_owner(sweep, variant)
    folder, records = out / "tokenizers" / name, Records(out / "tokenizers.jsonl")
    recipe = tokenizer_recipe(sweep, variant)
    begun = (folder / checkpoint.RECIPE_FILE).exists()
    if begun:
        checkpoint.begin(folder, recipe, resume=True)  # the same recipe, or an error
    source = recipe.train.autoencoder_from
    stands_on = content_sha256(shipped.resolve("tokenizers", source)) if source else None
    known = records.find(name=name)
    if known and known.get("autoencoder_from_sha256") != stands_on:
        raise CheckpointError(
            f"{folder}: stands on another {source} than there is now, or its line in"
            f" {records.path.name} does not say on which: name another folder with --out"
        )
    if not (folder / image_tokenizer.WEIGHTS_FILE).exists():  # written when it is done
        say(f"tokeniser {name}: {' '.join(variant.tokenizer) or 'the base'}")
        if not train_image(recipe, folder, resume=begun):
            return None
    sha256 = content_sha256(folder)
    if known is None:
        about = {"overrides": list(variant.tokenizer), "autoencoder_from_sha256": stands_on}
        records.append({"name": name, "sha256": sha256, **about, **figures(folder)})
    elif known.get("sha256", sha256) != sha256:  # older lines have none
        raise CheckpointError(
            f"{records.path}: tokeniser {name} was measured with sha256={known['sha256']}, not"
            f" {sha256}: name another folder with --out, or remove its line"
        )
    return folder


def content_sha256(folder: Path) -> str:
    """Of a tokeniser's files, as hexadecimal digits."""
    found = [folder / name for name in image_tokenizer.FILES if (folder / name).is_file()]
    return digest([sha256_of(path) for path in found])


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
