"""The training stream: documents drawn from the embedded data, packed into rows.

Document i of a stream is a function of (seed, i) alone, and a batch takes documents in order until
one does not fit; so the place in the stream is one number, and a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmrdpm.data.emoji import EmojiData, load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.pictures import to_tensor
from mmrdpm.document import Document, ImageSegment, Packed, TextSegment, pack
from mmrdpm.errors import DataError
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.vocabulary import Vocabulary


@dataclass(frozen=True)
class DataPlan:
    """What the stream holds.

    Attributes:
        image_share, caption_share: of the documents, caption -> image and image -> caption;
            the rest is text.
        caption_dropout: of the caption -> image documents, those with an empty caption, which
            classifier-free guidance needs.
        steps_per_image: how many of the T timesteps one document learns, drawn at random.
        rows, seq_len: tokens per update, `rows * seq_len`.
    """

    image_share: float = field(default=0.55, metadata={"min": 0.0, "max": 1.0})
    caption_share: float = field(default=0.25, metadata={"min": 0.0, "max": 1.0})
    caption_dropout: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0})
    steps_per_image: int = field(default=4, metadata={"min": 1})
    rows: int = field(default=24, metadata={"min": 1})
    seq_len: int = field(default=256, metadata={"min": 16})


@dataclass(frozen=True)
class _Draft:
    """A document before its image is tokenised."""

    before: tuple[int, ...]
    after: tuple[int, ...] = ()
    image: int | None = None
    noise_seed: int = 0
    timesteps: tuple[int, ...] = ()

    def length(self, block: int) -> int:
        """Tokens in a row; `block` is the number of positions of one image block."""
        blocks = len(self.timesteps) or (1 if self.image is not None else 0)
        return len(self.before) + len(self.after) + blocks * block

    def document(self, images: Iterator[tuple[Tensor, Tensor]]) -> Document:
        """The document; one with an image takes the next `(code_indices, states)`."""
        before, after = TextSegment(self.before), TextSegment(self.after)
        if self.image is None:
            return [before]
        image = ImageSegment(*next(images), self.timesteps, clean=bool(self.after))
        return [before, image, after] if self.after else [before, image]


class Loader:
    """Batches of packed rows; `next_index` is all there is to its state."""

    def __init__(
        self,
        plan: DataPlan,
        seed: int,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
    ) -> None:
        self.plan, self.seed, self.next_index = plan, seed, 0
        self.image_tokenizer, self.vocabulary = image_tokenizer, vocabulary
        self.timesteps = image_tokenizer.num_timesteps
        if plan.steps_per_image > self.timesteps:
            raise DataError(
                f"data.steps_per_image is {plan.steps_per_image}, the image tokeniser has only"
                f" {self.timesteps} timesteps: lower it"
            )
        data = load_emoji(image_tokenizer.image_size)
        self.concepts = _variants(data)
        self.captions = [tuple(text_tokenizer.encode(name)) for name in data.names]
        glosses = load_glosses()
        capitalised = [text[:1].upper() + text[1:] for text in glosses]
        self.texts = [tuple(text_tokenizer.encode(text)) for text in glosses + capitalised]
        self.latents = latents_of(image_tokenizer, data)

    @torch.no_grad()
    def batch(self) -> Packed:
        """The next rows.

        Raises:
            DataError: a document is longer than a row.
        """
        plan, block = self.plan, int(np.prod(self.image_tokenizer.grid))
        rows: list[list[_Draft]] = [[] for _ in range(plan.rows)]
        room = [plan.seq_len] * plan.rows
        while True:
            draft = self._draft(self.next_index)
            size = draft.length(block)
            if size > plan.seq_len:
                raise DataError(
                    f"document {self.next_index} takes {size} tokens, more than data.seq_len"
                    f" {plan.seq_len}: raise it, or lower data.steps_per_image"
                )
            row = next((r for r in range(plan.rows) if room[r] >= size), None)
            if row is None:
                break
            rows[row].append(draft)
            room[row] -= size
            self.next_index += 1
        channels = self.image_tokenizer.latent_channels
        rank = len(self.image_tokenizer.grid)
        return pack(self._tokenise(rows), plan.seq_len, self.vocabulary, channels, rank)

    def _draft(self, index: int) -> _Draft:
        """Document `index` of the stream."""
        random = np.random.default_rng((self.seed, index))
        vocabulary, task = self.vocabulary, random.random()
        if task >= self.plan.image_share + self.plan.caption_share:
            text = self.texts[random.integers(len(self.texts))]
            return _Draft((vocabulary.bos, *text, vocabulary.eos))
        concept = self.concepts[random.integers(len(self.concepts))]
        image = concept[0] if random.random() < 0.5 else concept[random.integers(len(concept))]
        caption, noise_seed = self.captions[image], int(random.integers(2**62))
        if task >= self.plan.image_share:
            after = (vocabulary.image_end, *caption, vocabulary.eos)
            return _Draft((vocabulary.bos, vocabulary.image_start), after, image, noise_seed)
        if random.random() < self.plan.caption_dropout:
            caption = ()
        prompt = (vocabulary.bos, *caption, vocabulary.image_start)
        drawn = random.choice(self.timesteps, self.plan.steps_per_image, replace=False)
        timesteps = tuple(sorted((int(t) + 1 for t in drawn), reverse=True))
        return _Draft(prompt, (), image, noise_seed, timesteps)

    def _tokenise(self, rows: list[list[_Draft]]) -> list[list[Document]]:
        """Fresh codes for all images of a batch at once."""
        drafts = [draft for row in rows for draft in row if draft.image is not None]
        if not drafts:
            return [[draft.document(iter(())) for draft in row] for row in rows]
        latents = self.latents[[draft.image for draft in drafts]]
        code_indices, states = self.image_tokenizer.encode_latents(
            latents, [draft.noise_seed for draft in drafts]
        )
        images = zip(code_indices.unbind(1), states.unbind(1), strict=True)
        return [[draft.document(images) for draft in row] for row in rows]


@torch.no_grad()
def latents_of(tokenizer: ImageTokenizer, data: EmojiData) -> Tensor:
    """The latents of all pictures, float32 `[n, *grid, C]`."""
    chunks = to_tensor(data.images).split(256)
    return torch.cat([tokenizer.autoencoder.encode(chunk) for chunk in chunks])


def _variants(data: EmojiData) -> list[list[int]]:
    """The training pictures of each concept, the one without a skin tone first.

    Drawing a concept first, then a variant, keeps the many toned people from crowding out the
    rest; the variant without a tone is drawn half of the time.
    """
    concepts: dict[str, list[int]] = {}
    for index in sorted(data.indices("train"), key=lambda i: bool(data.tones[i])):
        concepts.setdefault(data.concepts[index], []).append(index)
    return list(concepts.values())
