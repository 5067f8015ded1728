"""What a sweep is: base recipes, a budget, and named variants that override them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from mmrdpm import api, hub, recipe, shipped, text_tokenizer
from mmrdpm.errors import MmrdpmError, RecipeError
from mmrdpm.metrics.distance import LEAST_OF_KERNEL
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.image_tokenizer import ImageTokenizerConfig
from mmrdpm.sampling.image import Guided
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.train_tokenizer import ImageTokenizerRecipe

Texts = Callable[[str], TextTokenizer]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,59}")  # of a variant
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # of the sweep


@dataclass(frozen=True)
class Variant:
    """One row of the table; each list holds overrides such as `model.history=true`.

    Attributes:
        name: lower case, as its folder is called.
        tokenizer: of the tokeniser's recipe; variants with the same ones share the tokeniser.
        model: of the model's recipe; variants with the same ones, tokeniser too, share the weights.
        sampling: of the section `sampling`, without its name: they need no training.
        tflops: a budget of its own; 0 is the sweep's.
    """

    name: str
    tokenizer: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    tflops: float = field(default=0.0, metadata={"min": 0.0})


@dataclass(frozen=True)
class Measures:
    """What is measured of a trained model.

    Attributes:
        names: training concepts that are drawn and captioned; 200 leave a share uncertain by up
            to 7 points.
        batches: of training documents under fresh noise, for the losses.
        joint_steps: updates of the head that estimates what drawing positions independently
            loses; 0 leaves that out.
        seed: chooses the names and draws the noise.
    """

    names: int = field(default=200, metadata={"min": LEAST_OF_KERNEL})
    batches: int = field(default=20, metadata={"min": 1})
    joint_steps: int = field(default=300, metadata={"min": 0})
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})


Chart = Literal["quality", "compute", "lr"]
"""What is drawn: quality by variant and information, loss over budget, or over learning rate."""


@dataclass(frozen=True)
class Sweep:
    """A recipe of kind `sweep`.

    Attributes:
        name: what its table and plots are called; that of the file where it is left out.
        model_recipe: name or file of the base; left out, only tokenisers are trained and measured.
        tokenizer_recipe: the base of tokenisers; left out, the model recipe's own is used as it is.
        tflops: training budget of a run, 1e12 floating point operations of forward and backward
            passes; the number of updates follows from it.
        seeds: of training; every variant is trained with each.
        chart: what is drawn; lr takes `model.width` and `train.lr` from the variants' overrides.
    """

    variants: tuple[Variant, ...]
    name: str = ""
    model_recipe: str | None = None
    tokenizer_recipe: str | None = None
    tflops: float = field(default=50.0, metadata={"min": 0.0})
    seeds: tuple[int, ...] = field(default=(0,), metadata={"min": 0, "max": 2**63 - 1})
    measures: Measures = field(default_factory=Measures)
    chart: Chart = "quality"
    kind: Literal["sweep"] = "sweep"

    @property
    def names(self) -> list[str]:
        """Of the variants, in their order."""
        return [variant.name for variant in self.variants]

    @property
    def base(self) -> str | None:
        """The name of the variant that overrides nothing, where there is one."""
        return next((v.name for v in self.variants if v == Variant(v.name)), None)


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep and resolves every variant, so that a mistake shows before hours are spent.

    Args:
        overrides: `key=value` of the sweep itself, as `seeds=[3, 4]`.

    Raises:
        RecipeError: the file, a base recipe or an override is wrong; it names the variant.
    """
    sweep = recipe.load(Sweep, path, overrides)
    if sweep.name and not _FILE_NAME.fullmatch(sweep.name):
        raise RecipeError(
            f"{path}: name {sweep.name!r}: files are called so: A-Z, a-z, 0-9, '_', '-' and, not as"
            " the first, '.'"
        )
    sweep = replace(sweep, name=sweep.name or path.stem)
    names = sweep.names
    for name in names:
        if not _NAME.fullmatch(name):
            raise RecipeError(f"{path}: variant {name!r}: a name has a-z, 0-9, '_', '.' and '-'")
        if names.count(name) > 1:
            raise RecipeError(f"{path}: variant {name!r} comes twice: give each its own name")
    if sweep.model_recipe and not sweep.tflops:
        raise RecipeError(f"{path}: tflops is 0, which trains nothing: give the budget of a run")
    if not names or not sweep.seeds or not (sweep.model_recipe or sweep.tokenizer_recipe):
        raise RecipeError(f"{path}: a sweep needs variants, seeds, and a base recipe")
    load_texts = cache(_load_texts)  # most variants have the same
    for variant in sweep.variants:
        try:
            _check(sweep, variant, load_texts)
        except MmrdpmError as error:
            raise RecipeError(f"{path}: variant {variant.name}: {error}") from None
    return sweep


def _load_texts(name: str) -> TextTokenizer:
    return text_tokenizer.load(hub.resolve("tokenizers", name, text_tokenizer.FILES))


def _check(sweep: Sweep, variant: Variant, load_texts: Texts) -> None:
    if variant.tokenizer and not sweep.tokenizer_recipe:
        raise RecipeError("it overrides the tokeniser: set tokenizer_recipe")
    if (variant.model or variant.sampling) and not sweep.model_recipe:
        raise RecipeError("it overrides the model: set model_recipe")
    if sweep.tokenizer_recipe:
        tokenizer_recipe(sweep, variant)
    if sweep.model_recipe:
        _check_model(sweep, variant, load_texts)
        sampling(sweep, variant)
    if sweep.chart == "lr":
        keys = {override.partition("=")[0] for override in variant.model}
        if not {"model.width", "train.lr"} <= keys:
            raise RecipeError("chart: lr needs model.width and train.lr in its model overrides")


def _check_model(sweep: Sweep, variant: Variant, load_texts: Texts) -> None:
    model = model_recipe(sweep, variant, steps=1, seed=0)
    given = recipe.override({}, variant.model)
    for section, key, instead in (
        ("train", "steps", "tflops"),
        ("train", "seed", "seeds"),
        *([("tokenizers", "image", "tokenizer")] if sweep.tokenizer_recipe else []),
    ):
        if key in (given.get(section) or {}):
            raise RecipeError(f"{section}.{key} is set by the sweep: use its key {instead}")
    if model.tokenizers.text:  # else it is that of model.init_from
        load_texts(model.tokenizers.text)
    images = _image_config(sweep, variant, model.tokenizers.image)
    api.check_codebook(model.model, model.train.soft_labels, images.per_step_codebook)
    timesteps = images.num_timesteps
    if model.data.steps_per_image > timesteps:  # as the drafts of documents want it
        raise RecipeError(
            f"data.steps_per_image is {model.data.steps_per_image}, its image tokeniser has only"
            f" {timesteps} timesteps: lower it"
        )


def _image_config(sweep: Sweep, variant: Variant, name: str) -> ImageTokenizerConfig:
    """Of the tokeniser that the variant trains, or of the one of that name."""
    if sweep.tokenizer_recipe:
        return tokenizer_recipe(sweep, variant).tokenizer
    folder = hub.resolve("tokenizers", name, image_tokenizer.FILES)
    return recipe.load(ImageTokenizerConfig, folder / image_tokenizer.SPEC_FILE)


def tokenizer_recipe(sweep: Sweep, variant: Variant) -> ImageTokenizerRecipe:
    """The recipe of the variant's image tokeniser."""
    assert sweep.tokenizer_recipe is not None
    path = shipped.resolve("recipes", sweep.tokenizer_recipe)
    return recipe.load(ImageTokenizerRecipe, path, variant.tokenizer)


def model_recipe(
    sweep: Sweep, variant: Variant, steps: int, seed: int, images: Path | None = None
) -> ModelRecipe:
    """The recipe of the variant's run; `images` is the folder of its own image tokeniser."""
    assert sweep.model_recipe is not None
    path = shipped.resolve("recipes", sweep.model_recipe)
    loaded = recipe.load(ModelRecipe, path, variant.model)
    tokenizers = loaded.tokenizers
    if images:
        tokenizers = replace(tokenizers, image=str(images))
    training = replace(loaded.train, steps=steps, seed=seed)
    return replace(loaded, train=training, tokenizers=tokenizers)


def sampling(sweep: Sweep, variant: Variant) -> Guided:
    """How the variant draws: the base recipe's way, overridden."""
    assert sweep.model_recipe is not None
    path = shipped.resolve("recipes", sweep.model_recipe)
    mapping = recipe.read(path, [f"sampling.{override}" for override in variant.sampling])
    return recipe.from_dict(Guided, mapping.get("sampling") or {}, f"{path}: sampling")


def tokenizer_owner(sweep: Sweep, variant: Variant) -> str:
    """The first variant with the same tokeniser, whose name the tokeniser bears."""
    return next(v.name for v in sweep.variants if v.tokenizer == variant.tokenizer)


def weights_owner(sweep: Sweep, variant: Variant) -> str:
    """The first variant trained alike, whose name the run bears."""
    wanted = (variant.tokenizer, variant.model, variant.tflops)
    alike = (v.name for v in sweep.variants if (v.tokenizer, v.model, v.tflops) == wanted)
    return next(alike)
