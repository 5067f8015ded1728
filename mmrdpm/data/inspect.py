"""Looks at data sources as training would read them: samples, sizes, captions and problems."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmrdpm.data.pictures import PictureError, contact_sheet, picture_of, to_square
from mmrdpm.data.records import (
    DAMAGED_SHARD,
    Broken,
    Interleaved,
    Pair,
    Picture,
    Record,
    Source,
    Text,
    first_epoch,
)
from mmrdpm.data.sources import SourceConfig, Type
from mmrdpm.data.sources.files import IMAGE_SUFFIXES, at_home
from mmrdpm.errors import DataError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_THUMBNAIL = 96  # pixels
_LABEL, _LINE = 3, 12  # lines under a thumbnail, and pixels of one
_LETTERS = 18  # of a line
_COLUMNS = 8
_SHOWN = 72  # characters of a text


@dataclass
class Findings:
    """What the first samples of a source show.

    Attributes:
        lines: one per record, or problem.
        sizes: width and height of every picture that could be read.
        lengths: characters of every caption and text.
        problems: number of broken records by cause.
        damaged: shards that are, with what is wrong.
        tiles: thumbnails, RGB, with what `lines` says of each under it, and a red one for each
            record that has a problem.
        stopped: what ended the reading early, if anything did.
    """

    lines: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    tiles: list[Image.Image] = field(default_factory=list)
    stopped: DataError | None = None

    def summary(self) -> Iterator[str]:
        """Lines that sum it up."""
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            yield f"pictures: {len(self.sizes)}, width {_range(widths)}, height {_range(heights)}"
        if self.lengths:
            yield f"texts: {len(self.lengths)}, characters {_range(self.lengths)}"
        for cause, count in self.problems.most_common():
            yield f"problem: {count} {cause}"
        for shard in self.damaged:
            yield f"PROBLEM: damaged shard: {shard}"
        if not self.problems and not self.stopped:
            yield "problems: none"

    def sheet(self) -> Image.Image | None:
        """The tiles side by side; None where no picture could be read."""
        rows = [self.tiles[i : i + _COLUMNS] for i in range(0, len(self.tiles), _COLUMNS)]
        return contact_sheet(rows) if self.sizes else None


def inspect(source: Source, count: int, seed: int = 0) -> Findings:
    """Reads the first records that training would see, or those before the source fails."""
    findings = Findings()
    try:
        for _, record in first_epoch(source, str(seed), count):
            _look(record, findings)
    except DataError as error:  # what was read before it is worth a look
        findings.stopped = error
    return findings


def _look(record: Record, findings: Findings) -> None:
    """Adds one record to the findings."""
    first, problems = len(findings.tiles), findings.problems.total()
    _describe(record, findings)
    faulty = findings.problems.total() > problems
    if faulty and len(findings.tiles) == first:
        findings.tiles.append(Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "white"))
    for i, thumbnail in enumerate(findings.tiles[first:], start=first):
        findings.tiles[i] = _labelled(thumbnail, findings.lines[-1], faulty)


def _labelled(thumbnail: Image.Image, text: str, faulty: bool) -> Image.Image:
    """A thumbnail over the beginning of a text, in red where something is wrong."""
    side, color = _THUMBNAIL, "red" if faulty else "black"
    tile = Image.new("RGB", (side, side + _LABEL * _LINE), "white")
    tile.paste(thumbnail, (0, 0))
    draw = ImageDraw.Draw(tile)
    if faulty:
        draw.rectangle((0, 0, side - 1, side - 1), outline="red", width=3)
    plain = text.encode("ascii", "replace").decode()  # the font that Pillow has knows few others
    for i, line in enumerate(textwrap.wrap(plain, _LETTERS)[:_LABEL]):
        draw.text((0, side + i * _LINE), line, color)
    return tile


def _describe(record: Record, findings: Findings) -> None:
    try:
        match record:
            case Pair():
                what = _picture(record.image, findings)
                texts = [_text(caption, "caption", findings) for caption in record.captions]
                findings.lines.append(f"{record.key}  {what}  {' | '.join(texts)}".rstrip())
            case Text():
                findings.lines.append(f"{record.key}  {_text(record.text, 'text', findings)}")
            case Interleaved() if record.is_blank:
                _problem(record.key, "empty text", "", findings)
            case Interleaved():
                parts = [
                    _text(part, "", findings)
                    if isinstance(part, str)
                    else f"[{_picture(part, findings)}]"
                    for part in record.parts
                ]
                findings.lines.append(f"{record.key}  {' '.join(parts)}")
            case Broken():
                _problem(record.key, record.cause, record.detail, findings)
    except PictureError as error:
        _problem(record.key, error.cause, error.detail, findings)


def _picture(picture: Picture, findings: Findings) -> str:
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        return f"latents {'x'.join(map(str, picture.shape))}"
    image = picture_of(picture)
    findings.sizes.append(image.size)
    findings.tiles.append(Image.fromarray(to_square(image, _THUMBNAIL)))
    return f"{image.width}x{image.height}"


def _text(text: str, kind: str, findings: Findings) -> str:
    findings.lengths.append(len(text))
    if kind and not text.strip():
        findings.problems[f"empty {kind}"] += 1
        return f"PROBLEM: empty {kind}"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate
        findings.problems["not Unicode text"] += 1
        return f"PROBLEM: not Unicode text ({error})"
    shown = " ".join(text[: 2 * _SHOWN].split())
    return f"{len(text)} characters: {shown[:_SHOWN]}{'...' if len(shown) > _SHOWN else ''}"


def _problem(key: str, cause: str, detail: str, findings: Findings) -> None:
    findings.problems[cause] += 1
    if cause == DAMAGED_SHARD:
        findings.damaged.append(f"{key} ({detail})")
    findings.lines.append(f"{key}  PROBLEM: {cause}{f' ({detail})' if detail else ''}")


def _range(values: tuple[int, ...] | list[int]) -> str:
    return f"{min(values)} to {max(values)} (median {statistics.median(values):g})"


def guess(path: str) -> SourceConfig:
    """The source that a path, glob, URL or hub id most likely means.

    Raises:
        DataError: nothing can be made of it.
    """
    place = at_home(path)
    if path.startswith("pipe:") or ".tar" in path.lower():
        return SourceConfig("webdataset", path=path)
    if place.is_dir():
        return SourceConfig(_folder_type(place), path=path)
    if place.suffix.lower() == ".jsonl" and place.is_file():
        return SourceConfig("interleaved" if _has_segments(place) else "text", path=path)
    if place.suffix.lower() in (".txt", ".md"):
        return SourceConfig("text", path=path)
    if place.suffix.lower() in IMAGE_SUFFIXES and place.is_file():
        raise DataError(f"{path}: is one picture: give the folder that it lies in")
    if place.exists() or "*" in path:
        return SourceConfig("huggingface", path=path)
    if _HUB_ID.fullmatch(path):  # a look needs a few records: else all are fetched first
        return SourceConfig("huggingface", path=path, streaming=True)
    raise DataError(
        f"{path}: no such file or folder, and no hub id (OWNER/NAME), URL of .tar shards or"
        " recipe: correct it"
    )


def _folder_type(folder: Path) -> Type:
    if (folder / "manifest.json").is_file():
        return "cache"
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "huggingface"
    paths = list(islice(folder.rglob("*"), 10_000))
    if not paths:
        raise DataError(f"{folder}: the folder is empty: correct the path")
    found = {path.suffix.lower() for path in paths}
    if ".tar" in found:
        return "webdataset"
    if ".parquet" in found or ".arrow" in found:
        return "huggingface"
    if any(_has_segments(p) for p in paths if p.suffix.lower() == ".jsonl" and p.is_file()):
        return "interleaved"  # its pictures may lie beside it
    return "folder" if found & IMAGE_SUFFIXES else "text"


def _has_segments(lines: Path) -> bool:
    """Whether a JSONL file looks like documents of texts and images, by its first line."""
    with open(lines, encoding="utf-8", errors="replace") as file:
        return '"segments"' in file.readline(100_000)
