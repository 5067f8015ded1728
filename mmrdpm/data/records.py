"""What a data source holds, and the two kinds of source: by index, and by shards in sequence.

The order is cut into *lanes*, one per row of the global batch, that never share a record. A lane
reads its part by itself, from a *place* that says which record comes next; so neither the number
of ranks nor that of worker processes has a say in what a lane reads.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from mmrdpm.errors import DataError

DAMAGED_SHARD = "damaged shard"
"""The cause of the broken record that stands for all that is lost of a shard."""

_EMPTY_EPOCHS = 8  # in a row, until a source counts as empty

Picture = Path | bytes | np.ndarray
"""An image file, its bytes, pixels uint8 `[size, size, 3]`, or latents float `[*grid, C]`."""

Place = list[int]
"""Where a lane's next record of a source lies."""


@dataclass(frozen=True)
class Pair:
    """An image and what it may be called; one of the captions is drawn each time.

    There are none where the picture alone was asked for.
    """

    key: str
    image: Picture
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A text of any length."""

    key: str
    text: str


@dataclass(frozen=True)
class Interleaved:
    """Texts and images in their order."""

    key: str
    parts: tuple[str | Picture, ...]

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but white space."""
        return all(isinstance(part, str) and not part.strip() for part in self.parts)


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used: `cause` to count by, `detail` to find it by."""

    key: str
    cause: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}" + (f" ({self.detail})" if self.detail else "")


Record = Pair | Text | Interleaved | Broken


class Source(ABC):
    """A data set, read lane by lane without end, epoch after epoch.

    Attributes:
        texts_only: whether it is known to hold no pictures before it is read.
    """

    texts_only = False

    @abstractmethod
    def records(
        self, lane: int, lanes: int, seed: str, place: Place | None
    ) -> Iterator[tuple[Place, Record]]:
        """The lane's records from a place on (None: the start), each with the place after it.

        In every epoch each record is in exactly one lane, once.

        Raises:
            DataError: the source cannot be read at all, or holds no records.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the records that places point to change."""


class Indexed(Source):
    """A source whose records have numbers, `0..len - 1`; its order is shuffled each epoch."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> Record:
        """Record `index`; a broken one is a value, never an exception."""

    def records(
        self, lane: int, lanes: int, seed: str, place: Place | None
    ) -> Iterator[tuple[Place, Record]]:
        """At place `[n]`, the next record is number `lane + n * lanes` of the shuffled order."""
        for n in count(place[0] if place else 0):
            epoch, position = divmod(lane + n * lanes, len(self))
            yield [n + 1], self.record(shuffled(position, len(self), seed, epoch))


class Sharded(Source):
    """A source of shards that can only be read from their start, such as archives and streams.

    Where there are fewer shards than lanes, each shard is read by several lanes, which take turns
    in its records. Which lane reads what is drawn anew for every epoch; one epoch follows upon the
    other without regard to lanes, so that none falls behind where they cannot share it evenly.
    """

    @abstractmethod
    def num_shards(self) -> int: ...

    def begun(self, lane: int, lanes: int, place: Place) -> float:
        """How many shards a lane has begun up to a place; of those that it shares, its part."""
        turn, _ = self._place(lanes, place)
        return (turn + 1) / -(-lanes // self.num_shards())

    @abstractmethod
    def shard(self, index: int) -> Iterator[Record]:
        """The records of one shard, always in the same order."""

    def records(
        self, lane: int, lanes: int, seed: str, place: Place | None
    ) -> Iterator[tuple[Place, Record]]:
        """At place `[n, i]`, record i of the lane's n-th shard is next, over all epochs."""
        shards = self.num_shards()
        sharers = -(-lanes // shards)
        first, skip = self._place(lanes, place or [0, 0])
        empty = 0  # shards in a row
        for turn in count(first):
            epoch, position = divmod(lane + turn * lanes, shards * sharers)
            shard, share = divmod(shuffled(position, shards * sharers, seed, epoch), sharers)
            empty += 1
            for i, record in enumerate(self.shard(shard)):
                empty = 0
                if i >= skip and i % sharers == share:
                    yield [turn, i + 1], record
            skip = 0
            if empty == _EMPTY_EPOCHS * -(-shards * sharers // lanes):
                raise DataError(
                    f"{self}: no records found: name other shards, or in the source's keys what"
                    " these hold"
                )

    def _place(self, lanes: int, place: Place) -> Place:
        """`[n, i]`, also of older checkpoints, which hold `[epoch, n, i]`."""
        if len(place) == 2:
            return place
        epoch, turn, i = place
        shards = self.num_shards()
        in_epoch, left = divmod(shards * -(-lanes // shards), lanes)
        if left:  # of which some lanes had one shard more than others in every epoch
            raise DataError(
                f"{self}: the place in it was saved by an earlier version, which dealt"
                f" {shards} shards to {lanes} rows otherwise: begin a new run (of a model by"
                " model.init_from=RUN, to keep its weights)"
            )
        return [epoch * in_epoch + turn, i]


def first_epoch(source: Source, seed: str, limit: int) -> Iterator[tuple[Place, Record]]:
    """At most `limit` records of a source in a shuffled order, and no more than it has.

    Each comes with the place after it, of one lane alone.
    """
    limit = min(limit, len(source)) if isinstance(source, Indexed) else limit
    for place, record in islice(source.records(0, 1, seed, None), limit):
        if isinstance(source, Sharded) and place[0] >= source.num_shards():  # of the next epoch
            return
        yield place, record


def shuffled(position: int, size: int, seed: str, epoch: int) -> int:
    """A permutation of `0..size - 1` per (seed, epoch), without holding it in memory.

    A four-round Feistel network over the next power of four, walked until it is back inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for step in range(4):
            word = f"{seed}/{epoch}/{step}/{right}".encode()
            digest = hashlib.blake2b(word, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        position = left << half | right
        if position < size:
            return position
