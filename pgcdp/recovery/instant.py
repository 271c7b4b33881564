"""Pure: the point just behind or just before a transaction, an LSN or a time, also between two commits of one write.

Group commit puts several commit records into one write. A point between them is that write with its WAL blank from an
LSN on: Postgres's recovery ends there (DESIGN 'Exactly before a transaction').
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pgcdp.errors import TargetError
from pgcdp.records import ABORTED, ABORTED_PREPARED, COMMITTED_PREPARED, NOT_IN_WRITE, PREPARED
from pgcdp.recovery.commits import CANDIDATES, History, find_xid, is_committed, is_lost, refuse_gap
from pgcdp.units import format_lsn, format_time

_DESTROYING = {"drop_database": "database", "drop_tablespace": "tablespace"}
"""Events of transactions that destroy before they commit, and what."""
PAGE = 8192
RECORD_HEADER = 24
"""Of WAL (XLOG_BLCKSZ, SizeOfXLogRecord)."""


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


def just_before(end: Mapping[str, Any] | np.void, note: str | None = None) -> Instant:
    """Without a record and all that follows it."""
    held = int(end["write"]) - int(end["late"])
    if int(end["begin_at"]) == NOT_IN_WRITE:  # it begins in an earlier write, and is not whole before this one
        return Instant(held - 1, note=note)
    return Instant(int(end["write"]), int(end["lsn"]), int(end["begin_at"]), held, note)


def just_behind(end: Mapping[str, Any] | np.void, note: str | None = None) -> Instant:
    """With a record, without what follows it in the same write."""
    if int(end["end_at"]) == NOT_IN_WRITE:
        return Instant(int(end["write"]), note=note)
    held = int(end["write"]) - int(end["late"])
    return Instant(int(end["write"]), int(end["end_lsn"]), int(end["end_at"]), held, note)


def at_xid(xid: int, exclusive: bool, history: History) -> Instant:
    """The end of a transaction; `xid` of 64 bits, or the low 32 of the newest that has them."""
    found = find_xid(xid, history)
    if found is None:
        raise TargetError(f"no transaction {xid} ended in what can be restored", _where_unknown(history))
    number, end = found
    if exclusive:
        instant = before_transaction(end, number, history)
    else:
        instant = just_behind(end, "it is prepared there, not committed" if end["status"] == PREPARED else None)
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
            found = just_before(event["first"], "; ".join(filter(None, (note, unseen))))
            return replace(found, until_lsn=int(end["lsn"]))
    if end["status"] == COMMITTED_PREPARED:
        return just_before(
            end, f"transaction {end['xid']} is prepared there, with its locks: commit it or roll it back"
        )
    return just_before(end, unseen)


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
            return just_behind(meant)
        out = np.flatnonzero(ends["lsn"] >= lsn)
        if len(out) and int(ends["write"][out[0]]) <= write:
            return just_before(ends[out[0]])
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


def _where_unknown(history: History) -> str:
    if history.doubtful:
        return f"{history.not_indexed(history.doubtful)}; pgcdp log lists the other transactions"
    return "pgcdp log lists transactions, newest first"
