"""Finding files: paths and globs, and names in other people's files that must stay inside."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from mmrdpm.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2"}
)


def at_home(path: str) -> Path:
    """The path with `~` for the home it means; that of nobody stays, and is found missing."""
    return Path(os.path.expanduser(path))


def find(path: str, suffixes: frozenset[str]) -> list[Path]:
    """The files of a file name, a folder (searched to its depths) or a glob, sorted by name.

    Raises:
        DataError: there are none.
    """
    place = at_home(path)
    if place.is_dir():
        found = [p for p in _walk(place) if p.suffix.lower() in suffixes and p.is_file()]
    elif place.is_file():
        found = [place]
    else:
        found = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
    if not found:
        what = "no file ending in " + ", ".join(sorted(suffixes)) if place.is_dir() else "no file"
        raise DataError(f"{path}: {what} is there: correct the path")
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder, links to folders followed once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}: mend its rights")

    seen = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here) / name for name in names)


def inside(folder: Path, name: str) -> Path | None:
    """The file that a name in a data set means; None if it lies outside of the folder."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, a link to itself
        return None
    return path if path.is_relative_to(folder.resolve()) else None
