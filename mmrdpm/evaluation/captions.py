"""The suite `captions`: pictures with COCO-style annotations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from mmrdpm.api import Model
from mmrdpm.data.pictures import contact_sheet, open_picture, to_square
from mmrdpm.errors import DataError
from mmrdpm.evaluation import captioned
from mmrdpm.evaluation.figure import Figure, digest
from mmrdpm.evaluation.part import Part, Shown
from mmrdpm.evaluation.store import Store, read_json
from mmrdpm.evaluation.suite import CaptionsSuite
from mmrdpm.metrics.features import MissingEvaluator, sha256_of

_CHUNK = 32  # pictures captioned between two writes
_SHOWN, _COLUMNS, _SCALE = 16, 8, 2


class CaptionsEvaluation:
    """One suite over one model.

    Raises:
        DataError: annotations or pictures are missing or damaged, or too few for a metric.
    """

    def __init__(self, model: Model, suite: CaptionsSuite, store: Store) -> None:
        self.model, self.suite, self.store = model, suite, store
        found = read_annotations(Path(suite.annotations), Path(suite.images), suite.count)
        self.files = [path for path, _ in found]
        self.references = [texts for _, texts in found]
        for metric in suite.metrics:
            captioned.check_count(len(found), metric)
        self.of = [digest(self.references), digest([sha256_of(path) for path in self.files])]

    def parts(self) -> Iterator[Part]:
        """Everything to compute, in order."""
        makes = {
            "cider": lambda: captioned.cider(self._captions, self.references, self.suite.words),
            "bleu": lambda: captioned.bleu(self._captions, self.references, self.suite.words),
            "sentence_similarity": lambda: captioned.sentence_similarity(
                self._captions, self.references
            ),
        }
        for metric in self.suite.metrics:

            def make(metric: str = metric) -> Sequence[Figure]:
                figure = makes[metric]()
                added = {
                    "pictures_sha256": self.of[1],
                    "resolution": self.model.images.image_size,
                    "preprocessing": "the whole picture on a white square, Lanczos",
                    "codes_seed": 0,  # that of `Model.caption`
                }
                name = f"captioned/{Path(self.suite.annotations).stem}/{figure.name}"
                return [replace(figure, name=name, protocol={**figure.protocol, **added})]

            yield Part(metric, [*self.of, self.suite.words], make)

    def shown(self) -> Iterator[Shown]:
        """Pictures as the model sees them, row by row, and what it and people say of them."""
        size, files = self.model.images.image_size, self.files[:_SHOWN]
        seen = [Image.fromarray(to_square(open_picture(path), size)) for path in files]
        rows = [seen[i : i + _COLUMNS] for i in range(0, len(seen), _COLUMNS)]
        texts = zip(files, self._captions, self.references, strict=False)
        said = [(path.name, caption, " / ".join(truths)) for path, caption, truths in texts]
        head = ("picture", "caption", "references")
        yield Shown("Captioned", contact_sheet(rows, _SCALE if size < 128 else 1), [head, *said])

    @cached_property
    def _captions(self) -> list[str]:
        """Kept chunk by chunk."""
        captions: list[str] = []
        starts = range(0, len(self.files), _CHUNK)
        for start in self.store.progress(f"captioning {len(self.files)}", list(starts)):
            files = self.files[start : start + _CHUNK]

            def make(files: Sequence[Path] = files) -> list[str]:
                return self.model.caption([open_picture(path) for path in files])

            captions += self.store.texts("captions", [*self.of, start], len(files), make)
        return captions


def read_annotations(path: Path, folder: Path, count: int) -> list[tuple[Path, list[str]]]:
    """The first `count` pictures and their captions, in the order of the file's `images`.

    The folder need not hold those after them.

    Raises:
        MissingEvaluator: there is no such file.
        DataError: it is no COCO captions file, a picture has no caption or is not in the folder.
    """
    if not path.is_file():
        raise MissingEvaluator(
            f"{path}: no annotations: put a COCO captions file there, e.g. captions_val2017.json,"
            " or give its place as annotations=FILE, and that of the pictures as images=DIR"
        )
    mapping = read_json(path)
    try:
        texts: dict[Any, list[str]] = {image["id"]: [] for image in mapping["images"]}
        for number, annotation in enumerate(mapping["annotations"]):
            if annotation["image_id"] not in texts:
                raise DataError(f"{path}: annotation {number} is of an image that is not listed")
            texts[annotation["image_id"]].append(str(annotation["caption"]))
        pairs = [(str(image["file_name"]), texts[image["id"]]) for image in mapping["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a COCO captions file: {error}: it needs images (id, file_name) and"
            " annotations (image_id, caption)"
        ) from None
    if not pairs:
        raise DataError(f"{path}: the data set is empty: it lists no images")
    return [
        (_inside(folder, name, path), _some(found, name, path)) for name, found in pairs[:count]
    ]


def _inside(folder: Path, name: str, where: Path) -> Path:
    picture = folder / name
    if not picture.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: the file name {name!r} leads out of {folder}: mend the file")
    if not picture.is_file():
        raise DataError(f"{picture}: no such picture, but {where} lists it: give images=DIR")
    return picture


def _some(texts: list[str], name: str, where: Path) -> list[str]:
    if not texts:
        raise DataError(f"{where}: the image {name!r} has no caption: add one or take it out")
    return texts
