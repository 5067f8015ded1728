"""What a suite's YAML holds: a strict dataclass per kind."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from mmrdpm import recipe, shipped
from mmrdpm.data.emoji import Split
from mmrdpm.errors import RecipeError
from mmrdpm.evaluation.captioned import Words
from mmrdpm.sampling.image import MOST_GUIDANCE

GROUPS: dict[str, Split] = {
    "training concepts": "train",
    "held-out concepts": "held_out_concept",
    "held-out skin tones": "held_out_tone",
}


@dataclass(frozen=True)
class EmojiSuite:
    """Does a model draw what was named, and name what it sees, on the embedded emoji?

    Attributes:
        metrics: any of `KNOWN`, each over every group where that makes sense.
        groups: keys of `GROUPS`.
        names: at most this many emoji of each group.
        seed: chooses them, and the noise of each picture follows from it.
        seeds: pictures per prompt that `diversity` compares.
        guidance_scales, guidance_names: of `guidance`, named in the top 10 against the scale, on
            training concepts.
        retrieval: at most this many emoji of each group are told apart by score.
        texts: a text file, a text a line; else the embedded definitions, which training shows.
        texts_count: at most this many texts are scored.
        words: how captions become words for CIDEr and BLEU.
    """

    KNOWN: ClassVar[tuple[str, ...]] = (
        "named",
        "tone",
        "kernel_distance",
        "frechet_distance",
        "diversity",
        "caption_exact",
        "cider",
        "bleu",
        "sentence_similarity",
        "bits_per_byte",
        "retrieval",
        "guidance",
        "loss_per_timestep",
        "codebook_use",
    )

    metrics: tuple[str, ...] = KNOWN
    groups: tuple[str, ...] = tuple(GROUPS)
    names: int = field(default=200, metadata={"min": 1})
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    seeds: int = field(default=2, metadata={"min": 2})
    guidance_scales: tuple[float, ...] = field(
        default=(1.0, 2.0, 3.0, 5.0), metadata={"min": 0.0, "max": MOST_GUIDANCE}
    )
    guidance_names: int = field(default=50, metadata={"min": 1})
    retrieval: int = field(default=50, metadata={"min": 2})
    texts: str | None = None
    texts_count: int = field(default=500, metadata={"min": 1})
    words: Words = "plain"
    kind: Literal["emoji"] = "emoji"


@dataclass(frozen=True)
class TokenizerSuite:
    """What an image tokeniser loses, and how it uses its codes, on the embedded emoji.

    Attributes:
        names: at most this many emoji of each group; picture i takes its noise from `seed + i`.
        images: a folder of pictures in place of the emoji and their groups; at most `names` of it.
    """

    KNOWN: ClassVar[tuple[str, ...]] = (
        "psnr",
        "ssim",
        "kernel_distance",
        "frechet_distance",
        "codebook_use",
        "latent_error",
    )

    metrics: tuple[str, ...] = KNOWN
    groups: tuple[str, ...] = tuple(GROUPS)
    names: int = field(default=1000, metadata={"min": 1})
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    images: str = ""
    kind: Literal["tokenizer"] = "tokenizer"


@dataclass(frozen=True)
class ImagenetSuite:
    """The published scores of class-conditional drawing, by `torch-fidelity`.

    Attributes:
        prompts: a text file, one class's prompt a line; sample i draws line `i mod lines`.
        reference: a folder of real pictures, PNG or JPEG, of `resolution` pixels a side.
        inception: weights that torch-fidelity publishes (`weights-inception-2015-12-05...pth`): the
            file, or the hub id of a repository that holds one of that name.
        samples: pictures to draw; the papers draw 50,000.
        guidance_scale: of all drawing but `guidance`'s; null is the model's own.
        guidance_scales, guidance_samples: of `guidance`, precision and recall against the scale,
            on so many pictures each.
    """

    KNOWN: ClassVar[tuple[str, ...]] = ("fid", "inception_score", "precision_recall", "guidance")

    prompts: str
    reference: str
    inception: str
    metrics: tuple[str, ...] = KNOWN
    resolution: int = field(default=256, metadata={"min": 8})
    samples: int = field(default=50_000, metadata={"min": 2})
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    guidance_scale: float | None = field(default=None, metadata={"min": 0.0, "max": MOST_GUIDANCE})
    guidance_scales: tuple[float, ...] = field(
        default=(1.0, 1.5, 2.0, 4.0), metadata={"min": 0.0, "max": MOST_GUIDANCE}
    )
    guidance_samples: int = field(default=5000, metadata={"min": 2})
    kind: Literal["imagenet"] = "imagenet"


@dataclass(frozen=True)
class PromptsSuite:
    """Does a model draw what free prompts say? CLIPScore over a list of prompts.

    Attributes:
        prompts: a text file, a prompt a line; or a folder of such lists, `NAME.txt`, which get a
            figure each.
        clip: a folder or hub id of a CLIP model in the format of `transformers`.
        seeds: pictures per prompt, from `seed` on.
        guidance_scale: of all drawing; null is the model's own.
    """

    KNOWN: ClassVar[tuple[str, ...]] = ("clip_score",)

    prompts: str
    clip: str = "openai/clip-vit-large-patch14"
    metrics: tuple[str, ...] = KNOWN
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    seeds: int = field(default=1, metadata={"min": 1})
    guidance_scale: float | None = field(default=None, metadata={"min": 0.0, "max": MOST_GUIDANCE})
    kind: Literal["prompts"] = "prompts"


@dataclass(frozen=True)
class CaptionsSuite:
    """Captions of pictures with COCO-style annotations.

    Attributes:
        annotations: a JSON file with `images` (id, file_name) and `annotations` (image_id,
            caption).
        images: the folder of the pictures.
        count: at most this many pictures, in the file's order.
        words: `ptb` is the COCO server's and needs Java.
    """

    KNOWN: ClassVar[tuple[str, ...]] = ("cider", "bleu", "sentence_similarity")

    annotations: str
    images: str
    metrics: tuple[str, ...] = KNOWN
    count: int = field(default=5000, metadata={"min": 1})
    words: Words = "ptb"
    kind: Literal["captions"] = "captions"


Suite = EmojiSuite | TokenizerSuite | ImagenetSuite | PromptsSuite | CaptionsSuite

SCHEMAS: dict[str, type[Suite]] = {
    "emoji": EmojiSuite,
    "tokenizer": TokenizerSuite,
    "imagenet": ImagenetSuite,
    "prompts": PromptsSuite,
    "captions": CaptionsSuite,
}


def load(name: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """A suite by the name of a shipped one, or by its file, overrides applied.

    Raises:
        MmrdpmError: there is no such suite.
        RecipeError: a key, a kind, a metric or a group is unknown, or one is named twice.
    """
    path = shipped.resolve("eval", name)
    mapping = recipe.read(path, overrides)
    kind = mapping.get("kind")
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise RecipeError(f"{path}: kind is {kind!r}: choose one of {', '.join(SCHEMAS)}")
    suite = recipe.from_dict(SCHEMAS[kind], mapping, str(path))
    _known(suite.metrics, suite.KNOWN, f"{path}: metrics")
    if isinstance(suite, TokenizerSuite) and suite.images and suite.groups != tuple(GROUPS):
        raise RecipeError(
            f"{path}: groups are those of the emoji, which images={suite.images} takes the place"
            " of: leave one of them out"
        )
    if isinstance(suite, EmojiSuite | TokenizerSuite):
        _known(suite.groups, tuple(GROUPS), f"{path}: groups")
    scales = getattr(suite, "guidance_scales", ())
    if "guidance" in suite.metrics and not scales:
        raise RecipeError(f"{path}: guidance_scales is empty: name at least one")
    return suite


def _known(names: Sequence[str], known: Sequence[str], where: str) -> None:
    if not names:
        raise RecipeError(f"{where} is empty: name some of {', '.join(known)}")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise RecipeError(f"{where}: {name!r} comes twice: name it once")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown {name!r}: {hint}")
