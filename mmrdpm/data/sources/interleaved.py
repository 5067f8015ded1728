"""Documents of texts and images in any order: JSONL with references to image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmrdpm.data.lines import LineFiles
from mmrdpm.data.records import Broken, Indexed, Interleaved, Picture
from mmrdpm.data.sources.files import find, inside

_MAX_IMAGES = 100  # of one document: all are held at once


class InterleavedFiles(Indexed):
    """A `.jsonl` file, or a folder or glob of them.

    A line is `{"segments": [{"text": "..."}, {"image": "a.png"}, ...]}`; image paths are relative
    to the folder of the JSONL file and may not leave it.

    Raises:
        DataError: there are no such files, or they are empty.
    """

    def __init__(self, path: str) -> None:
        self.lines = LineFiles(find(path, frozenset({".jsonl"})))

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, index: int) -> Interleaved | Broken:
        key, line = self.lines.key(index), self.lines.mapping(index)
        if isinstance(line, Broken):
            return line
        segments = line.get("segments")
        if not isinstance(segments, list) or not segments:
            return Broken(key, "no segments", f"keys: {', '.join(line)}"[:200])
        if sum(isinstance(s, dict) and "image" in s for s in segments) > _MAX_IMAGES:
            return Broken(key, f"more than {_MAX_IMAGES} images")
        parts: list[str | Picture] = []
        for segment in segments:
            part = _part(key, self.lines.folder(index), segment)
            if isinstance(part, Broken):
                return part
            parts.append(part)
        return Interleaved(key, tuple(parts))

    def fingerprint(self) -> str:
        return self.lines.fingerprint


def _part(key: str, folder: Path, segment: Any) -> str | Picture | Broken:
    match segment:
        case {"text": str(text)} if len(segment) == 1:
            return text
        case {"image": str(name)} if len(segment) == 1:
            path = inside(folder, name)
            return path or Broken(key, "path leaves the folder", name[:200])
    return Broken(key, "a segment is neither text nor image", str(segment)[:200])
