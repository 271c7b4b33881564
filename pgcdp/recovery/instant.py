"""Pure: the point just behind or just before a transaction, an LSN, a time or a mark, between two commits of one write.

Group commit puts several commit records into one write. A point between them is that write with its WAL blank from an
LSN on: Postgres's recovery ends there (DESIGN 'Exactly before a transaction').
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import DamageError, TargetError, UnseenError
from pgcdp.records import ABORTED, ABORTED_PREPARED, COMMITTED, COMMITTED_PREPARED, NOT_IN_WRITE, PREPARED
from pgcdp.recovery.ends import Ends
from pgcdp.units import format_lsn, format_time

_DESTROYING = {"drop_database": "database", "drop_tablespace": "tablespace"}
"""Events of transactions that destroy before they commit, and what."""
PAGE = 8192
RECORD_HEADER = 24
"""Of WAL (XLOG_BLCKSZ, SizeOfXLogRecord)."""
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


@dataclass(frozen=True, slots=True)
class Instant:
    """All up to `write`; WAL is blank from `lsn` on, at `blank_at` in `blank_write` (None: all of it is in).

    `until_lsn`: as in RecoveryPoint.
    """

    write: int
    lsn: int | None = None
    blank_at: int | None = None
    blank_write: int | None = None
    note: str | None = None
    until_lsn: int | None = None


@dataclass(frozen=True, slots=True)
class Around:
    """What a point is between: the last transaction in, the first one out, and how many committed behind it.

    `also_out`: those that committed behind it and still before what was asked for. `unknown`: intervals that may hold
    others.
    """

    last_in: np.void | None
    first_out: np.void | None
    out: int
    also_out: list[np.void]
    unknown: list[int]


def _before(end: Mapping[str, Any] | np.void, note: str | None = None) -> Instant:
    """Without a record and all that follows it."""
    held = int(end["write"]) - int(end["late"])
    if int(end["begin_at"]) == NOT_IN_WRITE:  # it begins in an earlier write, and is not whole before this one
        return Instant(held - 1, note=note)
    return Instant(int(end["write"]), int(end["lsn"]), int(end["begin_at"]), held, note)


def _behind(end: Mapping[str, Any] | np.void, note: str | None = None) -> Instant:
    """With a record, without what follows it in the same write."""
    if int(end["end_at"]) == NOT_IN_WRITE:
        return Instant(int(end["write"]), note=note)
    held = int(end["write"]) - int(end["late"])
    return Instant(int(end["write"]), int(end["end_lsn"]), int(end["end_at"]), held, note)


def is_committed(ends: NDArray[np.void] | Ends) -> NDArray[np.bool_]:
    """Which of them committed."""
    status = ends["status"]
    found: NDArray[np.bool_] = (status == COMMITTED) | (status == COMMITTED_PREPARED)
    return found


def at_xid(xid: int, exclusive: bool, history: History) -> Instant:
    """The end of a transaction; `xid` of 64 bits, or the low 32 of the newest that has them."""
    found = _find_xid(xid, history)
    if found is None:
        raise TargetError(f"no transaction {xid} ended in what can be restored", _where_unknown(history))
    number, end = found
    if exclusive:
        instant = before_transaction(end, number, history)
    else:
        instant = _behind(end, "it is prepared there, not committed" if end["status"] == PREPARED else None)
    if end["status"] in (ABORTED, ABORTED_PREPARED):
        undone = f"xid {end['xid']} was rolled back: its rows are in no recovery point, neither before nor behind it"
        return replace(instant, note=undone if instant.note is None else f"{undone}; {instant.note}")
    return instant


def before_transaction(end: np.void, number: int | None, history: History) -> Instant:
    """Just before a transaction that ended in interval `number`: for one that destroys before it commits, before its
    first irreversible effect."""
    unseen = _unseen_of(end, number, history)
    for event in _events_of(end, number, history):
        what = _DESTROYING.get(event["kind"])
        if what is not None and event["xid"] == int(end["xid"]):
            note = f"it drops a {what}: the point is before its first irreversible effect, not before its commit"
            found = _before(event["first"], "; ".join(filter(None, (note, unseen))))
            return replace(found, until_lsn=int(end["lsn"]))
    if end["status"] == COMMITTED_PREPARED:
        return _before(end, f"transaction {end['xid']} is prepared there, with its locks: commit it or roll it back")
    return _before(end, unseen)


def _unseen_of(end: np.void, number: int | None, history: History) -> str | None:
    """That a transaction may have done more than is known, earlier; None: it has not."""
    missed = [event for event in _events_of(end, number, history) if is_lost(event) and event["lsn"] < int(end["lsn"])]
    if missed:
        unseen = f"WAL {format_lsn(missed[0]['lsn'])} to {format_lsn(missed[0]['end_lsn'])} was not seen whole"
    elif (before := history.before(number)) in history.unindexed:
        unseen = f"interval {before} is not indexed"
    else:
        return None
    return f"{unseen}: whether it drops a database, and from where on, is not known"


def _events_of(end: np.void, number: int | None, history: History) -> Iterator[Mapping[str, Any]]:
    """The events of the intervals that a transaction's WAL reaches into."""
    begin = int(end["lsn"]) - int(end["back"])
    for each in reversed(history.numbers[: history.numbers.index(number) + 1]):
        said = history.summary(each)
        if each != number and said is not None and said["wal_to"] <= begin:
            return
        yield from history.commits(each).events


def _find_xid(xid: int, history: History, behind: int | None = None) -> tuple[int | None, np.void] | None:
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
    found = _find_xid(xid, history)
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


def at_lsn(lsn: int, exclusive: bool, history: History) -> Instant:
    """As Postgres: with the first record at or behind `lsn`, or without it. Only ends of transactions can be seen."""
    seen = 0
    for number in history.numbers:
        said = history.summary(number)
        if said is not None and said["wal_to"] < lsn:
            seen = number if number is not None and said["wal_to"] else seen
            continue
        commits = history.commits(number)
        wal = commits.wal()
        reached = wal["to_lsn"] >= lsn if exclusive else wal["to_lsn"] > lsn
        if not reached.any():
            seen = number if number is not None and len(wal) else seen
            continue
        reached_to = int(wal["to_lsn"][np.argmax(reached)])
        if any(event["lsn"] < reached_to and lsn < event["end_lsn"] for event in history.lost(number)):
            refuse_gap(history, [history.key(number)], f"what follows LSN {format_lsn(lsn)} lies")
        if lsn < int(wal["from_lsn"][0]):
            between = history.doubtful_within(seen + 1, history.key(number) - 1)
            refuse_gap(history, between, f"LSN {format_lsn(lsn)} may lie")
            if number == history.numbers[0]:
                break  # before all that was seen
        write = int(wal["durable"][np.argmax(reached)])
        ends = commits.ends
        if not exclusive and (meant := _record_at(lsn, number, history)) is not None:
            return _behind(meant)
        out = np.flatnonzero(ends["lsn"] >= lsn)
        if len(out) and int(ends["write"][out[0]]) <= write:
            return _before(ends[out[0]])
        return Instant(write)
    raise TargetError(f"LSN {format_lsn(lsn)} is not in what can be restored", _lsn_hint(history))


def _record_at(lsn: int, number: int | None, history: History) -> np.void | None:
    """The first record at or behind an LSN that interval `number` reaches, if it surely is the end of a transaction."""
    ends = history.commits(number).ends
    inside = ends[(ends["lsn"] < lsn) & (ends["end_lsn"] > lsn)]
    begin = int(inside["end_lsn"][0]) if len(inside) else lsn
    for each in history.numbers[history.numbers.index(number) :]:
        commits = history.commits(each)
        for event in history.lost(each):
            if event["end_lsn"] > begin and (event["lsn"] <= begin or _is_first_behind(begin, event["lsn"])):
                refuse_gap(history, [history.key(each)], f"what follows LSN {format_lsn(lsn)} lies")
        behind, wal = commits.ends[commits.ends["lsn"] >= begin], commits.wal()
        if not len(wal) or int(wal["to_lsn"][-1]) < begin + RECORD_HEADER:  # no room for a record
            continue
        if number is not None and int(wal["from_lsn"][0]) > begin:
            between = history.doubtful_within(number + 1, history.key(each) - 1)
            refuse_gap(history, between, f"what follows LSN {format_lsn(lsn)} may lie")
        close = len(behind) and _is_first_behind(begin, int(behind["lsn"][0]))
        return behind[0] if close else None
    if number is not None:
        refuse_gap(
            history, history.doubtful_within(number + 1, history.opened), f"what follows LSN {format_lsn(lsn)} may lie"
        )
    return None


def _is_first_behind(lsn: int, record: int) -> bool:
    """Whether a record is surely the first one at or behind an LSN: there is no room for another between them."""
    between = record - lsn
    if between and record // PAGE > lsn // PAGE:
        between -= record % PAGE if record % PAGE in (24, 40) else 24  # the page's header
    return between < RECORD_HEADER


def refuse_gap(history: History, gap: Sequence[int], what: str) -> None:
    """Raises UnseenError when there are intervals that may hold what is looked for, and are `doubtful`."""
    if gap:
        raise UnseenError(
            f"{what} where transactions are not known: {history.not_indexed(gap)}",
            "its writes and boundaries can be restored: pgcdp info lists them for --target-write, --target-boundary",
        )


def _lsn_hint(history: History) -> str:
    bounds = [commits.wal() for _, commits in history.newest_first()]
    bounds = [wal for wal in bounds if len(wal)]
    if not bounds:
        return "no WAL was captured yet"
    first, last = format_lsn(int(bounds[-1]["from_lsn"][0])), format_lsn(int(bounds[0]["to_lsn"][-1]))
    return f"--target-lsn takes {first} to {last}; pgcdp log lists transactions with theirs"


def at_time(time_ns: int, exclusive: bool, history: History) -> Instant | None:
    """Just before the first commit in WAL order with a later time (exclusive: not earlier); None: there is none.

    Raises TargetError when commits with earlier times follow that one: several points are meant then.
    """
    last = time_ns // 1000 - (1 if exclusive else 0)
    unseen = [number for number, latest in history.doubtful.items() if latest // 1000 > last]
    first: tuple[int | None, np.void] | None = None
    earlier: list[np.void] = []
    for number in history.numbers:
        said = history.summary(number)
        if said is not None and (not said["count"] or (first is None and said["max_time_us"] <= last)):
            continue
        if said is not None and first is not None and said["min_time_us"] > last:
            continue
        commits = history.commits(number)
        ends = commits.ends[is_committed(commits.ends)]
        later = np.flatnonzero(ends["time_us"] > last)
        behind = ends
        if first is None:
            if not len(later):
                continue
            first = number, ends[later[0]]
            key, lost = history.key(number), _lost_before(int(first[1]["lsn"]), number, history)
            refuse_gap(history, [each for each in unseen if each < key or (each == key and lost)], "that time may lie")
            behind = ends[later[0] + 1 :]
        earlier += list(behind[behind["time_us"] <= last])
    if first is None:
        refuse_gap(history, unseen, "that time may lie")
        return None
    if earlier:
        raise TargetError(_ambiguous(time_ns, first[1], earlier), _ambiguous_hint(first[1], earlier))
    return before_transaction(first[1], first[0], history)


def _lost_before(lsn: int, number: int | None, history: History) -> bool:
    """Whether WAL of an interval before an LSN was not seen whole."""
    return any(event["lsn"] < lsn for event in history.lost(number))


def _ambiguous(time_ns: int, first: np.void, earlier: list[np.void]) -> str:
    named = ", ".join(_told(end) for end in earlier[:CANDIDATES])
    more = f" and {len(earlier) - CANDIDATES} more" if len(earlier) > CANDIDATES else ""
    return (
        f"{format_time(time_ns)} is ambiguous: the first later commit is {_told(first)}, "
        f"but behind it follow earlier ones: {named}{more}"
    )


def _ambiguous_hint(first: np.void, earlier: list[np.void]) -> str:
    return (
        f"choose one: --target-xid {first['xid']} --exclusive is before all of them, "
        f"--target-xid {earlier[-1]['xid']} behind the last"
    )


def _told(end: np.void) -> str:
    return f"xid {end['xid']} at {format_time(int(end['time_us']) * 1000)}"


@dataclass
class _Named:
    """What bears a name."""

    write: int
    event: Mapping[str, Any]
    end: np.void | None = None


def at_name(name: str, exclusive: bool, history: History) -> Instant:
    """The newest mark or restore point of that name."""
    found = [each for each in marks(history) if each.event["name"] == name]
    if not found:
        hint = _names_hint(history)
        if history.doubtful:
            hint = f"{history.not_indexed(history.doubtful)}: it may be there; {hint}"
        raise TargetError(f'no mark or restore point "{name}" in what can be restored', hint)
    named = found[0]
    note = f'{len(found)} marks are called "{name}"; this is the newest one' if len(found) > 1 else None
    if history.doubtful:
        unseen = history.not_indexed(history.doubtful)
        note = f"{note or 'another mark of that name may exist'}: {unseen}"
    if named.event["lsn"] is None:
        return Instant(named.write - (1 if exclusive else 0), note=note)
    record = named.event if named.end is None else named.end
    return _before(record, note) if exclusive else _behind(record, note)


def marks(history: History) -> list[_Named]:
    """Marks and restore points, newest first. One in a transaction counts when that commits, where it does."""
    found = []
    for number in history.numbers:
        said = history.summary(number)
        if said is not None and not said.get("marks", 1):
            continue
        commits = history.commits(number)
        for event in commits.events:
            if event["kind"] not in ("mark", "restore_point"):
                continue
            if not event.get("xid"):
                found.append(_Named(int(event["write"]), event))
                continue
            ended = _find_xid(int(event["xid"]), history, event["write"])
            if ended is not None and ended[1]["status"] in (COMMITTED, COMMITTED_PREPARED):
                found.append(_Named(int(ended[1]["write"]), event, ended[1]))
    return sorted(found, key=lambda each: (each.write, each.event["lsn"] or 0), reverse=True)


def _names_hint(history: History) -> str:
    names = list(dict.fromkeys(each.event["name"] for each in marks(history)))[:CANDIDATES]
    return f"there are: {', '.join(names)}" if names else "no mark was set; pgcdp mark NAME sets one"


def _where_unknown(history: History) -> str:
    if history.doubtful:
        return f"{history.not_indexed(history.doubtful)}; pgcdp log lists the other transactions"
    return "pgcdp log lists transactions, newest first"


def around(write: int, lsn: int | None, history: History, until_lsn: int | None = None) -> Around:
    """What a point is between; `until_lsn`: where what was asked for is, when that is later."""
    last_in: np.void | None = None
    first_out: np.void | None = None
    out = 0
    also: list[np.void] = []
    doubt_from = 0  # the interval from which on others may be
    first_in: int | None = None  # the interval whose first transaction that is out was not looked at
    for number in reversed(history.numbers):
        counted = _committed_behind(history.summary(number), write, until_lsn or 0)
        if counted is not None:
            out += counted
            first_in = number if counted else first_in
            continue
        ends = history.commits(number).ends
        committed = is_committed(ends)
        within = ends["write"] < write
        within |= (ends["write"] == write) & ((ends["lsn"] < lsn) if lsn is not None else True)
        outside = np.flatnonzero(committed & ~within)
        out += len(outside)
        if len(outside):
            first_out, first_in = ends[outside[0]], None
            also[:0] = ends[outside[ends["lsn"][outside] < (until_lsn or 0)]]
        inside = np.flatnonzero(committed & within)
        if len(inside):
            last_in = ends[inside[-1]]
            seen = all(event["end_lsn"] <= int(last_in["lsn"]) for event in history.lost(number))
            doubt_from = history.key(number) + 1 if seen else history.key(number)
            break
    if first_in is not None:
        ends = history.commits(first_in).ends
        first_out = ends[np.argmax(is_committed(ends))]
    return Around(last_in, first_out, out, also, history.doubtful_within(doubt_from, history.opened))


def _committed_behind(said: Mapping[str, Any] | None, write: int, until_lsn: int) -> int | None:
    """How many committed in an interval, when all of them are behind `write` and `until_lsn`; None: look into it."""
    if said is None or not said["count"]:
        return None if said is None else 0
    if "committed" not in said or said["min_write"] <= write or said["min_lsn"] < until_lsn:
        return None
    return int(said["committed"])


STATUS = {
    COMMITTED: "committed",
    ABORTED: "aborted",
    PREPARED: "prepared",
    COMMITTED_PREPARED: "committed",
    ABORTED_PREPARED: "aborted",
}
"""Status in the JSON contract."""
