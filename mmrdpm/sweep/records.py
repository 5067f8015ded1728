"""A file of results, a JSON object a line, appended as results come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmrdpm.errors import CheckpointError


class Records:
    """The objects of one file; a last line that a crash cut off counts as not written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[dict[str, Any]]:
        """Every record, in the order of writing.

        Raises:
            CheckpointError: a line is no JSON object.
        """
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_text(encoding="utf-8").split("\n")
        records = []
        for number, line in enumerate(whole, start=1):
            try:
                records.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise CheckpointError(
                    f"{self.path}:{number}: not a JSON object: remove the line to measure it anew"
                ) from None
        return records

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """The record with these values, None where there is none."""
        same = (r for r in self.all() if all(r.get(k) == v for k, v in keys.items()))
        return next(same, None)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one more record through to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            _cut_torn_line(file)
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def _cut_torn_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
