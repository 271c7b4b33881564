"""What is known of the transactions that ended in each interval, and of those that may not be known. Pure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import DamageError, TargetError, UnseenError
from pgcdp.records import ABORTED, ABORTED_PREPARED, COMMITTED, COMMITTED_PREPARED, PREPARED
from pgcdp.recovery.ends import Ends
from pgcdp.units import format_lsn

CANDIDATES = 10
"""How many of the transactions that are meant are named in a message."""


@dataclass(frozen=True)
class Commits:
    """The transactions that ended in an interval.

    `ends`: (like an) array TRANSACTION in order of LSN. `tops()`: the top transaction (64 bits) of a subtransaction (32
    bits). `events`: as FORMAT.md 3.7. `wal()`: array WAL_WRITE.
    """

    ends: NDArray[np.void] | Ends
    tops: Callable[[], Mapping[int, int]]
    events: Sequence[Mapping[str, Any]]
    wal: Callable[[], NDArray[np.void]]


@dataclass(frozen=True)
class History:
    """All transactions that are known: `numbers` are the intervals in order, the last one None for what is behind them.

    `commits(n)` are those of an interval. `summary(n)` is what its manifest says of them, None: look into it.
    `unindexed`: intervals that are not in `numbers`, since their transactions could not be indexed, each with the
    latest wall clock of its writes in ns. `partly(numbers)`: likewise those of `numbers` whose WAL was not seen whole.
    `opened`: the number of the interval behind the last boundary.
    """

    numbers: Sequence[int | None]
    commits: Callable[[int | None], Commits]
    summary: Callable[[int | None], Mapping[str, Any] | None] = lambda number: None
    unindexed: Mapping[int, int] = field(default_factory=dict)
    partly: Callable[[Sequence[int | None]], Mapping[int, int]] = lambda numbers: {}
    opened: int = sys.maxsize

    @cached_property
    def doubtful(self) -> Mapping[int, int]:
        """The intervals that may hold transactions which are not known, in order, as `unindexed`."""
        return dict(sorted({**self.unindexed, **self.partly(self.numbers)}.items()))

    def doubtful_within(self, first: int, last: int) -> list[int]:
        """Of the intervals `first` to `last` (both included) those that are `doubtful`."""
        return [number for number in self.doubtful if first <= number <= last]

    def lost(self, number: int | None) -> list[Mapping[str, Any]]:
        """The events of an interval that tell what WAL was not seen whole."""
        return [event for event in self.commits(number).events if is_lost(event)]

    def not_indexed(self, numbers: Iterable[int]) -> str:
        """In words, what is not known of intervals that are `doubtful`."""
        wholly = [number for number in numbers if number in self.unindexed]
        said = []
        if wholly:
            many = f"intervals {', '.join(map(str, wholly))} are" if len(wholly) > 1 else f"interval {wholly[0]} is"
            said.append(f"{many} not indexed")
        for number in numbers:
            if number not in self.unindexed:
                said += self._not_seen(number)
        more = [f"and {len(said) - CANDIDATES} stretches more"] if len(said) > CANDIDATES else []
        return ", ".join(said[:CANDIDATES] + more)

    def _not_seen(self, number: int) -> list[str]:
        try:
            events = self.lost(None if number == self.opened else number)
        except DamageError:  # its manifest tells that there are some
            return [f"interval {number} was not seen whole"]
        stretches = [f"{format_lsn(event['lsn'])} to {format_lsn(event['end_lsn'])}" for event in events]
        return [f"WAL {stretch} in interval {number} was not seen whole" for stretch in stretches]

    def key(self, number: int | None) -> int:
        """An interval's number."""
        return self.opened if number is None else number

    def before(self, number: int | None) -> int:
        """The number of the interval before one, 0 when there is none. Numbers have gaps where some were joined."""
        known = [*self.unindexed, *(each for each in self.numbers if each is not None)]
        return max((each for each in known if each < self.key(number)), default=0)

    def newest_first(self) -> Iterator[tuple[int | None, Commits]]:
        """All intervals with their transactions."""
        for number in reversed(self.numbers):
            yield number, self.commits(number)


def is_lost(event: Mapping[str, Any]) -> bool:
    """Whether an event tells that WAL was not seen whole."""
    return bool(event["kind"] == "lost" and event["lsn"] < event["end_lsn"])


def _nothing(number: int | None) -> Commits:
    raise TargetError(f"no transactions are known of interval {number}")


NO_HISTORY = History((), _nothing)


def is_committed(ends: NDArray[np.void] | Ends) -> NDArray[np.bool_]:
    """Which of them committed."""
    status = ends["status"]
    found: NDArray[np.bool_] = (status == COMMITTED) | (status == COMMITTED_PREPARED)
    return found


def refuse_gap(history: History, gap: Sequence[int], what: str) -> None:
    """Raises UnseenError when there are intervals that may hold what is looked for, and are `doubtful`."""
    if gap:
        raise UnseenError(
            f"{what} where transactions are not known: {history.not_indexed(gap)}",
            "its writes and boundaries can be restored: pgcdp info lists them for --target-write, --target-boundary",
        )


def find_xid(xid: int, history: History, behind: int | None = None) -> tuple[int | None, np.void] | None:
    """The interval where a transaction ended, and its end: the newest one, or the first one not before write `behind`.

    After a rewind in place an xid comes again, on another branch.
    """
    for number in history.numbers if behind is not None else reversed(history.numbers):
        said = history.summary(number)
        if not _may_hold(xid, said):
            continue
        commits = history.commits(number)
        end = _with_xid(xid, commits.ends, said, behind)
        top = commits.tops().get(xid & 0xFFFFFFFF) if end is None else None
        if top is not None:
            end = _with_xid(top, commits.ends, said, behind)
        if end is not None:
            return number, end
    return None


def _with_xid(
    xid: int, ends: NDArray[np.void] | Ends, said: Mapping[str, Any] | None, behind: int | None
) -> np.void | None:
    """The newest of them with an xid of 64 bits, or with the low 32; or the first one not before write `behind`."""
    if isinstance(ends, Ends) and said is not None:
        ends = ends.with_xid(_whole(xid, said))
    xids = ends["xid"]
    rows = np.flatnonzero((xids & np.uint64(0xFFFFFFFF)) == xid if xid < 1 << 32 else xids == xid)
    rows = rows[-1:] if behind is None else rows[ends["write"][rows] >= behind][:1]
    return ends[rows[0]] if len(rows) else None


def pends(xid: int, history: History) -> bool:
    """Whether a transaction (64 bits) was prepared and has not ended, as far as is known."""
    found = find_xid(xid, history)
    return found is not None and found[1]["status"] == PREPARED


def _may_hold(xid: int, said: Mapping[str, Any] | None) -> bool:
    """Whether an interval can have the end of a transaction, as its manifest tells."""
    if said is None or not said["count"]:
        return said is None
    return int(said["min_xid"]) <= _whole(xid, said) <= int(said["max_xid"])


def _whole(xid: int, said: Mapping[str, Any]) -> int:
    """The newest xid of 64 bits with these low 32 that an interval can hold; `xid` itself when it has more."""
    highest = int(said["max_xid"])
    if xid < 1 << 32:
        xid |= highest >> 32 << 32
        xid -= (1 << 32) * (xid > highest)
    return xid


STATUS = {
    COMMITTED: "committed",
    ABORTED: "aborted",
    PREPARED: "prepared",
    COMMITTED_PREPARED: "committed",
    ABORTED_PREPARED: "aborted",
}
"""Status in the JSON contract."""
