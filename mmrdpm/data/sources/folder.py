"""A folder of images: captions from `metadata.jsonl`, from `NAME.txt`, or from sub-folders."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

from mmrdpm.data.lines import MAX_BYTES, LineFiles
from mmrdpm.data.records import Broken, Indexed, Pair
from mmrdpm.data.sources.files import IMAGE_SUFFIXES, at_home, find, inside
from mmrdpm.errors import DataError

METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("caption", "text", "captions")


class ImageFolder(Indexed):
    """Images in a folder and below.

    With `metadata.jsonl`, each of its lines is a record: `{"file_name": "a.png", "caption":
    "..."}`, the caption a text or a list of texts under `caption`, `text` or `captions`.
    Without it, each image is a record and its caption is in a `.txt` file of the same name; or,
    where a template is given, is made of the name of the sub-folder.

    Args:
        captions: whether they are wanted; else each image is a record, and nothing else is read.

    Raises:
        DataError: no such folder, or no images in it.
    """

    def __init__(
        self, path: str, caption: str = "", template: str = "", captions: bool = True
    ) -> None:
        self.folder, self.template, self.captions = at_home(path), template, captions
        self.caption_keys = (caption,) if caption else _CAPTION_KEYS
        if not self.folder.is_dir():
            raise DataError(f"{path}: no such folder of images: correct the path")
        metadata = self.folder / METADATA
        described = captions and not template and metadata.is_file()
        self.lines = LineFiles([metadata]) if described else None
        self.images = [] if self.lines else find(path, IMAGE_SUFFIXES)

    def __len__(self) -> int:
        return len(self.lines or self.images)

    def record(self, index: int) -> Pair | Broken:
        if self.lines:
            return self._described(self.lines.key(index), self.lines.mapping(index))
        path = self.images[index]
        key = path.relative_to(self.folder).as_posix()
        if not self.captions:
            return Pair(key, path, ())
        if self.template:
            label = path.parent.name.replace("_", " ")
            return Pair(key, path, (self.template.format(label=label),))
        try:
            with open(path.with_suffix(".txt"), encoding="utf-8-sig") as file:
                return Pair(key, path, (file.read(MAX_BYTES).strip(),))
        except FileNotFoundError:
            return Broken(
                key,
                "no caption",
                f"{path.stem}.txt is missing, and there is no {METADATA} or template",
            )
        except (OSError, UnicodeDecodeError) as error:
            return Broken(key, "caption cannot be read", str(error))

    def _described(self, key: str, line: dict[str, Any] | Broken) -> Pair | Broken:
        if isinstance(line, Broken):
            return line
        name = line.get("file_name")
        if not isinstance(name, str):
            return Broken(key, "no file_name", f"keys: {', '.join(line)}"[:200])
        path = inside(self.folder, name)
        if path is None:
            return Broken(key, "path leaves the folder", name[:200])
        captions = captions_of(next((line[k] for k in self.caption_keys if k in line), None))
        if captions is None:
            return Broken(name, "no caption", f"keys: {', '.join(line)}"[:200])
        return Pair(name, path, captions)

    def fingerprint(self) -> str:
        return self.lines.fingerprint if self.lines else self._names

    @cached_property
    def _names(self) -> str:
        names = "\n".join(p.relative_to(self.folder).as_posix() for p in self.images)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def captions_of(value: Any) -> tuple[str, ...] | None:
    """A caption or a list of captions; None for anything else."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(values) if values and all(isinstance(v, str) for v in values) else None
