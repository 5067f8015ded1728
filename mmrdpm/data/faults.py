"""Records that are left out: how they are told, and when they are too many.

A damaged shard is one broken record, however many more are lost with it, so shards are counted too.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrdpm.data.records import DAMAGED_SHARD, Broken, Sharded, Source
from mmrdpm.errors import DataError, printable

_AT_LEAST = 1000  # records before a share of broken ones means anything
_SHARDS_AT_LEAST = 100
_RESUME = "a run then goes on with --resume"


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

    source: str
    record: Broken


class AllBroken(DataError):
    """So many records in a row are broken that no whole one may be left.

    Attributes:
        skipped: those, and what was left out before them since the last row.
    """

    def __init__(self, message: str, skipped: Sequence[Skipped] = ()) -> None:
        super().__init__(message)
        self.skipped = skipped


class SkippedLog:
    """Where the records that are left out are told.

    Args:
        path: of a file that gets a JSON line per record, None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._told = path, set[str]()

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Adds records; a damaged shard, which is more than one, also goes to stderr, once."""
        if skipped and self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                for s in skipped:
                    file.write(json.dumps({"source": s.source, **vars(s.record)}) + "\n")
        for record in (s.record for s in skipped if s.record.cause == DAMAGED_SHARD):
            if record.key not in self._told:
                self._told.add(record.key)
                said = printable(f"{record.key}: damaged: {record.detail}")
                print(f"mmrdpm: warning: {said}", file=sys.stderr)

    def named(self, error: DataError) -> DataError:
        """What stops a run, with the place where its cause is listed, if there is one."""
        return DataError(f"{error}; all are listed in {self.path}") if self.path else error


class ReadOnce:
    """Counts a source that is read once, not trained from, and stops where training would.

    Args:
        then: what to do when the data are mended, or the share is raised.
    """

    def __init__(self, name: str, source: Source, max_share: float, then: str) -> None:
        self.name, self.max_share, self.then = name, max_share, then
        self.shards = source.num_shards() if isinstance(source, Sharded) else 0
        self.seen, self.broken = 0, Counter[str]()
        self._last: dict[bool, Broken] = {}  # by whether it is a damaged shard

    def add(self, seen: int, skipped: Sequence[Broken], begun: float) -> None:
        """Counts records, those that were left out among them.

        Args:
            begun: shards that were begun so far.

        Raises:
            DataError: too many of the records, or of the shards, are broken.
        """
        self.seen += seen
        self.broken.update(record.cause for record in skipped)
        self._last |= {record.cause == DAMAGED_SHARD: record for record in skipped}
        if skipped:
            self.check(self.seen, self.broken, begun, _AT_LEAST)

    def check(self, seen: int, broken: Counter[str], begun: float, at_least: int = 1) -> None:
        """As `add`, of counts by cause made elsewhere, or of all when nothing more is to come."""
        name, share, then = self.name, self.max_share, self.then
        if damaged := broken[DAMAGED_SHARD]:
            last = self._last.get(True)
            check_shards(name, damaged, begun, self.shards, share, last, then)
        example = self._last.get(False) or self._last.get(True)
        check_source(name, seen, broken.total(), broken, share, example, at_least, then)


def check_broken(broken: Counter[str], seen: int, max_share: float, last: Broken) -> None:
    """Stops a run too many of whose data are broken.

    Raises:
        DataError: more than `max_share` of the records seen are broken, a few at the start apart.
    """
    if broken.total() > max_share * max(seen, _AT_LEAST):
        raise _too_many(f"{broken.total()} of {seen} records are", max_share, broken, last, _RESUME)


def check_sources(
    counts: Mapping[str, tuple[int, int]],
    broken: Counter[str],
    max_share: float,
    last: Sequence[Skipped],
) -> None:
    """Stops a run one of whose sources is broken, however small its share of the whole.

    Args:
        counts: records seen and broken, by source.
        broken: by source and cause.
        last: of the broken ones, for an example.

    Raises:
        DataError: more than `max_share` of the records seen of a source are broken.
    """
    for name, (seen, total) in counts.items():
        causes = Counter({c: n for c, n in broken.items() if c.startswith(f"{name}: ")})
        example = next((s.record for s in reversed(last) if s.source == name), None)
        check_source(name, seen, total, causes, max_share, example)


def check_source(
    name: str,
    seen: int,
    total: int,
    causes: Counter[str],
    max_share: float,
    last: Broken | None,
    at_least: int = _AT_LEAST,
    then: str = _RESUME,
) -> None:
    """As `check_sources`, of one; `at_least` is what `seen` counts as if it is less."""
    if total > max_share * max(seen, at_least):
        what = f"data.sources.{name}: {total} of {seen} of its records are"
        raise _too_many(what, max_share, causes, last, then)


def check_shards(
    name: str,
    damaged: int,
    begun: float,
    shards: int,
    max_share: float,
    last: Broken | None,
    then: str = _RESUME,
) -> None:
    """Stops a run that loses much of a source at shards that are cut.

    Args:
        begun: shards that were begun, rounded up to a multiple of `_SHARDS_AT_LEAST`, or of all
            `shards` of the source where there are fewer: the damaged may come first.
        last: of the source's damaged ones, for an example.

    Raises:
        DataError: more than `max_share` of the shards begun are damaged.
    """
    block = min(shards, _SHARDS_AT_LEAST)
    begun = max(begun, damaged)  # a place tells only what is used up: a damaged one has begun
    if damaged > max_share * block * math.ceil(begun / block):
        example = f"; the last: {last.key}" if last else ""
        raise DataError(
            f"data.sources.{name}: {damaged} of {round(begun)} shards read are"
            f" damaged, and their later records lost, more than data.max_broken_share {max_share}"
            f"{example}: mend them in place, under the same names, or raise the share; {then}"
        )


def _too_many(
    what: str, max_share: float, broken: Counter[str], last: Broken | None, then: str
) -> DataError:
    causes = ", ".join(f"{count} {cause}" for cause, count in broken.most_common(5))
    example = f"; the last: {last.key} {last.detail}".rstrip() if last else ""
    return DataError(
        f"{what} broken, more than data.max_broken_share {max_share}:"
        f" {causes}{example}: mend the files in place, under the same names (lines of JSONL with"
        f" the same lengths), or raise data.max_broken_share; {then}"
    )
