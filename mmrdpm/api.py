"""`load()` and `Model`: pictures from texts, texts from pictures, texts from texts.

A model is a folder, a run's own or a shipped one:

    DIR/recipe.yaml                resolved recipe: model, data.seq_len, sampling and
                                   train.soft_labels count here
    DIR/step-*.safetensors         weights, the newest last by name
    DIR/tokenizers/image, text     the tokenizers that they were trained with
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrdpm import checkpoint, machine, recipe, shipped, text_tokenizer, weights
from mmrdpm.data.pictures import to_pictures, to_square, to_tensor
from mmrdpm.document import Document, ImageSegment, Packed, TextSegment, length, pack
from mmrdpm.errors import CheckpointError, RecipeError, UsageError
from mmrdpm.identity import check_identity
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.rdpm.soft_labels import lengthening
from mmrdpm.sampling.choose import Choice
from mmrdpm.sampling.image import Guided, Request, sample_images
from mmrdpm.sampling.text import sample_text, text_log_likelihood
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

DEFAULT_MODEL = "emoji-tiny"
IMAGE_TOKENIZER, TEXT_TOKENIZER = "tokenizers/image", "tokenizers/text"  # inside a model's folder
TOKENIZER_FILES = {IMAGE_TOKENIZER: image_tokenizer.FILES, TEXT_TOKENIZER: text_tokenizer.FILES}
_MAX_SEED = 2**32 - 1  # torch's generator on the CPU looks at no more bits
_LONGEST_CAPTION = 48  # tokens; the embedded names take 20 at most


def load(model: str | Path = DEFAULT_MODEL) -> Model:
    """A shipped model by name, or the newest checkpoint of a run folder.

    Raises:
        MmrdpmError: there is no such model, or its files are damaged or do not fit together.
    """
    folder = shipped.resolve("models", model)
    path = checkpoint.newest(folder) if folder.is_dir() else None
    if path is None:
        raise CheckpointError(
            f"{folder}: no model: give a folder that holds {checkpoint.RECIPE_FILE} and"
            " step-*.safetensors, as `mmrdpm train` makes it"
        )
    spec = folder / checkpoint.RECIPE_FILE
    mapping = recipe.of_kind(spec, "model")
    config = recipe.from_dict(TransformerConfig, mapping.get("model") or {}, f"{spec}: model")
    sampling = recipe.from_dict(Guided, mapping.get("sampling") or {}, f"{spec}: sampling")
    data, train = mapping.get("data"), mapping.get("train")
    context = data.get("seq_len") if isinstance(data, dict) else None
    if type(context) is not int or context < 1:
        raise CheckpointError(
            f"{spec}: data.seq_len must be an integer, 1 or more: the recipe is damaged"
        )
    # recipes of before labels could be soft have no such key, but all have the section
    soft_labels: Any = train.get("soft_labels", 0.0) if isinstance(train, dict) else None
    if type(soft_labels) not in (int, float) or not 0 <= soft_labels < 1e30:
        raise CheckpointError(
            f"{spec}: train.soft_labels must be a number from 0 to 1e30: the recipe is damaged"
        )
    images = image_tokenizer.load(folder / IMAGE_TOKENIZER)
    texts = text_tokenizer.load(folder / TEXT_TOKENIZER)
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    with weights.as_large_as(path):
        transformer = build(config, vocabulary, images, soft_labels)
    check_identity(path, images, texts)
    weights.load_into(transformer, path)
    transformer.eval().requires_grad_(False)
    return Model(transformer, images, texts, sampling, context).to(machine.device())


def build(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    images: ImageTokenizer,
    soft_labels: float = 0.0,
) -> Transformer:
    """A fresh transformer that fits the tokenizers; images then begin with noise that it knows.

    Args:
        soft_labels: of the codes that it learns or has learned, see `objective.loss`.

    Raises:
        RecipeError: the codebook does not suit what the model is to know of it.
    """
    check_codebook(config, soft_labels, images.codebook.per_step)
    images.noise_pool = config.noise_pool
    channels, num_timesteps = images.latent_channels, images.num_timesteps
    transformer = Transformer(config, vocabulary.size, channels, num_timesteps)
    transformer.know_codes(images.codebook.codes, images.estimates(config.sees_start_noise))
    transformer.lengthening = lengthening(images.codebook.codes[0], soft_labels)
    return transformer


def check_codebook(config: TransformerConfig, soft_labels: float, per_step: bool) -> None:
    """Raises RecipeError where a codebook for each timestep does not suit what is to be known."""
    if config.preconditioning and per_step:
        raise RecipeError(
            "model.preconditioning: the image tokeniser has a codebook for each timestep, and"
            " scores begin from the vectors of one for all: set it to false"
        )
    if soft_labels and per_step:
        raise RecipeError(
            "train.soft_labels: the image tokeniser has a codebook for each timestep, and labels"
            " are softened in one for all: set it to 0"
        )


@dataclass
class Model:
    """A transformer with its tokenizers, ready to use.

    Every picture and text depends on its own input and seed alone, to the last bit, whatever else
    is in the batch. Pictures are drawn in groups, see `sampling.image`; captions are written one by
    one, as they end at different times.

    Attributes:
        sampling: what `generate` uses where it is not told otherwise.
        context: the most tokens that a document may take.
    """

    transformer: Transformer
    images: ImageTokenizer
    texts: TextTokenizer
    sampling: Guided
    context: int

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.texts.size, self.images.codebook_size)

    def to(self, device: torch.device | str) -> Model:
        """The same model on another device."""
        return replace(self, transformer=self.transformer.to(device), images=self.images.to(device))

    def generate(
        self, prompts: Sequence[str], seed: int | Sequence[int] = 0, n: int = 1, **how: float | str
    ) -> list[Image.Image]:
        """Draws `n` pictures per prompt, in the prompts' order.

        Picture j of a prompt is drawn with the seed `seed + j`: it is the same picture that
        `n=1` with that seed gives.

        Args:
            seed: one for all prompts, so that they share their noise, or one for each.
            how: what differs from `self.sampling`: guidance_scale, guidance_schedule,
                expected_steps, temperature, top_k, top_p.

        Raises:
            UsageError: a prompt is empty or too long, a number is out of range, or there are seeds
                for some prompts only.
            DataError: a prompt holds half a character.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise UsageError("generate takes a list of prompts: put the text in [brackets]")
        _check_count("n", n)
        seeds = _seeds(seed, len(prompts))
        if not prompts:
            return []
        drawn = [(p, s + j) for p, s in zip(prompts, seeds, strict=True) for j in range(n)]
        return to_pictures(self.images.decode_latents(self._states(drawn, **how)[0]))

    def trace(self, prompt: str, seed: int = 0, **how: float | str) -> list[Image.Image]:
        """The picture after every step, from `x_T` (noise) to `x_0` (what `generate` gives).

        Raises:
            UsageError, DataError: as `generate`.
        """
        states = self._states([(prompt, seed)], **how)[:, 0]
        return to_pictures(self.images.decode_latents(states.flip(0)))

    def reconstruct(
        self, images: Sequence[Image.Image], seed: int | Sequence[int] = 0
    ) -> list[Image.Image]:
        """What the image tokeniser leaves of pictures: through their codes and back.

        Args:
            seed: of the noise, one for all pictures or one for each.

        Raises:
            UsageError: there are other things than pictures, or seeds for some of them only.
            DataError: a picture is damaged or too oblong.
        """
        seeds = _seeds(seed, len(_pictures(images)))
        pairs = zip(images, seeds, strict=True)
        latents = [self._states_of(image, own)[1][0] for image, own in pairs]
        return to_pictures(self.images.decode_latents(torch.stack(latents))) if latents else []

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """The likeliest text for each picture, token by token, of at most 48 tokens.

        Raises:
            UsageError: there are other things than pictures.
            DataError: a picture is damaged or too oblong.
        """
        follows = TextSegment(self.vocabulary.caption((), whole=False))
        documents = [(*self._looked_at(image), follows) for image in _pictures(images)]
        return [self._continue(document, _LONGEST_CAPTION).strip() for document in documents]

    def complete(
        self, text: str, max_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """The text with its continuation, which ends before the first picture.

        Raises:
            UsageError: the text is empty or longer than the context, or a number is out of range.
            DataError: it holds half a character.
        """
        if not isinstance(text, str):
            raise UsageError(f"{text!r:.40} is no text: give one to complete")
        if not text:
            raise UsageError("the text to complete is empty: give at least one character")
        _check_count("max_tokens", max_tokens)
        read = self.texts.encode(text)
        segment = TextSegment((self.vocabulary.bos, *read))
        if len(segment.token_ids) >= self.context:
            raise UsageError(_too_long("the text", len(segment.token_ids), self.context - 1))
        how = Choice(temperature)
        return text + self._continue([segment], max_tokens, how, check_seed(seed), read)

    def score(self, image: Image.Image, text: str) -> float:
        """`log p(text | image)` in nats, exact, with the end of the text; at most 0.

        Among all ids that are no code, of which no text has any.

        Raises:
            UsageError: it is no picture, or the text is none or longer than the context.
            DataError: the picture is damaged or too oblong, or the text holds half a character.
        """
        if not isinstance(image, Image.Image) or not isinstance(text, str):
            raise UsageError(
                f"score takes a picture and a text, not {image!r:.40} and {text!r:.40}"
            )
        _pictures([image])
        caption = self.vocabulary.caption(self.texts.encode(text))
        document = (*self._looked_at(image), TextSegment(caption))
        return text_log_likelihood(self.transformer, self._pack(document), len(caption) - 1)

    def _states(self, drawn: Sequence[tuple[str, int]], **how: float | str) -> Tensor:
        """The states of one image per prompt and seed, `[T + 1, B, *grid, C]`."""
        known = [key.name for key in fields(Guided)]
        for key in how.keys() - known:
            raise UsageError(f"generate has no {key!r}: choose among {', '.join(known)}")
        guided = replace(self.sampling, **how)  # type: ignore[arg-type]
        captions = {prompt: self.prompt_ids(prompt) for prompt, _ in drawn}
        requests = [Request(captions[prompt], check_seed(seed)) for prompt, seed in drawn]
        return sample_images(self.transformer, self.images, self.vocabulary, requests, guided)

    def _continue(
        self,
        document: Document,
        max_tokens: int,
        choice: Choice | None = None,
        seed: int = 0,
        read: Sequence[int] = (),
    ) -> str:
        """What follows; of the text ids `read` right before, as a space may hang on both."""
        room = max(0, min(max_tokens, self.context - length(document)))
        packed = self._pack(document)
        ids = sample_text(self.transformer, self.vocabulary, packed, room, seed, choice)
        return self.texts.decode([*read, *ids])[len(self.texts.decode(read)) :]

    def _looked_at(self, image: Image.Image) -> tuple[TextSegment, ImageSegment]:
        """What comes before a caption: the picture as its codes give it, from noise of seed 0."""
        code_indices, states = self._states_of(image, seed=0)
        segment = ImageSegment(code_indices.cpu(), states.cpu(), clean=True)
        return TextSegment(self.vocabulary.prompt()), segment

    @torch.no_grad()
    def _states_of(self, image: Image.Image, seed: int) -> tuple[Tensor, Tensor]:
        """A picture's code indices `[T, *grid]` and states `[T + 1, *grid, C]`."""
        pixels = to_tensor(to_square(image, self.images.image_size)[None])
        latents = self.images.autoencoder.encode(pixels.to(self._device))
        code_indices, states = self.images.encode_latents(latents, [seed])
        return code_indices[:, 0], states[:, 0]

    def _pack(self, document: Document) -> Packed:
        size = length(document)
        if size > self.context:
            raise UsageError(_too_long("the document", size, self.context))
        channels, rank = self.images.latent_channels, len(self.images.grid)
        return pack([[document]], size, self.vocabulary, channels, rank).to(self._device)

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """The token ids of what is to be drawn.

        Raises:
            UsageError: it is empty or too long.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt {prompt!r:.40} is no text: say in words what to draw")
        if not prompt.strip():
            raise UsageError("the prompt is empty: say what to draw")
        ids = tuple(self.texts.encode(prompt))
        room = self.context - 2 - math.prod(self.images.grid)
        if len(ids) > room:
            raise UsageError(_too_long(f"the prompt {prompt[:30]!r}", len(ids), room))
        return ids

    @property
    def _device(self) -> torch.device:
        return self.transformer.table.weight.device


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        UsageError: it is no whole number, or out of range.
    """
    try:
        whole = index(seed)
    except TypeError:
        whole = -1
    if not 0 <= whole <= _MAX_SEED:
        raise UsageError(f"seed {seed}: it must be a whole number between 0 and {_MAX_SEED}")
    return whole


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise UsageError(f"{name} is {value!r}: it must be a whole number, at least 1")


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of several inputs."""
    seeds = seed if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count:
        raise UsageError(f"{len(seeds)} seeds for {count} inputs: give one each, or one for all")
    return [check_seed(one) for one in seeds]


def _pictures(images: Sequence[Image.Image]) -> Sequence[Image.Image]:
    if not isinstance(images, Sequence) or not all(isinstance(i, Image.Image) for i in images):
        raise UsageError("give a list of pictures: [PIL.Image.open(path), ...]")
    if any(image.mode == "F" for image in images):  # nothing says which values are black and white
        raise UsageError("a picture has floating point pixels: convert it to 8 bits a channel")
    return images


def _too_long(what: str, size: int, room: int) -> str:
    return f"{what} takes {size} tokens, but the context has room for {room}: make it shorter"
