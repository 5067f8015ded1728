"""Sources mixed by weight: which document comes next in a lane, as a function of seed and place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mmrdpm.data.documents import Draft
from mmrdpm.data.records import Broken, Indexed, Record, Source


@dataclass(frozen=True)
class Item:
    """A document of a lane, or what was left in its stead.

    Attributes:
        place: reading the lane from here gives this very document first.
        source: its name in the recipe.
        first: whether it is the first of its record, which may be cut into many.
    """

    place: Any
    source: str
    draft: Draft | Broken
    first: bool = True


class MakesDrafts(Protocol):
    """What a record becomes: documents by `Drafter`, pictures by `Cropper`."""

    def drafts(self, record: Record, random: np.random.Generator) -> Iterable[Draft] | Broken:
        """The drafts of one record, or why there are none."""


class Mixture:
    """Draws a source for each record, by weight, then takes the lane's next record of it.

    A place is `{"record": k, "part": j, "next": {source: place}}`: the lane's k-th record, of
    whose drafts j come before, and where every source stood when that record was drawn.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        seed: int,
        drafter: MakesDrafts,
    ) -> None:
        self.sources, self.seed, self.drafter = dict(sources), seed, drafter
        self.weights = dict(weights)
        self._names = list(sources)
        self._bounds = np.cumsum([weights[name] for name in self._names])[:-1]

    def describe(self) -> str:
        """One line about the size of things."""
        return ", ".join(
            f"{name} {self.weights[name]:.1%}"
            + (f" of {len(source)} records" if isinstance(source, Indexed) else "")
            for name, source in self.sources.items()
        )

    def fingerprints(self) -> dict[str, str]:
        """What places depend on, per source."""
        return {name: source.fingerprint() for name, source in self.sources.items()}

    def documents(self, lane: int, lanes: int, place: Any) -> Iterator[Item]:
        """The documents of a lane from a place on, None for the start, without end."""
        place = place or {"record": 0, "part": 0, "next": {}}
        record_number, skip, places = place["record"], place["part"], dict(place["next"])
        readers = {
            name: source.records(lane, lanes, f"{self.seed}/{name}", places.get(name))
            for name, source in self.sources.items()
        }
        while True:
            random = np.random.default_rng((self.seed, lane, record_number))
            name = self._names[np.searchsorted(self._bounds, random.random(), side="right")]
            before = dict(places)
            places[name], record = next(readers[name])
            drafts = self.drafter.drafts(record, random)
            several: Iterable[Draft | Broken] = (drafts,) if isinstance(drafts, Broken) else drafts
            for part, draft in enumerate(several):
                if part >= skip:
                    here = {"record": record_number, "part": part, "next": before}
                    yield Item(here, name, draft, part == 0)
            record_number, skip = record_number + 1, 0
