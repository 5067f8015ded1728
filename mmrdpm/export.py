"""Makes a model to ship of a run: what `api.load` reads, small, without the state of training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mmrdpm import checkpoint, recipe, weights
from mmrdpm.api import TOKENIZER_FILES
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.model_recipe import ModelRecipe


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
    half = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{newest}: tensor {name!r} does not fit into float16")
    small = weights.narrowed(tensors) if int8 else half
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the folder, to be moved there whole, and in a folder of its own, so that it is ours
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        whole = Path(beside) / folder.name
        for place, files in TOKENIZER_FILES.items():
            checkpoint.copy_files(run / place, whole / place, files)
        recipe.dump(resolved, whole / checkpoint.RECIPE_FILE)
        weights.save(small, whole / newest.name, about)
        return whole.rename(folder)
