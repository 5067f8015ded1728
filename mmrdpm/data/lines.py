"""Files of lines, read by number: JSON objects and texts, of any size on disk."""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mmrdpm import distributed
from mmrdpm.data.records import Broken
from mmrdpm.errors import DataError

MAX_BYTES = 64_000_000  # of one line, or of one member of an archive
_CHUNK = 1 << 24
_LONG = 1 << 30  # bytes of which the reading takes seconds, or minutes over a network


class LineFiles:
    """The lines of several files after each other, blank ones left out.

    Raises:
        DataError: a file cannot be read, or there are no lines at all.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.starts, self.ends = [], []
        with _progress(sum(map(_size, paths))) as advance:
            for path in paths:
                try:
                    starts, ends = _spans(path, advance)
                except OSError as error:
                    raise DataError(f"{path}: cannot be read: {error.strerror}") from None
                self.starts.append(starts)
                self.ends.append(ends)
        self.totals = np.cumsum([len(starts) for starts in self.starts])
        if not len(self):
            raise DataError(f"{', '.join(map(str, paths[:3]))}: no lines: the source is empty")

    def __len__(self) -> int:
        return int(self.totals[-1]) if len(self.totals) else 0

    def key(self, index: int) -> str:
        """Where a line stands, such as `texts/a.jsonl#17`, counted from 0 without blank lines."""
        file, line = self._place(index)
        return f"{self.paths[file]}#{line}"

    def folder(self, index: int) -> Path:
        """The folder of the line's file."""
        return self.paths[self._place(index)[0]].parent

    def text(self, index: int) -> str | Broken:
        """One line."""
        file, line = self._place(index)
        start, end = int(self.starts[file][line]), int(self.ends[file][line])
        if end - start > MAX_BYTES:
            return Broken(self.key(index), "line too long", f"{end - start} bytes")
        try:
            with open(self.paths[file], "rb") as stream:
                stream.seek(start)
                return stream.read(end - start).decode("utf-8").rstrip("\r\n")
        except OSError as error:
            return Broken(self.key(index), "file cannot be read", str(error.strerror))
        except UnicodeDecodeError as error:
            return Broken(self.key(index), "not UTF-8 text", f"byte {error.start}")

    def mapping(self, index: int) -> dict[str, Any] | Broken:
        """One line as a JSON object."""
        text = self.text(index)
        if isinstance(text, Broken):
            return text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Broken(self.key(index), "not valid JSON", str(error)[:200])
        if not isinstance(value, dict):
            return Broken(self.key(index), "not a JSON object", type(value).__name__)
        return value

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names and of where their lines begin."""
        digest = hashlib.sha256()
        for path, starts in zip(self.paths, self.starts, strict=True):
            name = f"{path.name}\n".encode(errors="surrogateescape")
            digest.update(name + starts.tobytes())
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.totals, index, side="right"))
        return file, index - int(self.totals[file - 1] if file else 0)


def _size(path: Path) -> int:
    """Bytes of a file, 0 where that cannot be asked: reading it then says why."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that is told of bytes read, where there are many."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=total < _LONG or not distributed.is_main(),
    )
    task = bar.add_task("looking for lines", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)


def _spans(path: Path, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of every line that is not blank, int64."""
    with open(path, "rb") as stream:
        marked = stream.read(len(BOM_UTF8)) == BOM_UTF8
        stream.seek(0)
        breaks, size = [np.array([len(BOM_UTF8) - 1 if marked else -1])], 0
        while chunk := stream.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
            advance(len(chunk))
    ends = np.append(np.concatenate(breaks), size)
    starts, ends = ends[:-1] + 1, ends[1:]
    kept = ends > starts
    single = np.flatnonzero(ends - starts == 1)
    if single.size:  # a blank line of a file from Windows is "\r"
        kept[single] = np.memmap(path, np.uint8, "r")[starts[single]] != ord("\r")
    return starts[kept], ends[kept]
