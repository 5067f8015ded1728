"""The suite `emoji`: drawing, captioning, text and likelihood on the embedded data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mmrdpm.api import Model
from mmrdpm.data.emoji import EmojiData, Split, concept_of, load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.pictures import contact_sheet
from mmrdpm.errors import DataError
from mmrdpm.evaluation import captioned, drawn, likelihood, tokenizer
from mmrdpm.evaluation.figure import Figure, Protocol, digest, digest_of_pictures
from mmrdpm.evaluation.part import Part, Shown, strips
from mmrdpm.evaluation.store import OWN_NOISE, Store, picture_seeds, read_lines
from mmrdpm.evaluation.suite import GROUPS, EmojiSuite
from mmrdpm.metrics.distance import LEAST_OF_KERNEL
from mmrdpm.metrics.features import EfficientNetLite0, ranks

TRAINING, _TONES = "training concepts", "held-out skin tones"
_FULL_SIZE = 72  # pixels of the emoji as they come
_LEAST = {  # pictures that a metric needs, where it is not two
    **dict.fromkeys(("named", "tone", "caption_exact", "guidance", "bits_per_byte"), 1),
    "kernel_distance": LEAST_OF_KERNEL,
}
_DRAWN = {"named", "tone", "kernel_distance", "frechet_distance", "diversity"}
_CAPTIONED = {"caption_exact", "cider", "bleu", "sentence_similarity"}
_SHOWN, _COLUMNS, _STRIPS = 24, 8, 3  # pictures in the report
_SAID = 10  # captions of a group


@dataclass(frozen=True)
class Group:
    """The chosen emoji of one split, their pictures at the model's size."""

    name: str
    indices: list[int]
    names: list[str]
    concepts: list[str]
    pictures: list[Image.Image]

    def some(self, count: int) -> Group:
        """The same with at most `count` emoji, evenly over all: their order is that of kinds."""
        size = len(self.names)
        places = [i * size // count for i in range(count)] if count < size else range(size)
        return Group(
            self.name,
            [self.indices[i] for i in places],
            [self.names[i] for i in places],
            [self.concepts[i] for i in places],
            [self.pictures[i] for i in places],
        )

    @property
    def protocol(self) -> Protocol:
        return {
            "data": f"Twemoji, {self.name}",
            "data_sha256": digest_of_pictures(self.pictures, self.names),
        }


def choose(data: EmojiData, split: Split, count: int, seed: int) -> list[int]:
    """Emoji of a split, at random; without skin tones, unless the split is about them."""
    with_picture = {data.concepts[i] for i in data.untoned()}
    wanted = [
        i
        for i in data.indices(split)
        if bool(data.tones[i]) == (split == "held_out_tone") and data.concepts[i] in with_picture
    ]
    random = np.random.default_rng(seed)
    return sorted(random.choice(wanted, min(count, len(wanted)), replace=False).tolist())


def choose_group(data: EmojiData, name: str, count: int, seed: int) -> Group:
    """What `choose` takes of the split of a group.

    Raises:
        DataError: that is nothing.
    """
    chosen = choose(data, GROUPS[name], count, seed)
    if not chosen:
        raise DataError(f"the group {name!r} of the embedded data is empty: name another")
    return Group(
        name,
        chosen,
        [data.names[i] for i in chosen],
        [data.concepts[i] for i in chosen],
        [Image.fromarray(data.images[i]) for i in chosen],
    )


class EmojiEvaluation:
    """One suite over one model.

    Raises:
        DataError: a group is empty, or it or the texts are fewer than a metric needs, or a text is
            longer than the model's context; before anything is drawn.
    """

    def __init__(self, model: Model, suite: EmojiSuite, store: Store) -> None:
        self.model, self.suite, self.store = model, suite, store
        data = load_emoji(model.images.image_size)
        self.groups = [choose_group(data, n, suite.names, suite.seed) for n in suite.groups]
        for group in self.groups:
            _check_counts(suite, group)
        if "bits_per_byte" in suite.metrics:
            if len(self._texts) < 2:
                raise DataError(
                    "bits_per_byte needs at least 2 texts, not 1: raise texts_count, or give more"
                    " in texts"
                )
            likelihood.text_documents(model, self._texts)  # refuses what is too long

    def parts(self) -> Iterator[Part]:
        """Everything to compute, in order."""
        once: dict[str, tuple[str, Callable[[Group], Sequence[Figure]]]] = {
            "tone": (_TONES, self.tone),
            "guidance": (TRAINING, self.guidance),
        }
        for metric in self.suite.metrics:
            if metric == "bits_per_byte":
                yield Part(metric, [self._of(), digest(self._texts)], self.bits_per_byte)
            elif metric in once:
                name, make = once[metric]
                found = [group for group in self.groups if group.name == name]
                why = f"it is about the group {name!r}: add it to groups"
                yield self._part(metric, found[0], make) if found else Part.left_out(metric, why)
            else:
                make = getattr(self, metric)
                yield from (self._part(metric, group, make) for group in self.groups)

    def named(self, group: Group) -> list[Figure]:
        """Retrieval of drawn pictures, of the real ones at this size, and through the codes."""
        seeds = picture_seeds(self.suite.seed, len(group.pictures))
        codes = self.model.reconstruct(group.pictures, seeds)
        pictures = {"drawn": self.draw(group), "real": group.pictures, "through codes": codes}
        return [
            self._figure(what, group, figure)
            for what, shown in pictures.items()
            for figure in drawn.named_in_top(self.judge, shown, group.concepts)
        ]

    def tone(self, group: Group) -> list[Figure]:
        """Is a drawn picture nearest its own variant among all of the concept, tone or none?"""
        data, features = load_emoji(_FULL_SIZE), self.features
        hits = []
        for picture, index in zip(self.draw(group), group.indices, strict=True):
            variants = [i for i, c in enumerate(data.concepts) if c == data.concepts[index]]
            gallery = features([Image.fromarray(data.images[i]) for i in variants])
            hits.append(ranks(features([picture]), gallery, [variants.index(index)]) == [1])
        protocol = {**features.protocol, "count": len(hits)}
        figure = Figure.share("named skin tone is the nearest", hits, protocol)
        return [self._figure("drawn", group, figure)]

    def kernel_distance(self, group: Group) -> list[Figure]:
        """Of drawn pictures from the real ones of the same names."""
        figure = drawn.kid(self.features, self.draw(group), group.pictures, paired=True)
        return [self._figure("drawn", group, figure)]

    def frechet_distance(self, group: Group) -> list[Figure]:
        """Of drawn pictures from the real ones of the same names."""
        figure = drawn.frechet(self.features, self.draw(group), group.pictures)
        return [self._figure("drawn", group, figure)]

    def diversity(self, group: Group) -> list[Figure]:
        """How far apart the pictures of one prompt are."""
        by_seed = [self.draw(group, offset) for offset in range(self.suite.seeds)]
        return [self._figure("drawn", group, drawn.diversity(self.features, by_seed))]

    def caption_exact(self, group: Group) -> list[Figure]:
        """Captions that are the name, and those that are so but for the skin tones."""
        captions = self.captions(group)
        pairs = list(zip(captions, group.names, group.concepts, strict=True))
        references = [[name] for name in group.names]
        hits = {
            "caption is the name": [caption == name for caption, name, _ in pairs],
            "caption names the concept": [concept_of(c) == concept for c, _, concept in pairs],
        }
        figures = [captioned.share(name, hit, references) for name, hit in hits.items()]
        return [self._figure("captioned", group, figure) for figure in figures]

    def cider(self, group: Group) -> list[Figure]:
        figure = captioned.cider(self.captions(group), _references(group), self.suite.words)
        return [self._figure("captioned", group, figure)]

    def bleu(self, group: Group) -> list[Figure]:
        figure = captioned.bleu(self.captions(group), _references(group), self.suite.words)
        return [self._figure("captioned", group, figure)]

    def sentence_similarity(self, group: Group) -> list[Figure]:
        figure = captioned.sentence_similarity(self.captions(group), _references(group))
        return [self._figure("captioned", group, figure)]

    def retrieval(self, group: Group) -> list[Figure]:
        """Which caption belongs to which picture, by likelihood."""
        few = group.some(self.suite.retrieval)
        figures = likelihood.retrieval(self.model, few.pictures, few.names)
        return [self._figure("likelihood", few, figure) for figure in figures]

    def loss_per_timestep(self, group: Group) -> list[Figure]:
        """What each step of the recurrence costs."""
        figures = likelihood.loss_per_timestep(
            self.model, group.pictures, group.names, self.suite.seed
        )
        return [self._figure("likelihood", group, figure) for figure in figures]

    def codebook_use(self, group: Group) -> list[Figure]:
        """How evenly the real pictures use the codes of each step."""
        squares = np.stack([np.asarray(picture) for picture in group.pictures])
        images = copy.deepcopy(self.model.images).cpu()  # where it is measured
        found = tokenizer.measure_images(images, squares, self.suite.seed)
        return [self._figure("codes", group, figure) for figure in tokenizer.codebook_use(found)]

    def guidance(self, group: Group) -> list[Figure]:
        """Named in the top 10 against the guidance scale."""
        few = group.some(self.suite.guidance_names)
        figures = []
        for scale in self.suite.guidance_scales:
            pictures = self.draw(few, scale=scale)
            (figure,) = drawn.named_in_top(self.judge, pictures, few.concepts, [10])
            named = replace(figure, name=f"{figure.name} at guidance {scale:g}")
            figures.append(self._figure("guidance", few, named, scale=scale))
        return figures

    def bits_per_byte(self) -> list[Figure]:
        """Of texts from a file, or of the embedded definitions."""
        path = self.suite.texts
        data = Path(path).name if path else "embedded WordNet definitions, which training shows"
        figure = likelihood.bits_per_byte(self.model, self._texts, data)
        kind = Path(path).stem if path else "definitions"
        return [replace(figure, name=f"text/{kind}/{figure.name}")]

    def draw(self, group: Group, offset: int = 0, scale: float | None = None) -> list[Image.Image]:
        """A picture of each name, from the seeds that follow from `suite.seed + offset`."""
        how = self.model.sampling.at(scale)

        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
            return self.model.generate(prompts, seeds, guidance_scale=how.guidance_scale)

        title = f"drawing {len(group.names)} {group.name}, guidance {how.guidance_scale:g}"
        seed = self.suite.seed + offset
        return self.store.pictures(title, group.names, seed, asdict(how), generate)

    def captions(self, group: Group) -> list[str]:
        """The captions of the real pictures."""
        pictures = self.store.progress(f"captioning {group.name}", group.pictures)
        return self.store.texts(
            "captions",
            group.protocol,
            len(group.pictures),
            lambda: [caption for picture in pictures for caption in self.model.caption([picture])],
        )

    def shown(self) -> Iterator[Shown]:
        """Drawn above real, the states on the way, and some captions."""
        if self._draws:
            yield from self._shown_drawn()
        if _CAPTIONED & set(self.suite.metrics):
            for group in self.groups:
                few = group.some(_SAID)
                found = dict(zip(group.names, self.captions(group), strict=True))
                rows = [("name", "caption"), *((name, found[name]) for name in few.names)]
                yield Shown(f"Captioned, {group.name}", None, rows)

    def _shown_drawn(self) -> Iterator[Shown]:
        for group in self.groups:
            made, rows = self.draw(group)[:_SHOWN], []
            for i in range(0, len(made), _COLUMNS):
                rows += [made[i : i + _COLUMNS], group.pictures[:_SHOWN][i : i + _COLUMNS]]
            title = f"Drawn (above) and real (below), {group.name}"
            yield Shown(title, contact_sheet(rows, 2))
        names = self.groups[0].names[:_STRIPS]
        seeds = picture_seeds(self.suite.seed, len(names))
        yield strips(self.model, names, seeds, self.model.sampling.guidance_scale)

    @cached_property
    def features(self) -> EfficientNetLite0:
        return EfficientNetLite0()

    @cached_property
    def judge(self) -> drawn.Judge:
        self.store.say("features of the gallery")
        return drawn.emoji_judge(self.features)

    @cached_property
    def _texts(self) -> list[str]:
        path = self.suite.texts
        texts = read_lines(Path(path)) if path else load_glosses()
        random = np.random.default_rng(self.suite.seed)
        count = min(self.suite.texts_count, len(texts))
        return [texts[i] for i in sorted(random.choice(len(texts), count, replace=False))]

    @property
    def _draws(self) -> bool:
        return bool(_DRAWN & set(self.suite.metrics))

    def _part(self, metric: str, group: Group, make: Callable[[Group], Sequence[Figure]]) -> Part:
        return Part(f"{metric}, {group.name}", [self._of(), group.protocol], lambda: make(group))

    def _of(self) -> dict:
        """All settings that figures follow from; which others are computed makes no difference."""
        suite = asdict(self.suite)
        for key in ("metrics", "groups"):
            del suite[key]
        return {**suite, "sampling": asdict(self.model.sampling)}

    def _figure(
        self, what: str, group: Group, figure: Figure, scale: float | None = None
    ) -> Figure:
        """The figure with its full name, and with the data and the sampling in its protocol."""
        sampling = asdict(self.model.sampling.at(scale))
        noise = {"seed": self.suite.seed, "noise": OWN_NOISE}
        added = {
            "drawn": {**sampling, **noise},
            "guidance": {**sampling, **noise},
            "through codes": noise,
            "codes": noise,
            "captioned": {"codes_seed": 0},  # that of `Model.caption`
        }.get(what, {})
        protocol = {**group.protocol, **added, **figure.protocol}
        return replace(figure, name=f"{what}/{group.name}/{figure.name}", protocol=protocol)


def _check_counts(suite: EmojiSuite, group: Group) -> None:
    """Refuses before anything is drawn."""
    for metric in suite.metrics:
        least = _LEAST.get(metric, 2)
        if len(group.names) < least:
            raise DataError(
                f"{metric} needs at least {least} pictures, but {group.name!r} has"
                f" {len(group.names)}: raise names, or take {metric} out of metrics"
            )


def _references(group: Group) -> list[list[str]]:
    return [[name] for name in group.names]
