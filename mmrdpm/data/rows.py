"""The rows of a rank, batch by batch: in the stream's order, or from lanes, by worker processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmrdpm.data.documents import Draft
from mmrdpm.data.faults import (
    AllBroken,
    Skipped,
    SkippedLog,
    check_broken,
    check_shards,
    check_sources,
)
from mmrdpm.data.mixture import Item, Mixture
from mmrdpm.data.packing import Lane, too_long
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import DAMAGED_SHARD, Sharded, Source
from mmrdpm.distributed import SIGNALS_TOGETHER
from mmrdpm.errors import DataError, MmrdpmError

_LOOK_AHEAD = 16
_LAST_UPDATE = 600.0  # seconds in which a trainer that is to stop saves, draws and wants rows again
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class Stream(Protocol):
    """What documents come from: `EmojiStream` or `Mixture`."""

    def describe(self) -> str:
        """One line about the size of things."""

    def fingerprints(self) -> dict[str, str]:
        """What places depend on, per source."""

    def documents(self, lane: int, lanes: int, place: Any) -> Iterator[Item]:
        """The documents of a lane from a place on, None for the start, without end."""


class InOrder:
    """Rows filled with documents in their order (first fit), until one fits in none of them.

    Every rank plans the whole batch and takes its rows, so this is for streams in memory only.
    """

    def __init__(
        self, stream: Stream, plan: DataPlan, grid: tuple[int, ...], rank: int, world_size: int
    ) -> None:
        self.stream, self.plan, self.grid = stream, plan, grid
        self.mine = slice(rank, None, world_size)
        self.restore({"next_document": 0})

    def state(self) -> dict[str, Any]:
        return {"next_document": self._next_document}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._next_document = state["next_document"]
        self._documents = self.stream.documents(0, 1, self._next_document)
        self._held: Draft | None = None

    def next(self) -> list[list[Draft]]:
        """The next rows.

        Raises:
            DataError: a document is longer than a row.
        """
        rows: list[list[Draft]] = [[] for _ in range(self.plan.rows)]
        room = [self.plan.seq_len] * self.plan.rows
        while True:
            draft = self._held or self._read()
            size = draft.length(self.grid)
            if size > self.plan.seq_len:
                raise DataError(
                    too_long(f"document {self._next_document}", size, self.plan.seq_len)
                )
            row = next((r for r, left in enumerate(room) if left >= size), None)
            if row is None:
                self._held = draft
                return rows[self.mine]
            rows[row].append(draft)
            room[row] -= size
            self._next_document, self._held = self._next_document + 1, None

    def seen(self) -> int:
        """How many documents all ranks have taken since the run began."""
        return self._next_document

    def broken(self) -> Counter[str]:
        """Nothing in memory is."""
        return Counter()

    def _read(self) -> Draft:
        draft = next(self._documents).draft
        assert isinstance(draft, Draft)
        return draft


class Lanes:
    """A row per lane, see `packing.Lane`; lanes are dealt to the rank's worker processes.

    Args:
        skipped_log: gets the records that are left out on the way.
    """

    def __init__(
        self,
        stream: Stream,
        plan: DataPlan,
        grid: tuple[int, ...],
        rank: int,
        world_size: int,
        skipped_log: SkippedLog,
    ) -> None:
        self.stream, self.plan, self.grid = stream, plan, grid
        self.skipped_log = skipped_log
        self.lanes = list(range(rank, plan.rows, world_size))
        self.restore({"lanes": dict.fromkeys(self.lanes)})

    def state(self) -> dict[str, Any]:
        return {"lanes": dict(self._states)}

    def restore(self, state: Mapping[str, Any]) -> None:
        missing = [lane for lane in self.lanes if lane not in state["lanes"]]
        if missing:
            raise DataError(
                f"the saved place in the data lacks rows {missing}: it must hold those of all"
                " ranks, see loader.merge_states"
            )
        self._states = {lane: state["lanes"][lane] for lane in self.lanes}
        self._parts: Iterator[_Part] | None = None

    def next(self) -> list[list[Draft]]:
        """The next rows.

        Raises:
            DataError: too many records are broken, a source failed, or a worker was killed.
        """
        workers = min(self.plan.workers, len(self.lanes))
        try:
            if self._parts is None:
                self._parts = self._read(workers)
            with _noticing_deaths():
                parts = [next(self._parts) for _ in range(max(1, workers))]
        except RuntimeError as error:
            if not (said := str(error)).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"{said.strip(' .')}, as happens where main memory is full: lower data.workers, or"
                " data.look_ahead"
            ) from None
        skipped = [one for part in parts for one in part.skipped()]
        if fault := next((part.fault for part in parts if part.fault), None):
            self.skipped_log.add(skipped)
            raise self.skipped_log.named(fault) if isinstance(fault, AllBroken) else fault
        rows: dict[int, list[Draft]] = {}
        for filled in (filled for part in parts for filled in part.filled):
            rows[filled.lane], self._states[filled.lane] = filled.row, filled.state
        if skipped:
            self.skipped_log.add(skipped)  # first, as it says what stops the run
            try:
                self._check_broken(skipped)
            except DataError as error:
                raise self.skipped_log.named(error) from None
        return [rows[lane] for lane in self.lanes]

    def _check_broken(self, last: Sequence[Skipped]) -> None:
        """Over all lanes, as each one alone sees too few records."""
        broken, share = self.broken(), self.plan.max_broken_share
        check_broken(broken, self.seen(), share, last[-1].record)
        counts: dict[str, tuple[int, int]] = {}
        for state in filter(None, self._states.values()):
            for name, (seen, faulty) in state["sources"].items():
                before = counts.get(name, (0, 0))
                counts[name] = before[0] + seen, before[1] + faulty
        check_sources(counts, broken, share, last)
        for one in last:
            if one.record.cause == DAMAGED_SHARD and isinstance(self.stream, Mixture):
                self._check_shards(one, self.stream.sources[one.source], broken)

    def _check_shards(self, last: Skipped, source: Source, broken: Counter[str]) -> None:
        """A damaged shard is one broken record, however many more are lost with it."""
        assert isinstance(source, Sharded)
        begun = 0.0
        for lane, state in self._states.items():
            if state:  # what waits was read too; older checkpoints do not say how far that is
                reached = state.get("reached", state["place"])
                if place := reached["next"].get(last.source):
                    begun += source.begun(lane, self.plan.rows, place)
        damaged, share = broken[f"{last.source}: {DAMAGED_SHARD}"], self.plan.max_broken_share
        check_shards(last.source, damaged, begun, source.num_shards(), share, last.record)

    def seen(self) -> int:
        """How many records this rank has read since the run began."""
        return sum(state["seen"] for state in self._states.values() if state)

    def broken(self) -> Counter[str]:
        """How many records this rank has left out since the run began, by source and cause."""
        states = [state for state in self._states.values() if state]
        return sum((Counter(state["broken"]) for state in states), Counter())

    def _read(self, workers: int) -> Iterator[_Part]:
        reader = _Reader(self.stream, self.plan, self.grid, self._states, max(1, workers))
        if not workers:
            return iter(reader)
        loader = DataLoader(
            reader,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # meant for lists of samples
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else starting workers would draw from the global one
        )
        # torch's handler would raise of a killed worker anywhere, in the middle of an update too
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(loader)
        finally:
            _put_back(before)


@contextmanager
def _noticing_deaths() -> Iterator[None]:
    """Within it a worker that was killed raises RuntimeError, also one whose rows are half read.

    Nothing else would end that reading: this process could write into the worker's pipe as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)

    def look(*of: Any) -> None:
        torch._C._error_if_any_worker_fails()  # type: ignore[attr-defined]
        if callable(before):
            before(*of)

    signal.signal(signal.SIGCHLD, look)
    try:
        torch._C._error_if_any_worker_fails()  # type: ignore[attr-defined]  # since the last batch
        yield
    finally:
        _put_back(before)


def _put_back(handler: Any) -> None:
    """Makes it SIGCHLD's again, which only the main thread can; None is one not of Python."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


@dataclass(frozen=True)
class _Filled:
    """A row as it leaves a worker, and where its lane stands after it."""

    lane: int
    row: list[Draft]
    skipped: list[Skipped]
    state: dict[str, Any]


@dataclass(frozen=True)
class _Part:
    """A worker's share of a batch, the whole of it where there is no fault."""

    filled: list[_Filled]
    fault: MmrdpmError | None = None

    def skipped(self) -> list[Skipped]:
        """What was left out, before the fault too."""
        before = self.fault.skipped if isinstance(self.fault, AllBroken) else ()
        return [*(one for filled in self.filled for one in filled.skipped), *before]


class _Reader(IterableDataset):
    """Fills the lanes of one worker, or all where there are no workers."""

    def __init__(
        self,
        stream: Stream,
        plan: DataPlan,
        grid: tuple[int, ...],
        states: Mapping[int, dict[str, Any] | None],
        workers: int,
    ) -> None:
        self.stream, self.plan, self.grid = stream, plan, grid
        self.states, self.workers = dict(states), workers

    def __iter__(self) -> Iterator[_Part]:
        worker = get_worker_info()
        chosen = list(self.states)[worker.id if worker else 0 :: self.workers]
        lanes: dict[int, Lane] = {}
        filled: list[_Filled] = []
        try:
            while True:
                filled = []
                for number in chosen:
                    if number not in lanes:
                        lanes[number] = self._lane(number)
                    filled.append(_fill(number, lanes[number]))
                yield _Part(filled)
        except MmrdpmError as error:  # through a DataLoader it would become a stack trace
            yield _Part(filled, error)

    def _lane(self, number: int) -> Lane:
        plan = self.plan
        return Lane(
            lambda place: self.stream.documents(number, plan.rows, place),
            lambda draft: draft.length(self.grid),
            plan.seq_len,
            plan.look_ahead or _LOOK_AHEAD,
            self.states[number],
        )


def _fill(number: int, lane: Lane) -> _Filled:
    row, skipped = lane.row()
    return _Filled(number, row, skipped, lane.state())


def _as_it_is(part: _Part) -> _Part:
    return part


def _begin_worker(_: int) -> None:
    """Ctrl-C and SIGTERM may reach the whole process group, and the trainer wants to save first.

    To finish its update it may still need rows: a worker stays at the first SIGTERM, and leaves at
    the second, late where both may be of one stop, and not with 0: who waits for its rows would go
    on waiting. Where the trainer is killed, a worker that has rows to hand over would wait for
    ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stay_once)


def _stay_once(*_: object) -> None:
    first = time.monotonic()

    def leave(*_: object) -> None:
        if time.monotonic() - first >= SIGNALS_TOGETHER:
            os._exit(1)
        timer = threading.Timer(_LAST_UPDATE, os._exit, (1,))
        timer.daemon = True  # a worker that has nothing left to do need not wait for it
        timer.start()

    signal.signal(signal.SIGTERM, leave)
