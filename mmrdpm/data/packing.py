"""Documents to rows with little padding: each row chooses among the next documents of its lane."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from mmrdpm.data.documents import Draft
from mmrdpm.data.faults import AllBroken, Skipped
from mmrdpm.data.mixture import Item
from mmrdpm.data.records import Broken
from mmrdpm.errors import DataError

_IN_A_ROW = 500


class Lane:
    """One row of every batch, filled from its own part of the data.

    A row begins with the oldest document that waits, so that none waits for long, and goes on
    with the longest that still fits (best fit) until none does.

    Args:
        read: gives the lane's documents from a place on.
        length: tokens that a draft takes in a row.
        seq_len: tokens of a row.
        look_ahead: documents that wait to be chosen.
        state: where to go on, see `state`.
    """

    def __init__(
        self,
        read: Callable[[Any], Iterator[Item]],
        length: Callable[[Draft], int],
        seq_len: int,
        look_ahead: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._length, self._seq_len, self._look_ahead = length, seq_len, look_ahead
        self._broken_in_a_row = 0
        state = state or {"place": None, "taken": [], "read": 0, "seen": 0, "broken": {}}
        self.seen, self.broken = state["seen"], Counter(state["broken"])
        # older checkpoints have no counts by source: they are counted from there on
        self._by_source = {name: [*counts] for name, counts in state.get("sources", {}).items()}
        self._items = read(state["place"])
        self._window: deque[Item | None] = deque()  # since the oldest that waits; None: gone
        self._waiting, self._reached = 0, state["place"]
        self._skipped: list[Skipped] = []
        taken = set(state["taken"])
        for i in range(state["read"]):
            item = self._next()
            self._append(None if i in taken else item)
        self._fill()

    def state(self) -> dict[str, Any]:
        """Where the lane stands, as plain lists, dicts and numbers.

        The place of the oldest document that waits, how many were read since, which of them are
        gone; the place of the last that was read; and how many records were seen, and broken by
        cause; and by source, seen and broken.
        """
        assert self._window[0] is not None
        return {
            "place": self._window[0].place,
            "taken": [i for i, item in enumerate(self._window) if item is None],
            "read": len(self._window),
            "reached": self._reached,
            "seen": self.seen,
            "broken": dict(self.broken),
            "sources": {name: [*counts] for name, counts in self._by_source.items()},
        }

    def row(self) -> tuple[list[Draft], list[Skipped]]:
        """The documents of the next row, and what was left out since the last.

        Raises:
            DataError: hundreds of records in a row are broken, one is longer than a row, or the
                source failed.
        """
        row, room = [], self._seq_len
        place: int | None = 0
        while place is not None:
            item = self._window[place]
            assert item is not None and isinstance(item.draft, Draft)
            row.append(item.draft)
            room -= self._length(item.draft)
            self._window[place] = None
            self._waiting -= 1
            self._fill()
            place = self._longest(room)
        skipped, self._skipped = self._skipped, []
        return row, skipped

    def _longest(self, room: int) -> int | None:
        """The longest waiting document that fits, the oldest of equals."""
        best, size = None, 0
        for place, item in enumerate(self._window):
            if item is not None and isinstance(item.draft, Draft):
                length = self._length(item.draft)
                if size < length <= room:
                    best, size = place, length
        return best

    def _fill(self) -> None:
        """Reads until enough documents wait; the oldest of them is first in the window."""
        while self._waiting < self._look_ahead:
            item = self._next()
            self.seen += item.first
            counts = self._by_source.setdefault(item.source, [0, 0])
            counts[0] += item.first
            if isinstance(item.draft, Broken):
                counts[1] += 1
                self.broken[f"{item.source}: {item.draft.cause}"] += 1
                self._skipped.append(Skipped(item.source, item.draft))
                self._broken_in_a_row += 1
                if self._broken_in_a_row == _IN_A_ROW:  # it might search for ever
                    raise AllBroken(
                        f"{_IN_A_ROW} records in a row are broken, the last: {item.draft}: mend the"
                        " data, or the source's keys in the recipe",
                        self._skipped,
                    )
                self._append(None)
            else:
                self._broken_in_a_row = 0
                self._check_length(item.draft)
                self._append(item)
        while self._window[0] is None:
            self._window.popleft()

    def _next(self) -> Item:
        item = next(self._items)
        self._reached = item.place
        return item

    def _check_length(self, draft: Draft) -> None:
        size = self._length(draft)
        if size > self._seq_len:
            raise DataError(too_long("a document", size, self._seq_len))

    def _append(self, item: Item | None) -> None:
        broken = item is not None and isinstance(item.draft, Broken)
        self._window.append(None if broken else item)
        self._waiting += item is not None and not broken


def too_long(document: str, size: int, seq_len: int) -> str:
    """What to tell of a document that does not fit into a row."""
    return (
        f"{document} takes {size} tokens, more than data.seq_len {seq_len}: raise it, or lower"
        " data.steps_per_image"
    )
