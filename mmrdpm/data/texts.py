"""Texts alone, as a text tokeniser learns from them: the embedded ones, or those of any sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.faults import ReadOnce, Skipped, SkippedLog
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken, Interleaved, Record, Sharded, Text, first_epoch
from mmrdpm.data.sources import SourceConfig, open_source

_AGAIN = "then start again"


@dataclass(frozen=True)
class TextPlan:
    """The `data` section of a text tokeniser's recipe.

    Attributes:
        sources: whose texts and captions are read, by name, as in a model's recipe; none of them is
            read twice. Without, the names and definitions of the embedded training data.
        records: at most so many are read, shared out by the sources' weights.
        max_broken_share: more broken records than this are an error.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    records: int = field(default=100_000, metadata={"min": 1})
    max_broken_share: float = field(default=0.05, metadata={"min": 0.0, "max": 0.9})

    def __post_init__(self) -> None:
        DataPlan(sources=self.sources)  # checks the weights


def read_texts(plan: TextPlan) -> Iterator[str]:
    """The plan's texts, the same at every call.

    Raises:
        DataError: a source cannot be read, or too many of its records or shards are broken.
    """
    if not plan.sources:
        data = load_emoji(8)
        yield from (data.names[i] for i in data.indices("train"))
        yield from load_glosses()
    for name, config in plan.sources.items():
        source, limit = open_source(name, config), round(plan.records * config.weight)
        log, counts = SkippedLog(None), ReadOnce(name, source, plan.max_broken_share, _AGAIN)
        begun = 0.0
        for place, record in first_epoch(source, "texts", limit):
            begun = source.begun(0, 1, place) if isinstance(source, Sharded) else 0
            fault = record if isinstance(record, Broken) else _not_unicode(record)
            skipped = [fault] if fault else []
            log.add([Skipped(name, broken) for broken in skipped])
            counts.add(1, skipped, begun)
            if not fault:
                yield from _texts_of(record)
        counts.check(counts.seen, counts.broken, begun)


def _not_unicode(record: Record) -> Broken | None:
    try:
        "".join(_texts_of(record)).encode()
    except UnicodeEncodeError as error:
        return Broken(record.key, "not Unicode text", str(error)[:200])
    return None


def _texts_of(record: Record) -> tuple[str, ...]:
    match record:
        case Text():
            return (record.text,)
        case Interleaved():
            return tuple(part for part in record.parts if isinstance(part, str))
        case Broken():
            return ()
    return record.captions
