"""The transactions of a source: from the indexes of its intervals, and read from the writes behind the last of them.

It loads pyarrow, so `Source.transactions` loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.errors import DamageError
from pgcdp.intervals.indexing import Start, read_events
from pgcdp.intervals.readout import read_nothing
from pgcdp.intervals.transactions import TransactionIndex
from pgcdp.postgres.relations import Look
from pgcdp.records import Rewind
from pgcdp.recovery.branches import Stretch, current_branch, on_branch, share
from pgcdp.recovery.commits import Commits, History, is_lost
from pgcdp.recovery.ends import Ends
from pgcdp.recovery.places import place_below, scratch_of
from pgcdp.store.base import places_back
from pgcdp.store.bundle import settings_behind
from pgcdp.store.layout import Store
from pgcdp.store.parquet import Ranges
from pgcdp.store.published import Published
from pgcdp.store.transactions import read_look, read_transactions, read_wal


class Transactions:
    """The transactions of a store, whose `intervals` are by number and in order, and of `journal` up to write `upto`
    where there is one; `rewinds()`: those in place.

    What lies behind the last boundary is read once, when it is first asked for. Raises DamageError, or
    PreconditionError when the writes went on from journal to store meanwhile: make it anew then.
    """

    def __init__(
        self,
        store: Store,
        intervals: Mapping[int, Published],
        journal: Path | None = None,
        upto: int | None = None,
        rewinds: Callable[[], list[Rewind]] = list,
    ) -> None:
        self.store = store
        self.rewinds = cache(rewinds)
        self._asked: list[Stretch] | None = None
        self.journal = journal
        self.upto = upto
        self.intervals = intervals
        self.commits = cache(self._commits)
        self.tail = cache(self._tail)
        self.events = cache(lambda number: read_events(self.intervals[number].path))

    def on(self, branch: list[Stretch]) -> Transactions:
        """The same, but only what lies on this branch (without: on the current one)."""
        found = copy(self)  # with what was read already
        found._asked = branch
        found.commits = cache(found._commits)
        return found

    def everywhere(self) -> Transactions:
        """The same on all branches: what bears a name, or is a write, is told apart by that."""
        return self.on([Stretch(0, sys.maxsize)])

    @property
    def branch(self) -> list[Stretch]:
        """The branch whose transactions these are."""
        return current_branch(self.rewinds()) if self._asked is None else self._asked

    def _share(self, number: int | None) -> bool | None:
        """Whether an interval lies on the branch; None: in part."""
        if number is not None:
            interval = self.intervals[number].interval
            return share(interval.from_write, interval.to_write, self.branch)
        last = max(self.intervals, default=0)
        return share(self.intervals[last].interval.to_write + 1 if last else 0, sys.maxsize, self.branch)

    @property
    def numbers(self) -> list[int | None]:
        """Intervals whose transactions are known, in order; None: what lies behind the last boundary."""
        known = [*(number for number, each in self.intervals.items() if each.indexed), None]
        return [number for number in known if self._share(number) is not False]

    def history(self) -> History:
        """What targets are resolved with."""
        unindexed = {
            number: each.interval.to_time_ns
            for number, each in self.intervals.items()
            if not each.indexed and self._share(number) is not False
        }
        return History(self.numbers, self.commits, self.summary, unindexed, self._partly, self._opened)

    @property
    def _opened(self) -> int:
        """The number of the interval behind the last boundary."""
        return max(self.intervals, default=0) + 1

    def _partly(self, numbers: Sequence[int | None]) -> dict[int, int]:
        found = {}
        for number in numbers:
            if number is None:
                if any(map(is_lost, self.happened(None))):
                    found[self._opened] = sys.maxsize
            elif (self.intervals[number].transactions or {}).get("lost") and self._lost_here(number):
                found[number] = self.intervals[number].interval.to_time_ns
        return found

    def _lost_here(self, number: int) -> bool:
        """Whether WAL of the branch was not seen whole in an interval where some was not."""
        try:
            return any(map(is_lost, self.happened(number)))
        except DamageError:
            return True

    def summary(self, number: int | None) -> Mapping[str, Any] | None:
        """What an interval's manifest says of its transactions; None when it has to be looked into."""
        return None if number is None or not self._share(number) else self.intervals[number].transactions

    def table(self, number: int | None, columns: Sequence[str] | None = None, within: Ranges | None = None) -> pa.Table:
        """The transaction index of an interval (columns of store.transactions.SCHEMA), or the parts `within`."""
        if number is None:
            return self._on_branch(None, lambda _: self.tail().table, columns)
        path = self.intervals[number].path
        return self._on_branch(number, lambda wanted: read_transactions(path, wanted, within), columns)

    def _ends(self, number: int | None, columns: Sequence[str], within: Ranges | None = None) -> pa.Table:
        """When and how transactions ended: columns END_COLUMNS of the index, at least a row for each transaction."""
        if number is None:
            return self._on_branch(None, lambda _: self.tail().ends, columns)
        return self.table(number, columns, within)

    def _on_branch(
        self, number: int | None, read: Callable[[Sequence[str] | None], pa.Table], columns: Sequence[str] | None
    ) -> pa.Table:
        """Columns of what `read` gives of an interval, which may be more than asked for: what lies on the branch."""
        whole = self._share(number)
        table = read(columns if whole or columns is None else list(dict.fromkeys([*columns, "write", "lsn"])))
        if not whole:
            here = on_branch(table.column("write").to_numpy(), table.column("lsn").to_numpy(), self.branch)
            table = table.filter(pa.array(here))
        return table if columns is None else table.select(list(columns))

    def tables(self, number: int | None) -> list[dict[str, Any]]:
        """The tables that were touched in an interval, and by what (FORMAT.md 3.7)."""
        if number is None:
            return self.tail().tables
        found: list[dict[str, Any]] = self.events(number)["tables"]
        return found

    def happened(self, number: int | None) -> list[dict[str, Any]]:
        """The events of an interval (FORMAT.md 3.7)."""
        found: list[dict[str, Any]] = self.tail().events if number is None else self.events(number)["events"]
        if self._share(number):
            return found
        lsns = np.array([event["lsn"] or 0 for event in found], dtype=np.uint64)
        here = on_branch(np.array([event["write"] for event in found], dtype=np.uint64), lsns, self.branch)
        # A lost stretch has the write where reading went on, far behind it: it may lie on both sides.
        return [event for event, shown in zip(found, here.tolist(), strict=True) if shown or is_lost(event)]

    def looks(self) -> Iterator[Look]:
        """All looks at the catalogs, newest first."""
        last = self.store.newest_number()
        places = chain([self.store.incoming(last + 1)], places_back(self.store, last))
        yield from (look for look in map(read_look, places) if look is not None)

    def look(self) -> Look | None:
        """What the catalogs are now: the newest look, with what WAL said since."""
        return self.tail().look or next(self.looks(), None)

    def _commits(self, number: int | None) -> Commits:
        def wal() -> NDArray[np.void]:
            rows = self.tail().wal if number is None else read_wal(self.intervals[number].path)
            return rows if self._share(number) else rows[on_branch(rows["write"], rows["from_lsn"], self.branch)]

        ends = Ends(partial(self._ends, number))
        tops = cache(partial(_tops, ends, partial(self._ends, number, ["subxids"])))
        return Commits(ends, tops, self.happened(number), wal)

    def _tail(self) -> TransactionIndex:
        last = max(self.intervals, default=0)
        boundary = self.intervals[last].interval.boundary if last else self.store.baseline
        assert boundary is not None
        settings = settings_behind(self.store, last)
        start = Start.of(self.store, boundary, settings, int(self.store.extra["cluster"]["system_identifier"]))
        opened = self.store.incoming(last + 1)
        intervals = [opened] if (opened / "index").exists() else []
        if not intervals and self.journal is None:
            return TransactionIndex(read_nothing(), start.past, None, boundary.next_xid)
        rewinds = [rewind for rewind in self.rewinds() if rewind.begin > boundary.write]
        with place_below(scratch_of(self.store.set_id)) as place:
            tables = place / "wal"
            readout = start.read(intervals, rewinds, tables=tables, journal=self.journal, upto=self.upto)
        return TransactionIndex(readout, start.past_of(rewinds), read_look(opened), boundary.next_xid)


def _tops(ends: Ends, subxids: Callable[[], pa.Table]) -> dict[int, int]:
    lists = subxids().column("subxids").combine_chunks()
    if not len(lists) or not len(lists.flatten()):
        return {}
    found = {}
    for xid, own in zip(ends["xid"].tolist(), lists.take(pa.array(ends.rows)).to_pylist(), strict=True):
        for subxid in own:
            found[subxid] = xid
    return found
