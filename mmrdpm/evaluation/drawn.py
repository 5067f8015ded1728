"""Judges drawn pictures: plain pictures and names in, figures out, whatever drew them.

    judge = Judge(features, gallery_names, gallery_pictures)
    top_1, top_10 = named_in_top(judge, pictures, names)
    distance = kid(features, pictures, reference)

Each figure carries its interval and its protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mmrdpm.data.emoji import load_emoji
from mmrdpm.errors import DataError
from mmrdpm.evaluation.figure import Figure, Protocol, digest_of_pictures
from mmrdpm.metrics.distance import (
    frechet_distance,
    frechet_interval,
    kernel_distance,
    kernel_interval,
    lowered_by_pairs,
)
from mmrdpm.metrics.features import EfficientNetLite0, kept, ranks
from mmrdpm.metrics.interval import AT_LEAST_0

_FULL_SIZE = 72  # pixels of the emoji as they come

Pictures = Sequence[Image.Image]


class Judge:
    """A gallery of named pictures, among which a drawn one has to be nearest its own.

    Raises:
        DataError: the gallery is empty, or a name is there twice.
    """

    def __init__(
        self, features: EfficientNetLite0, names: Sequence[str], pictures: Pictures
    ) -> None:
        if not names or len(set(names)) != len(names):
            raise DataError("a gallery needs at least one picture, and every name once")
        self.features = features
        self.place = {name: place for place, name in enumerate(names)}
        key = digest_of_pictures(pictures, names)
        self.gallery = kept(features, pictures, key)
        self.protocol: Protocol = {
            **features.protocol,
            "nearness": "cosine after subtracting the gallery's mean",
            "gallery": len(names),
            "gallery_sha256": key,
        }

    def ranks(self, pictures: Pictures, names: Sequence[str]) -> list[int]:
        """The place of each picture's own name among all of the gallery, 1 is the nearest.

        Raises:
            DataError: there are no pictures, or a name is not in the gallery.
        """
        check(pictures, names)
        missing = [name for name in names if name not in self.place]
        if missing:
            raise DataError(f"{missing[0]!r}: no such name in the gallery: draw what it holds")
        return ranks(self.features(pictures), self.gallery, [self.place[n] for n in names])


def emoji_judge(features: EfficientNetLite0 | None = None) -> Judge:
    """The gallery of all emoji without a skin tone, at full size, by concept."""
    data = load_emoji(_FULL_SIZE)
    chosen = data.untoned()
    pictures = [Image.fromarray(data.images[i]) for i in chosen]
    return Judge(features or EfficientNetLite0(), [data.concepts[i] for i in chosen], pictures)


def named_in_top(
    judge: Judge, pictures: Pictures, names: Sequence[str], tops: Sequence[int] = (1, 10)
) -> list[Figure]:
    """The share of pictures that have their own name among the nearest of the gallery.

    Args:
        tops: how many count as the nearest; a figure each.
    """
    places = judge.ranks(pictures, names)
    protocol = {**judge.protocol, **_resolution(pictures), "count": len(places)}
    return [
        Figure.share(
            f"named in top {top}", [place <= top for place in places], {**protocol, "top": top}
        )
        for top in tops
    ]


def kid(
    features: EfficientNetLite0, pictures: Pictures, reference: Pictures, paired: bool = False
) -> Figure:
    """Kernel distance, see `metrics.distance.kernel_distance`.

    Args:
        paired: picture i is meant to show what reference i shows, which lowers the distance; a
            note says by how much.

    Raises:
        DataError: fewer than two pictures, pictures of different resolutions, or `paired` and not
            a reference for each picture.
    """
    if paired and len(pictures) != len(reference):
        raise DataError(
            f"{len(pictures)} pictures and {len(reference)} references are not pairs: give a"
            " reference for each picture, or leave paired out"
        )
    protocol = kid_protocol(features, pictures, reference, paired)
    x, y = features(pictures), features(reference)
    value = kernel_distance(x, y)
    return Figure(
        "kernel distance (EfficientNet-Lite0)",
        value,
        kernel_interval(x, y, value),
        "",
        len(x),
        protocol,
        f"lowered by {lowered_by_pairs(x, y):.4f} by the pairs of one name" if paired else "",
    )


def kid_protocol(
    features: EfficientNetLite0, pictures: Pictures, reference: Pictures, paired: bool
) -> dict:
    """How `kid` judges; nothing of it is about what the pictures show."""
    return {**_protocol(features, pictures, reference), "kernel": kernel(paired)}


def kernel(paired: bool) -> str:
    """What protocols say of the kernel distance's estimator."""
    return "(x.y/F + 1)^3, unbiased" + (" but for the pairs of one name" if paired else "")


def frechet(features: EfficientNetLite0, pictures: Pictures, reference: Pictures) -> Figure:
    """Fréchet distance, see `metrics.distance.frechet_distance`; not FID, which has another
    backbone.

    Raises:
        DataError: fewer than two pictures, or pictures of different resolutions.
    """
    protocol = _protocol(features, pictures, reference)
    x, y = features(pictures), features(reference)
    value = frechet_distance(x, y)
    few = min(len(x), len(y)) <= features.width
    note = f"biased upwards: fewer samples than the {features.width} features" if few else ""
    return Figure(
        "Fréchet distance (EfficientNet-Lite0)",
        value,
        frechet_interval(x, y, value),
        "",
        len(x),
        protocol,
        note,
    )


def diversity(features: EfficientNetLite0, by_seed: Sequence[Pictures]) -> Figure:
    """Mean Euclidean distance of the features of two seeds' pictures of one prompt.

    Args:
        by_seed: for each seed the pictures of all prompts, in one order.

    Raises:
        DataError: fewer than two seeds.
    """
    if len(by_seed) < 2:
        raise DataError(f"diversity needs at least 2 seeds, not {len(by_seed)}: raise seeds")
    extracted = [features(pictures) for pictures in by_seed]
    pairs = [
        (extracted[i] - extracted[j]).norm(dim=1)
        for i in range(len(extracted))
        for j in range(i + 1, len(extracted))
    ]
    apart = sum(pairs[1:], pairs[0]) / len(pairs)
    protocol = {**features.protocol, **_resolution(by_seed[0]), "count": len(apart)}
    protocol["seeds"] = len(by_seed)
    name = "diversity (EfficientNet-Lite0)"
    return Figure.mean(name, apart.tolist(), "", protocol, AT_LEAST_0)


def check(pictures: Pictures, names: Sequence[str]) -> None:
    """Raises DataError unless there is a picture, and a name for each."""
    if not pictures or len(pictures) != len(names):
        raise DataError(
            f"{len(pictures)} pictures for {len(names)} names: give one each, and at least one"
        )


def _protocol(features: EfficientNetLite0, pictures: Pictures, reference: Pictures) -> dict:
    sizes = {picture.size for picture in [*pictures, *reference]}
    if len(sizes) > 1:
        (a, b), (c, d) = sorted(sizes)[:2]
        raise DataError(
            f"mismatched resolutions: pictures of {a}x{b} and of {c}x{d} in one distance: resize"
            " the reference to what is drawn"
        )
    return {
        **features.protocol,
        **_resolution(pictures),
        "count": len(pictures),
        "reference": len(reference),
        "reference_sha256": digest_of_pictures(reference, ()),
    }


def _resolution(pictures: Pictures) -> dict[str, str]:
    return {"resolution": " ".join(sorted({f"{p.width}x{p.height}" for p in pictures}))}
