"""Every write that a store has, and behind it the journal of the same set, wherever it lies now.

They are looked at while the agent goes on. What holds them together is the image lock: as long as it is held, the
image stays at its boundary, and every write behind that is in a published interval, in the open one or in the journal.
Writes only go from the journal to the open interval and from there to a published one. So where a write is no more, the
next place has it: whoever misses one while the agent went on looks again (`again`), and only then is it damage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.journal import BatchRun, Journal
from pgcdp.errors import DamageError, PreconditionError, TargetError
from pgcdp.records import INDEX, Boundary, Interval, RecoveryPoint, Span
from pgcdp.store.agreement import refuse_disagreement
from pgcdp.store.base import base_settings, read_base
from pgcdp.store.bundle import Bundle, OpenSnapshot, read_open, settings_behind
from pgcdp.store.catalog import seen_of
from pgcdp.store.image import ImageState, read_state
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import read_open_index, read_open_last
from pgcdp.store.published import Published
from pgcdp.store.survey import survey

T = TypeVar("T")

Names = tuple[tuple[str, ...], ...]
"""By which a store's intervals were read: as `Store.names`."""
ATTEMPTS = 5
"""How often reading begins anew when the agent took over or published writes meanwhile."""


class Writes:
    """The writes of a store and of the set's journal, where there is one.

    `durable_write`: the journal's newest durable write, as the engine says (None: look at a journal that nobody
    writes). `now_ns`: until when it is known that no other write came. `pgdata`: where the live cluster's data
    directory is. `trusting`: the catalog's word is taken for the manifests of intervals that the point does not need,
    until something is not as it says: on a cold disk, to look at ten thousand takes as long as to open a clone.
    """

    def __init__(
        self,
        store: Store,
        journal: Journal | None = None,
        durable_write: int | None = None,
        now_ns: int = 0,
        pgdata: Path | None = None,
        trusting: bool = False,
    ) -> None:
        self.store = store
        self.journal = journal
        self.durable_write = durable_write
        self.now_ns = now_ns
        self.pgdata = pgdata
        self._trusting = trusting
        self._agreed = False
        self._listed: tuple[Names, dict[int, Published]] = (), {}

    def copy(self) -> Self:
        """The same for another thread, with what was read already."""
        found = copy(self)
        names, published = self._listed
        found._listed = names, dict(published)
        return found

    def intervals(self) -> list[Interval]:
        """Published intervals, in order."""
        return [each.interval for each in self.listed().values()]

    def listed(self) -> dict[int, Published]:
        """The published intervals by number, in order, and what is lost between them; none is read twice."""
        names = self.store.names()  # before: what comes meanwhile is looked for again the next time
        before, found = self._listed
        if names != before:
            known = {number: each for number, each in found.items() if not each.damage}
            found = survey(self.store, known, look=not self._trusting)
            self._listed = names, found
        return found

    def look(self) -> bool:
        """From now on each manifest is compared with what the catalog says of it. True: one is not as it said."""
        if not self._trusting:
            return False
        self._trusting = False
        _, listed = self._listed
        if listed and all(map(as_mirrored, listed.values())):
            return False
        self._listed = (), {}
        return True

    def base(self) -> Boundary:
        """The oldest boundary. Raises TargetError while there is none."""
        if self.store.baseline is None:
            self.store = Store.open(self.store.path)
        base = read_base(self.store)
        if base is None:
            raise TargetError(
                f"the first backup image of set {self.store.set_name} is not complete, nothing can be restored yet",
                "pgcdp status tells how far it is",
            )
        return base

    def newest(self) -> int:
        """The newest write, also inside a rewind in place."""
        intervals = self.intervals()
        return self._newest(intervals[-1].to_write if intervals else self.base().write)

    def _newest(self, stored: int) -> int:
        """The newest restorable write. The journal is read only behind what its applied mark says was durable."""
        if self.durable_write is not None:
            return max(stored, self.durable_write)
        mark = self.journal.applied_mark() if self.journal is not None else None
        newest = max(stored, self._end())
        if self.journal is None:
            return newest
        start = None
        if mark is not None:
            self._check_released(mark.released_write)
            start = mark.position if mark.durable_write >= newest and mark.position.segment else None
            newest = max(newest, mark.durable_write)
        for run in self.journal.batches(newest, None, start):
            newest = run.last_write
        return newest

    def _number(self) -> int:
        """Number of the interval that is open now."""
        return self.store.newest_number() + 1

    def _last_entry(self) -> np.void | None:
        """The last entry of the open interval's index; None when it is empty or was published just now."""
        try:
            return read_open_last(self.store, self._number())
        except FileNotFoundError:
            return None

    def _end(self) -> int:
        """The last write in the open interval, 0 when there is none."""
        last = self._last_entry()
        return 0 if last is None else int(last["number"])

    def _check_released(self, released: int) -> None:
        """The journal was told that the store holds all writes up to `released`: if not, that is where to look."""
        number, held = self._number(), self._end()
        if self.store.baseline is None or held >= released:
            return
        before = Bundle.at(self.store, Span(number - 1, number - 1)).interval.boundary if number > 1 else self.base()
        held = max(held, before.write)
        if held < released and number == self._number():
            path = self.store.incoming(number) / "writes"
            size = path.stat().st_size if path.exists() else 0
            raise DamageError(
                f"{path} is damaged at offset {size}: the last whole write is {held}, but writes up to {released} were "
                "durable there",
                f"everything up to write {held} can still be restored",
            )

    def again(self, attempt: Callable[[], T]) -> T:
        """What `attempt` reads from here; anew when it missed something and the agent went on meanwhile.

        A long run of retention may take away something during each attempt: the last one is made while it is `held`.
        """
        attempts = 0
        while True:
            before = self._seen()
            attempts += 1
            try:
                with self.held() if attempts == ATTEMPTS else nullcontext():
                    return attempt()
            except (FileNotFoundError, DamageError, PreconditionError) as error:
                if self.look() or (attempts < ATTEMPTS and self._seen() != before):
                    continue
                if self.journal is not None and isinstance(error, DamageError):
                    self._blame_store(self.journal)
                raise

    def _seen(self) -> tuple[int, ...]:
        """Changes whenever something of `_stored` does, or capture made or removed a segment of the journal.

        Capture that starts again removes empty segments behind the end, which changes nothing of the store.
        """
        if self.journal is None:
            return self._stored()
        return *self._stored(), os.stat(self.journal.directory).st_mtime_ns

    def _stored(self) -> tuple[int, ...]:
        """Changes whenever the open interval was written to or published, or retention joined or removed some."""
        number = self._number()
        sizes = []
        for directory in (self.store.path / "intervals", self.store.joined, self.store.bases):
            with suppress(FileNotFoundError):
                sizes.append(os.stat(directory).st_mtime_ns)
        for name in ("writes", "index"):
            with suppress(FileNotFoundError):
                sizes.append(os.stat(self.store.incoming(number) / name).st_size)
        return number, *sizes

    def _blame_store(self, journal: Journal) -> None:
        """Raise for the store's file when the journal lacks a write only because it gave it away."""
        mark = journal.applied_mark()
        if mark is not None:
            self._check_released(mark.released_write)

    # --- one write, wherever it is now

    def bundle(self, write: int) -> Bundle | None:
        """The published interval that holds a write. Raises DamageError when that one cannot be read."""
        for each in self.listed().values():
            if each.interval.from_write <= write <= each.interval.to_write:
                return _opened(each)
        return None

    def opened(self, number: int) -> Bundle:
        """The published interval that ends at boundary `number`. Raises DamageError when it cannot be read."""
        found = self.listed().get(number)
        return Bundle.open(self.store, number) if found is None else _opened(found)

    def _open_index(self, write: int) -> NDArray[np.void]:
        """Entries of the open interval from a write on; none when it does not hold it."""
        try:
            return from_write(read_open_index(self.store, self._number()), write)
        except FileNotFoundError:
            return np.empty(0, dtype=INDEX)

    def snapshot(self, write: int) -> OpenSnapshot | None:
        """The open interval if it holds a write; its `index` begins there. The caller closes its `writes`."""
        try:
            opened = read_open(self.store, self._number())
        except FileNotFoundError:
            return None
        opened = replace(opened, index=from_write(opened.index, write))
        if len(opened.index):
            return opened
        opened.writes.close()
        return None

    def batches(self, after: int, upto: int) -> Iterator[BatchRun]:
        """Runs of the journal's writes after `after` up to `upto`. PreconditionError without a journal."""
        if self.journal is None:
            raise PreconditionError(
                f"{self.store.path} was opened without a journal", "name the set instead of its store"
            )
        return self.journal.batches(after, upto)

    def _tail(self, intervals: list[Interval]) -> Iterator[tuple[NDArray[np.void], Callable[[int], bytes]]]:
        """The writes behind the last boundary, in order: arrays INDEX or RECORD, each with what gives a row's data."""
        done = intervals[-1].to_write if intervals else self.base().write
        opened = self.snapshot(done + 1)
        if opened is not None:
            with opened.writes as writes:
                columns = opened.index["position"], opened.index["data_length"]
                yield opened.index, lambda row: writes.read(*(int(column[row]) for column in columns))
            done = int(opened.index["number"][-1])
        newest = self._newest(done)
        for run in self.batches(done, newest) if newest > done else ():
            yield run.records, lambda row, run=run: run.data_of(row).tobytes()  # type: ignore[misc]

    def _tail_times(self, stored: int, newest: int) -> NDArray[np.int64]:
        """Wall clocks of the writes behind `stored`, up to `newest`, also when they were published meanwhile."""
        parts = [np.empty(0, dtype=np.int64)]
        done = stored
        while done < newest:
            part = self.again(partial(self._times, done + 1, newest))
            parts.append(part)
            done += len(part)
        return np.concatenate(parts)

    def _times(self, write: int, upto: int) -> NDArray[np.int64]:
        bundle = self.bundle(write)
        entries = from_write(bundle.index(), write) if bundle is not None else self._open_index(write)
        if len(entries):
            return np.asarray(entries["wall_ns"][: upto - write + 1], dtype=np.int64)
        runs = [np.asarray(run.records["wall_ns"], dtype=np.int64) for run in self.batches(write - 1, upto)]
        return np.concatenate(runs)

    def record(self, write: int) -> np.void:
        """The entry (INDEX or RECORD) of one restorable write. DamageError when nothing holds it."""
        return self.again(lambda: self._record(write))

    def data(self, write: int) -> bytes:
        """The data of one restorable write."""
        return self.again(lambda: self._data(write))

    def _record(self, write: int) -> np.void:
        bundle = self.bundle(write)
        if bundle is not None:
            return _first(from_write(bundle.index(), write))
        last = self._last_entry()
        if last is not None and int(last["number"]) >= write:
            if int(last["number"]) == write:
                return last
            entries = self._open_index(write)
            if len(entries):
                return _first(entries)
        for run in self.batches(write - 1, write):
            return _first(run.records)
        raise DamageError(f"write {write} is in neither {self.store.path} nor the journal")

    def _data(self, write: int) -> bytes:
        bundle = self.bundle(write)
        if bundle is not None:
            entry = _first(from_write(bundle.index(), write))
            with bundle.writes() as writes:
                return writes.read(int(entry["position"]), int(entry["data_length"]))
        opened = self.snapshot(write)
        if opened is not None:
            with opened.writes as writes:
                return writes.read(int(opened.index[0]["position"]), int(opened.index[0]["data_length"]))
        for run in self.batches(write - 1, write):
            return run.data_of(0).tobytes()
        raise DamageError(f"write {write} is in neither {self.store.path} nor the journal")

    def settings_of(self, number: int) -> dict[str, Any]:
        """Postgres's settings as they were kept with an interval; empty when Postgres could not be asked."""
        return Bundle.open(self.store, number).settings()

    def newest_settings(self) -> dict[str, Any]:
        """Postgres's settings as they were kept last, also with the open interval; empty when nothing is known."""
        return settings_behind(self.store, self.store.newest_number())

    def settings(self, point: RecoveryPoint) -> dict[str, Any] | None:
        """Postgres's settings at a point: those kept with its interval, or with the last one before it."""
        return self.again(lambda: self._settings(point))

    def _settings(self, point: RecoveryPoint) -> dict[str, Any] | None:
        known = [each for each in self.listed().values() if each.interval.from_write <= point.write + 1]
        for each in reversed(known):
            settings = {} if each.damage else self.settings_of(each.interval.number)
            if settings:
                return settings
        return base_settings(self.store) or None

    # --- the image

    @contextmanager
    def held(self) -> Iterator[int]:
        """The image does not move inside, nor while somebody inherits the descriptor (-1: nobody moves it anyway).

        The store is looked at again: its volumes may have become larger, and what is behind the image lies there.
        Raises PreconditionError for a store alone whose image is of another moment than its state says.
        """
        with image_held(self.store) as descriptor:
            self.store = Store.open(self.store.path, self.store.set_id)
            if self.journal is None and not self._agreed:  # a store alone may be a copy
                refuse_disagreement(self.store)
                self._agreed = True
            yield descriptor

    def image_state(self) -> ImageState:
        """Where the image is; call it `held`. PreconditionError while the first one is being made."""
        state = read_state(self.store)
        if state.state == "baseline":  # boundary 0 is named already, but the agent has not brought it there
            raise PreconditionError(
                f"the first backup image of set {self.store.set_name} is being finished",
                f"run this again when pgcdp status {self.store.set_name} says that the agent follows",
            )
        return state


def as_mirrored(found: Published) -> bool:
    """Whether its manifest is the one that the catalog tells of, or was read."""
    return found.unlooked is None or found.unlooked == seen_of(found.path)


def _opened(found: Published) -> Bundle:
    if found.damage:
        raise DamageError(found.damage, "pgcdp info tells which points can be restored")
    return Bundle.at(found.store, found.interval.span)


def _first(entries: NDArray[np.void]) -> np.void:
    entry: np.void = entries[0]
    return entry


def from_write(index: NDArray[np.void], write: int) -> NDArray[np.void]:
    """The entries of an index from a write on; none when it begins behind it."""
    if not len(index) or int(index["number"][0]) > write:
        return index[:0]
    return index[write - int(index["number"][0]) :]
