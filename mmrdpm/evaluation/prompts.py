"""The suite `prompts`: lists of free prompts, judged by CLIPScore."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from mmrdpm import hub
from mmrdpm.api import Model
from mmrdpm.data.pictures import contact_sheet
from mmrdpm.errors import CheckpointError, DataError
from mmrdpm.evaluation.figure import Figure, digest, digest_of_files
from mmrdpm.evaluation.part import Part, Shown, strips
from mmrdpm.evaluation.store import OWN_NOISE, Store, picture_seeds, read_lines
from mmrdpm.evaluation.suite import PromptsSuite
from mmrdpm.metrics.features import MissingEvaluator, sha256_of

_PREFIX = "A photo depicts "
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_FILES = "config.json, model.safetensors, preprocessor_config.json and the tokeniser's files"
_BATCH = 32
_COLUMNS, _SHOWN, _STRIPS = 8, 32, 3


class PromptsEvaluation:
    """One suite over one model.

    Raises:
        DataError: the prompts or CLIP are not where the suite says, or a list has fewer than two
            prompts; before anything is drawn.
        UsageError: a prompt is too long for the model.
    """

    def __init__(self, model: Model, suite: PromptsSuite, store: Store) -> None:
        self.model, self.suite, self.store = model, suite, store
        self.how = model.sampling.at(suite.guidance_scale)
        self.lists = read_lists(Path(suite.prompts))
        for prompts in self.lists.values():
            for prompt in prompts:
                model.prompt_ids(prompt)  # refuses what is too long
        self.clip = Clip(suite.clip)

    def parts(self) -> Iterator[Part]:
        """Everything to compute."""
        for name, prompts in self.lists.items():
            make = partial(self.clip_score, name)
            yield Part(f"clip_score, {name}", self._protocol(prompts), make)

    def clip_score(self, name: str) -> list[Figure]:
        """The mean over the prompts of a list, each the mean of its seeds."""
        prompts = self.lists[name]
        scores = torch.tensor([self.clip.scores(made, prompts) for made in self._drawn(name)])
        means, protocol = scores.double().mean(0).tolist(), self._protocol(prompts)
        return [Figure.mean(f"drawn/{name}/CLIPScore", means, "", protocol, (0.0, 2.5))]

    def shown(self) -> Iterator[Shown]:
        """Pictures for the report."""
        for name, prompts in self.lists.items():
            made = self._drawn(name)[0][:_SHOWN]
            rows = [made[i : i + _COLUMNS] for i in range(0, len(made), _COLUMNS)]
            title = f"Drawn, {name}: {', '.join(prompts[:_SHOWN])}"
            yield Shown(title, contact_sheet(rows, 2))
        few = next(iter(self.lists.values()))[:_STRIPS]
        seeds = picture_seeds(self.suite.seed, len(few))
        yield strips(self.model, few, seeds, guidance_scale=self.how.guidance_scale)

    def _drawn(self, name: str) -> list[list[Image.Image]]:
        """By seed the pictures of a list's prompts; what is kept is not drawn again."""
        draw = partial(self.model.generate, guidance_scale=self.how.guidance_scale)
        prompts, how = self.lists[name], asdict(self.how)
        title = f"drawing {len(prompts)} {name}"
        seeds = range(self.suite.seed, self.suite.seed + self.suite.seeds)
        return [self.store.pictures(title, prompts, seed, how, draw) for seed in seeds]

    def _protocol(self, prompts: Sequence[str]) -> dict:
        return {
            **self.clip.protocol,
            **asdict(self.how),
            "seed": self.suite.seed,
            "seeds": self.suite.seeds,
            "noise": OWN_NOISE,
            "count": len(prompts),
            "prompts_sha256": digest(prompts),
            "resolution": self.model.images.image_size,
        }


def read_lists(place: Path) -> dict[str, list[str]]:
    """The prompts of a text file, or of each `.txt` in a folder, by the file's name.

    Raises:
        DataError: there are none, or a list is shorter than two.
    """
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"{place}: holds no list of prompts: put NAME.txt there, a prompt a line")
    lists = {path.stem: read_lines(path) for path in files}
    for path, prompts in zip(files, lists.values(), strict=True):
        if len(prompts) < 2:
            raise DataError(f"{path}: clip_score needs at least 2 prompts: add to them")
    return lists


class Clip:
    """CLIPScore `2.5 max(cos(image, text), 0)`, Hessel et al. 2021 (arXiv 2104.08718), eq. 1.

    Args:
        model: a folder with `config.json`, `model.safetensors` and the tokeniser, or a hub id.

    Raises:
        MissingEvaluator: the library or the weights are missing.
    """

    def __init__(self, model: str) -> None:
        try:
            from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise MissingEvaluator(
                f"CLIPScore needs transformers ({_first(error)}): pip install 'mmrdpm[published]'"
            ) from None
        folder = _folder(model)
        try:
            self.network = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise MissingEvaluator(
                f"{model}: no CLIP model that can be read ({_first(error)}): put {_FILES} there"
            ) from None
        self.protocol = {
            "evaluator": "CLIPScore, 2.5 max(cos, 0)",
            "evaluator_version": version("transformers"),
            "evaluator_sha256": sha256_of(folder / "model.safetensors"),
            "config_sha256": digest_of_files(folder, ["config.json"]),  # names the activation
            "preprocessing": f"the processor's; texts behind {_PREFIX!r}",
            "preprocessing_sha256": digest_of_files(folder, _PREPROCESSING),
            "tokenizer_sha256": digest_of_files(folder, _TOKENIZER),
        }

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """One a pair, 0 to 2.5."""
        found: list[float] = []
        for start in range(0, len(pictures), _BATCH):
            chosen = slice(start, start + _BATCH)
            images = self.processor(images=list(pictures[chosen]), return_tensors="pt")
            prefixed = [_PREFIX + text for text in texts[chosen]]
            tokens = self.tokenizer(prefixed, padding=True, truncation=True, return_tensors="pt")
            out = self.network(**tokens, **images)
            cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
            found += (2.5 * cosine.clamp(min=0)).tolist()
        return found


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    if not hub.is_id(model):
        raise MissingEvaluator(
            f"{model}: no such folder: put {_FILES} of a CLIP model there, or give its place or its"
            " hub id as clip=DIR|OWNER/NAME"
        )
    try:
        return hub.fetch(model, ["*.json", "*.txt", "model.safetensors"])
    except CheckpointError as error:
        raise MissingEvaluator(f"{error}; a folder is given as clip=DIR") from None


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
