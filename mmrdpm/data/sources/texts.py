"""Plain text: `.txt` files, a document a file, and `.jsonl` files, a document a line."""

from __future__ import annotations

import hashlib

from mmrdpm.data.lines import MAX_BYTES, LineFiles
from mmrdpm.data.records import Broken, Indexed, Text
from mmrdpm.data.sources.files import find

_JSONL = frozenset({".jsonl"})


class TextFiles(Indexed):
    """A file, a folder or a glob of `.txt`, `.md` and `.jsonl` files.

    Raises:
        DataError: there are no such files.
    """

    texts_only = True

    def __init__(self, path: str, key: str = "") -> None:
        paths = find(path, frozenset({".txt", ".md", ".jsonl"}))
        self.text_key = key or "text"
        self.files = [p for p in paths if p.suffix.lower() not in _JSONL]
        jsonl = [p for p in paths if p.suffix.lower() in _JSONL]
        self.lines = LineFiles(jsonl) if jsonl else None

    def __len__(self) -> int:
        return len(self.files) + (len(self.lines) if self.lines else 0)

    def record(self, index: int) -> Text | Broken:
        if index < len(self.files):
            return self._file(index)
        assert self.lines is not None
        key = self.lines.key(index - len(self.files))
        line = self.lines.mapping(index - len(self.files))
        if isinstance(line, Broken):
            return line
        text = line.get(self.text_key)
        if not isinstance(text, str):
            return Broken(key, f"no {self.text_key}", f"keys: {', '.join(line)}"[:200])
        return Text(key, text)

    def _file(self, index: int) -> Text | Broken:
        path = self.files[index]
        try:
            if path.stat().st_size > MAX_BYTES:
                return Broken(str(path), "file too long", f"over {MAX_BYTES} bytes: split it")
            return Text(str(path), path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            return Broken(str(path), "not UTF-8 text", f"byte {error.start}")
        except OSError as error:
            return Broken(str(path), "file cannot be read", str(error.strerror))

    def fingerprint(self) -> str:
        names = "\n".join(path.name for path in self.files)
        lines = self.lines.fingerprint if self.lines else ""
        return hashlib.sha256(f"{names}\n{lines}".encode(errors="surrogateescape")).hexdigest()
