"""Makes a model to ship of a run: what `api.load` reads, small, without the state of training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from mmrdpm import checkpoint, recipe, weights
from mmrdpm.api import TOKENIZER_FILES
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.train_model import ModelRecipe


def export(run: Path, folder: Path, overrides: Sequence[str] = (), int8: bool = False) -> Path:
    """Writes the newest checkpoint of a run to `folder`, its weights in float16.

    Args:
        int8: whether the transformer's matrices take half of that, rounded to 255 steps a row.
        overrides: `sampling.key=value`, the defaults of sampling that the model is to have.

    Raises:
        MmrdpmError: there is no such run, `folder` exists, or an override is not of sampling.
    """
    for override in overrides:
        if not override.startswith("sampling."):
            raise RecipeError(f"{override}: an export may change sampling.* only")
    newest = checkpoint.newest(run)
    if newest is None:
        raise CheckpointError(f"{run}: no checkpoint to export: give the folder of a run")
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already: name another folder, or remove it")
    tensors, about = weights.load(newest)
    resolved = recipe.load(ModelRecipe, run / checkpoint.RECIPE_FILE, overrides)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for place, files in TOKENIZER_FILES.items():
        checkpoint.copy_files(run / place, partial / place, files)
    recipe.dump(resolved, partial / checkpoint.RECIPE_FILE)
    half = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{newest}: tensor {name!r} does not fit into float16")
    small = weights.narrowed(tensors) if int8 else half
    weights.save(small, partial / newest.name, about)
    return partial.rename(folder)
