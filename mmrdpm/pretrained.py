"""Beginning with weights that are there: `model.init_from`.

    a language model    folder or hub id with `config.json`, `tokenizer.json`, `*.safetensors`
    an earlier run      folder, or name of a shipped model, see `api`

The shape of the transformer and the text tokeniser are theirs, so that a recipe can leave both
out. Weights are read one after the other: no rank ever holds more than one whole.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmrdpm import checkpoint, hub, language_model, recipe, text_tokenizer, weights
from mmrdpm.api import TEXT_TOKENIZER
from mmrdpm.distributed import shard_like
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.identity import check_vocabulary
from mmrdpm.language_model import LanguageModel
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

R = TypeVar("R")

_SPECS = (language_model.CONFIG_FILE, checkpoint.RECIPE_FILE)
_FREE = (
    *("init_from", "sees_start_noise", "noise_pool", "history"),
    *("code_geometry", "preconditioning", "places"),
)
"""Keys of the recipe, whatever it begins with."""
_OF_IMAGES = (
    *("from_latents.weight", "timesteps.weight", "from_codes.weight"),
    *("precision.weight", "precisions.weight"),
)
"""Drawn anew where they do not fit: other image tokenisers have other latents and codes."""


class Origin(Protocol):
    """What can be begun with."""

    folder: Path
    config: TransformerConfig

    def check(self, vocabulary: Vocabulary) -> None:
        """Raises CheckpointError unless its weights fit its config and the vocabulary.

        All ranks must call it, before any takes a tensor.
        """

    def tensor(self, name: str, shape: torch.Size, vocabulary: Vocabulary) -> Tensor | None:
        """One parameter of ours, None where it has to be drawn anew."""


class Run:
    """The newest checkpoint of a run folder, or a shipped model."""

    def __init__(self, folder: Path) -> None:
        spec = folder / checkpoint.RECIPE_FILE
        section = recipe.read(spec).get("model") or {}
        self.folder = folder
        self.config = recipe.from_dict(TransformerConfig, section, f"{spec}: model")
        self._path, self._shapes = folder, dict[str, tuple[int, ...]]()

    def check(self, vocabulary: Vocabulary) -> None:
        path = checkpoint.agreed(self.folder)  # once, for all tensors: the run may go on meanwhile
        if path is None:
            raise CheckpointError(f"{self.folder}: the run has no checkpoint yet: train it first")
        check_vocabulary(path, vocabulary)
        self._path, self._shapes = path, weights.shapes(path)

    def tensor(self, name: str, shape: torch.Size, vocabulary: Vocabulary) -> Tensor | None:
        found = self._shapes.get(name)
        if found == tuple(shape):
            return weights.tensor(self._path, name)
        if name in _OF_IMAGES:
            return None
        raise CheckpointError(
            f"{self._path}: tensor {name!r} "
            + (f"has shape {list(found)}, not {list(shape)}" if found else "is missing")
            + f": it is not of the model that {checkpoint.RECIPE_FILE} beside it describes"
        )


def lacks_shape(config: TransformerConfig) -> bool:
    """Whether a recipe leaves the shape to what it begins with."""
    return bool(config.init_from) and config == _free(TransformerConfig(), config)


def complete(loaded: R, run: Path | None = None) -> R:
    """A model recipe in which shape and text tokeniser are what `model.init_from` says.

    Args:
        loaded: a `ModelRecipe`; without `init_from` it stays as it is.
        run: its folder; a run that has begun knows both, and does not need its origin any more.

    Raises:
        RecipeError: the recipe gives another shape.
        MmrdpmError: what it begins with is missing or damaged.
    """
    given: Any = loaded
    name = given.model.init_from
    if not name:
        return loaded
    config, text = _begun(name, run) or _described(name, given.model)
    config = _free(config, given.model)
    if not lacks_shape(given.model) and given.model != config:
        raise RecipeError(
            f"model.init_from is {name}, which has {_differences(config, given.model)}: leave the"
            " shape out, or correct it"
        )
    if not given.tokenizers.text:
        given = replace(given, tokenizers=replace(given.tokenizers, text=text))
    return replace(given, model=config)


@torch.no_grad()
def begin(transformer: Transformer, name: str, vocabulary: Vocabulary, texts: TextTokenizer) -> str:
    """Fills a transformer, whole or sharded, with the weights to begin with; says which.

    Parameters that it has no weights for keep their values. All ranks must call it.

    Raises:
        CheckpointError: they are missing, damaged or not finite, do not fit the transformer, or
            were trained with another vocabulary.
    """
    folder = hub.resolve("models", name, (*_SPECS, "*.safetensors", *_text_files()))
    origin = _open(folder)
    place = _text_folder(origin)
    if text_tokenizer.load(place).fingerprint() != texts.fingerprint():
        raise CheckpointError(
            f"{name}: its text ids are those of {place}, the recipe's tokenizers.text is another"
            f" tokenizer ({texts.size} ids): leave tokenizers.text out, or name that one"
        )
    origin.check(vocabulary)
    anew = []
    # shapes alone do not tell: x_t alone has as many channels as a guess of z_0, or as x_t and x_T
    # of a latent with half of them
    sees_else = isinstance(origin, Run) and _seen(origin.config) != _seen(transformer.config)
    for own, parameter in transformer.named_parameters():
        whole = origin.tensor(own, parameter.shape, vocabulary)
        if whole is None or (sees_else and own == "from_latents.weight"):
            anew.append(own)
        else:
            weights.check_finite({own: whole}, origin.folder)
            parameter.copy_(shard_like(whole, parameter))
    return f"weights of {name}" + (f", drawn anew: {', '.join(anew)}" if anew else "")


def _seen(config: TransformerConfig) -> str:
    """What image positions see."""
    if config.preconditioning:
        return "a guess of z_0"
    return "x_t and x_T" if config.sees_start_noise else "x_t"


def _open(folder: Path) -> Origin:
    if (folder / checkpoint.RECIPE_FILE).is_file():
        return Run(folder)
    if (folder / language_model.CONFIG_FILE).is_file():
        return LanguageModel(folder)
    raise CheckpointError(
        f"{folder}: neither a run ({checkpoint.RECIPE_FILE}) nor a language model"
        f" ({language_model.CONFIG_FILE}): correct model.init_from"
    )


def _begun(name: str, run: Path | None) -> tuple[TransformerConfig, str] | None:
    """Shape and text tokeniser as written when the run began."""
    if run is None or not (run / checkpoint.RECIPE_FILE).is_file():
        return None
    saved = Run(run)
    text = (recipe.read(run / checkpoint.RECIPE_FILE).get("tokenizers") or {}).get("text")
    return (saved.config, text) if saved.config.init_from == name and text else None


def _described(name: str, given: TransformerConfig) -> tuple[TransformerConfig, str]:
    """Shape and text tokeniser of what lies under a name."""
    origin = _open(hub.resolve("models", name, (*_SPECS, *_text_files())))
    if isinstance(origin, LanguageModel):
        return origin.config, name
    kept = [key for key in ("code_geometry", "preconditioning") if getattr(origin.config, key)]
    had = {key: getattr(origin.config, key) for key in ("history", "places", *kept)}
    # no weight would show the first two
    differ = [
        f"model.{key}={str(on).lower()}" for key, on in had.items() if getattr(given, key) != on
    ]
    if differ:
        raise RecipeError(
            f"model.init_from is {name}, which was trained with {' '.join(differ)}: write the same"
        )
    return origin.config, str(_text_folder(origin))


def _text_folder(origin: Origin) -> Path:
    return origin.folder if isinstance(origin, LanguageModel) else origin.folder / TEXT_TOKENIZER


def _text_files() -> tuple[str, ...]:
    return *text_tokenizer.FILES, *(f"{TEXT_TOKENIZER}/{name}" for name in text_tokenizer.FILES)


def _free(config: TransformerConfig, of: TransformerConfig) -> TransformerConfig:
    return replace(config, **{name: getattr(of, name) for name in _FREE})


def _differences(there: TransformerConfig, here: TransformerConfig) -> str:
    pairs = ((f.name, getattr(there, f.name), getattr(here, f.name)) for f in fields(there))
    return ", ".join(f"{name} {a} (the recipe: {b})" for name, a, b in pairs if a != b)
