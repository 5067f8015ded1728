"""Records to documents: what the model is to learn from a record, before images are tokenised.

A draft is a document whose images are still pixels or latents; its length in a row is known, so
it can be packed before any image is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from torch import Tensor

from mmrdpm.data.pictures import PictureError, picture_of, to_square
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken, Interleaved, Pair, Picture, Record, Text
from mmrdpm.document import Document, ImageSegment, TextSegment
from mmrdpm.errors import DataError
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.rdpm.schedule import Schedule
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.vocabulary import Vocabulary

_LONGEST_TOKEN = 64  # characters; a caption is cut to this many per token before it is encoded
_AT_ONCE = 2**20  # characters of a text; their encoding takes a hundred times their memory
# of the draws by the path's way: its last steps, though short, need learning too
_ALIKE = 0.25


@dataclass(frozen=True)
class ImageDraft:
    """An image of a draft.

    Attributes:
        image: uint8 `[size, size, 3]`, or latents, float `[*grid, C]`.
        timesteps: those that are learned, each 1..T, falling.
        clean: whether something later in the document sees the image.
    """

    image: np.ndarray
    noise_seed: int
    timesteps: tuple[int, ...] = ()
    clean: bool = False

    def length(self, grid: tuple[int, ...]) -> int:
        """Tokens in a row; `grid` is that of an image still in pixels."""
        cells = grid if self.image.dtype == np.uint8 else self.image.shape[:-1]
        return (len(self.timesteps) + self.clean) * int(np.prod(cells))

    def segment(self, code_indices: Tensor, states: Tensor, residuals: Tensor) -> ImageSegment:
        """The image, tokenised."""
        return ImageSegment(code_indices, states, self.timesteps, self.clean, residuals)


@dataclass(frozen=True)
class Draft:
    """A document as runs of token ids and images."""

    parts: tuple[tuple[int, ...] | ImageDraft, ...]

    @property
    def images(self) -> list[ImageDraft]:
        return [part for part in self.parts if isinstance(part, ImageDraft)]

    def length(self, grid: tuple[int, ...]) -> int:
        """Tokens in a row."""
        return sum(
            part.length(grid) if isinstance(part, ImageDraft) else len(part) for part in self.parts
        )

    def document(self, images: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Document:
        """The document; each image takes the next `(code_indices, states, residuals)`."""
        return [
            part.segment(*next(images)) if isinstance(part, ImageDraft) else TextSegment(part)
            for part in self.parts
        ]


class Drafter:
    """Makes drafts of records: all there is to decide about a document is decided here.

    Raises:
        DataError: the plan asks for more timesteps than the image tokeniser has.
    """

    def __init__(
        self,
        plan: DataPlan,
        texts: TextTokenizer,
        vocabulary: Vocabulary,
        image_tokenizer: ImageTokenizer,
    ) -> None:
        self.plan, self.texts, self.vocabulary = plan, texts, vocabulary
        self.num_timesteps = image_tokenizer.num_timesteps
        self.image_size, self.grid = image_tokenizer.image_size, image_tokenizer.grid
        if plan.steps_per_image > self.num_timesteps:
            raise DataError(
                f"data.steps_per_image is {plan.steps_per_image}, the image tokeniser has only"
                f" {self.num_timesteps} timesteps: lower it"
            )
        schedule = image_tokenizer.trajectory.schedule
        self.shares = by_the_way(schedule) if plan.timesteps == "path" else None

    def check_fits(self) -> None:
        """Checks that a row holds an image, learned and seen, with the longest caption.

        Raises:
            DataError: it does not.
        """
        plan = self.plan
        image = (plan.steps_per_image + 1) * int(np.prod(self.grid))
        needed = image + plan.max_caption_tokens + 3
        if needed > plan.seq_len:
            raise DataError(
                f"data.seq_len is {plan.seq_len}, but an image takes up to {image} tokens and its"
                f" caption {plan.max_caption_tokens} and 3: raise it to {needed}, or lower"
                " data.steps_per_image or data.max_caption_tokens"
            )

    def drafts(self, record: Record, random: np.random.Generator) -> Iterable[Draft] | Broken:
        """The drafts of one record, several where a text or an interleaved one is cut."""
        try:
            match record:
                case Pair():
                    return [self._fitting(self._pair(record, random))]
                case Text():
                    return self._cut(self._text(record.text))
                case Interleaved():
                    if record.is_blank:
                        raise _Unfit("empty text")
                    items = [self._part(part, random) for part in record.parts]
                    for item in items:
                        if isinstance(item, ImageDraft):  # what _cut can't cut
                            self._fitting(Draft(((0, 0, 0), item)))
                    return self._cut(items)
            return record
        except _Unfit as fault:
            return Broken(record.key, fault.cause, str(fault))

    def _pair(self, record: Pair, random: np.random.Generator) -> Draft:
        plan = self.plan
        caption = record.captions[random.integers(len(record.captions))]
        if not caption.strip():
            raise _Unfit("empty caption")
        image, noise_seed = _pixels(record.image, self.image_size), int(random.integers(2**62))
        shares = plan.image_share + plan.caption_share
        if random.random() * shares >= plan.image_share:
            return self.captioning(image, self._caption(caption), noise_seed)
        ids = () if random.random() < plan.caption_dropout else self._caption(caption)[0]
        return self.drawing(image, ids, noise_seed, random)

    def drawing(
        self,
        image: np.ndarray,
        caption: tuple[int, ...],
        noise_seed: int,
        random: np.random.Generator,
    ) -> Draft:
        """Caption -> image."""
        prompt = self.vocabulary.prompt(caption)
        return Draft((prompt, ImageDraft(image, noise_seed, self._timesteps(random))))

    def captioning(
        self, image: np.ndarray, caption: tuple[tuple[int, ...], bool], noise_seed: int
    ) -> Draft:
        """Image -> caption; one that was cut has no end."""
        v, seen = self.vocabulary, ImageDraft(image, noise_seed, clean=True)
        return Draft((v.prompt(), seen, v.caption(*caption)))

    def text(self, ids: tuple[int, ...]) -> Draft:
        """A text as one document."""
        return Draft(((self.vocabulary.bos, *ids, self.vocabulary.eos),))

    def _fitting(self, draft: Draft) -> Draft:
        size = draft.length(self.grid)
        if size > self.plan.seq_len:
            raise _Unfit("longer than a row", f"{size} tokens, data.seq_len {self.plan.seq_len}")
        return draft

    def _timesteps(self, random: np.random.Generator) -> tuple[int, ...]:
        count = self.plan.steps_per_image
        drawn = random.choice(self.num_timesteps, count, replace=False, p=self.shares)
        return tuple(sorted((int(t) + 1 for t in drawn), reverse=True))

    def _caption(self, caption: str) -> tuple[tuple[int, ...], bool]:
        """At most `max_caption_tokens` ids, and whether that is all of it."""
        limit = self.plan.max_caption_tokens
        ids = self._encode(caption[: limit * _LONGEST_TOKEN])
        return ids[:limit], len(ids) <= limit and len(caption) <= limit * _LONGEST_TOKEN

    def _text(self, text: str) -> Iterable[tuple[int, ...]]:
        if not text.strip():
            raise _Unfit("empty text")
        if len(text) <= _AT_ONCE:
            return [self._encode(text)]
        try:
            text.encode()  # now, as its pieces are encoded when they are wanted
        except UnicodeEncodeError as error:
            raise _Unfit("not Unicode text", str(error)) from None
        return (self._encode(piece) for piece in _pieces(text, _AT_ONCE))

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self.texts.encode(text))
        except DataError as error:
            raise _Unfit("not Unicode text", str(error)) from None

    def _part(
        self, part: str | Picture, random: np.random.Generator
    ) -> tuple[int, ...] | ImageDraft:
        if isinstance(part, str):
            return self._encode(part)
        noise_seed = int(random.integers(2**62))
        return ImageDraft(
            _pixels(part, self.image_size), noise_seed, self._timesteps(random), clean=True
        )

    def _cut(self, items: Iterable[tuple[int, ...] | ImageDraft]) -> Iterator[Draft]:
        """Documents of at most one row each, cut between tokens and never inside an image."""
        v, limit = self.vocabulary, self.plan.seq_len
        done: list[tuple[int, ...] | ImageDraft] = []
        run, used = [v.bos], 1
        for item in chain(items, [(v.eos,)]):
            if isinstance(item, ImageDraft):
                size = 2 + item.length(self.grid)
                if used + size > limit:
                    yield _closed(done, run)
                    done, run, used = [], [v.bos], 1
                done += [(*run, v.image_start), item]
                run, used = [v.image_end], used + size
                continue
            begin = 0
            while begin < len(item):
                if used == limit:
                    yield _closed(done, run)
                    done, run, used = [], [v.bos], 1
                taken = item[begin : begin + limit - used]
                run += taken
                begin, used = begin + len(taken), used + len(taken)
        if done or run != [v.bos, v.eos]:  # as where the text has filled its row
            yield _closed(done, run)


def _pieces(text: str, size: int) -> Iterator[str]:
    """A text in pieces of at most `size` characters, at line ends where there are any."""
    begin = 0
    while begin < len(text):
        end = begin + size
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


class _Unfit(Exception):
    """A record that no draft can be made of."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(detail)
        self.cause = cause


def _pixels(picture: Picture, size: int) -> np.ndarray:
    """Any picture as uint8 `[size, size, 3]`; latents stay as they are."""
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        return picture
    try:
        return to_square(picture_of(picture), size)
    except PictureError as error:
        raise _Unfit(error.cause, error.detail) from None


def _closed(done: list[tuple[int, ...] | ImageDraft], run: list[int]) -> Draft:
    """A draft of what was gathered; an image that nothing follows needs no clean block."""
    if done and len(run) == 1:
        *before, image = done
        assert isinstance(image, ImageDraft)
        return Draft((*before, replace(image, clean=False)))
    return Draft((*done, tuple(run)))


def by_the_way(schedule: Schedule) -> np.ndarray:
    """`data.timesteps: path`: how likely each timestep is drawn, t = 1 first."""
    sigmas = [schedule.coefficients(t)[1] for t in range(schedule.num_timesteps + 1)]
    way = np.diff(sigmas)
    return (1 - _ALIKE) * way / way.sum() + _ALIKE / len(way)
