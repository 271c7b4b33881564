"""Pure: what a user asks for, and what exists, to a recovery point.

Writes, boundaries and the newest are looked up here; what transactions say is in `recovery.instant`, and what bears a
name in `recovery.named`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import BugError, DamageError, TargetError
from pgcdp.records import Boundary, Interval, RecoveryPoint, Target
from pgcdp.recovery.commits import NO_HISTORY, History
from pgcdp.recovery.instant import Instant, at_lsn, at_time, at_xid
from pgcdp.recovery.named import at_name
from pgcdp.units import format_time


@dataclass(frozen=True, slots=True)
class Listing:
    """What exists. `base` is the oldest boundary that can be restored (0: the end of the baseline).

    `intervals` follow `base` without gaps, some of them joined; their `to_time_ns` is the latest wall clock of their
    writes.
    `newest_write` is the newest restorable write, which may still lie in the open interval or the journal.
    `times(n)` gives the wall clock (int64 ns) of each write of interval n, `times(None)` of those behind the last
    boundary, up to `newest_write`. Until `quiet_until_ns` it is known that nothing else was written (the present while
    capture runs), so that a time between the newest write and that is the newest write. `history`: the transactions.
    `missing(n, m)` names what should be between boundary n and interval m.
    """

    base: Boundary
    intervals: Sequence[Interval]
    newest_write: int
    times: Callable[[int | None], NDArray[np.int64]]
    quiet_until_ns: int = 0
    history: History = NO_HISTORY
    missing: Callable[[int, int], object] | None = None


def resolve(target: Target, listing: Listing) -> RecoveryPoint:
    """The recovery point of a target; at boundary k it has interval=k and boundary=k.

    Raises TargetError when there is none, saying what was asked, what exists and what to type.
    """
    _check(listing)
    match target.kind:
        case "newest":
            return _at(listing, listing.newest_write)
        case "write":
            return _by_write(target.value - target.exclusive, listing)
        case "boundary":
            return _by_boundary(target, listing)
        case "time":
            return _by_time(target, listing)
        case "xid":
            return _by_instant(at_xid(target.value, target.exclusive, listing.history), listing)
        case "lsn":
            return _by_instant(at_lsn(target.value, target.exclusive, listing.history), listing)
        case "name":
            return _by_instant(at_name(target.name, target.exclusive, listing.history), listing)


def _by_instant(instant: Instant, listing: Listing) -> RecoveryPoint:
    point = _by_write(instant.write, listing)
    boundary = point.boundary if instant.lsn is None else None
    return replace(
        point,
        boundary=boundary,
        lsn=instant.lsn,
        blank_at=instant.blank_at,
        blank_write=instant.blank_write,
        note=instant.note,
        until_lsn=instant.until_lsn,
    )


def window(listing: Listing) -> tuple[RecoveryPoint, RecoveryPoint]:
    """The oldest and the newest recovery point: the recovery window."""
    _check(listing)
    return _at(listing, listing.base.write), _at(listing, listing.newest_write)


def _check(listing: Listing) -> None:
    """Raises DamageError when something is missing between what is there."""
    number, write = listing.base.number, listing.base.write
    for interval in listing.intervals:
        if interval.first != number + 1 or interval.from_write != write + 1:
            what = "intervals are missing before it"
            if interval.first == number + 1:
                what = "one of both is not of this store"
            elif listing.missing is not None:
                what = f"{listing.missing(number, interval.first)} is missing (offset 0)"
            raise DamageError(
                f"interval {interval.number} from write {interval.from_write} does not follow boundary {number} at "
                f"write {write}: {what}",
                "bring it back from a copy of the store; pgcdp check --full tells what else is damaged",
            )
        number, write = interval.number, interval.to_write
    if listing.newest_write < write:
        raise BugError(f"the newest write {listing.newest_write} lies before boundary {number} at write {write}")


def _boundaries(listing: Listing) -> list[Boundary]:
    return [listing.base, *(interval.boundary for interval in listing.intervals)]


def _at(listing: Listing, write: int) -> RecoveryPoint:
    """The point at a write of the window."""
    for boundary in _boundaries(listing):
        if boundary.write == write:
            return RecoveryPoint(write, boundary.number, boundary.time_ns, boundary.number)
    for interval in listing.intervals:
        if interval.from_write <= write <= interval.to_write:
            if interval.covers > 1:  # when it was written, is not known any more
                raise let_go(write, interval, listing)
            times = listing.times(interval.number)
            return RecoveryPoint(write, interval.number, int(times[write - interval.from_write]))
    first = _boundaries(listing)[-1].write + 1
    return RecoveryPoint(write, None, int(listing.times(None)[write - first]))


def refuse_let_go(point: RecoveryPoint, listing: Listing) -> None:
    """Raises TargetError for a point that needs single writes of which retention let go; it names the nearest points.

    One whose WAL is blank from an LSN on needs the write that holds that.
    """
    for interval in listing.intervals:
        if interval.restorable_by_write:
            continue
        if interval.from_write <= point.write < interval.to_write:
            raise let_go(point.write, interval, listing)
        if interval.from_write <= (point.blank_write or 0) <= interval.to_write:
            raise let_go(point.blank_write or 0, interval, listing)


def let_go(write: int, interval: Interval, listing: Listing) -> TargetError:
    """What is said of a write whose interval can only be restored at its ends."""
    before = next(each for each in _boundaries(listing) if each.number == interval.first - 1)
    here = f"write {write} lies between boundaries {before.number} and {interval.number}"
    return TargetError(f"{here}, and retention let go of what lies between them", _nearest(before, interval.boundary))


def _nearest(before: Boundary, behind: Boundary) -> str:
    told = [f"--target-boundary {each.number} ({format_time(each.time_ns)})" for each in (before, behind)]
    return f"{told[0]} is the nearest before it, {told[1]} the nearest behind it"


def _exists(listing: Listing) -> str:
    first, last = window(listing)
    return (
        f"writes {first.write} to {last.write} can be restored, "
        f"{format_time(first.time_ns)} to {format_time(last.time_ns)}"
    )


def _by_write(write: int, listing: Listing) -> RecoveryPoint:
    if write < 1:
        raise TargetError(f"write {write} does not exist, {_exists(listing)}", _type_write(listing))
    if write < listing.base.write:
        raise TargetError(
            f"write {write} lies before the oldest recovery point, {_exists(listing)}", _type_write(listing)
        )
    if write > listing.newest_write:
        raise TargetError(f"write {write} is behind the newest one, {_exists(listing)}", _type_write(listing))
    return _at(listing, write)


def _type_write(listing: Listing) -> str:
    return f"--target-write takes {listing.base.write} to {listing.newest_write}; pgcdp info lists the intervals"


def _by_boundary(target: Target, listing: Listing) -> RecoveryPoint:
    number = target.value
    boundaries = _boundaries(listing)
    for boundary in boundaries:
        if boundary.number == number:
            return _by_write(boundary.write - target.exclusive, listing)
    first, last = boundaries[0].number, boundaries[-1].number
    for interval in listing.intervals:
        if interval.first <= number < interval.number:
            before = next(each for each in boundaries if each.number == interval.first - 1)
            raise TargetError(f"retention let go of boundary {number}", _nearest(before, interval.boundary))
    where = (
        "does not exist yet" if number > last else "cannot be restored any more" if number >= 0 else "does not exist"
    )
    raise TargetError(
        f"boundary {number} {where}, there are boundaries {first} to {last}; {_exists(listing)}",
        f"--target-boundary takes {first} to {last}; pgcdp info lists them with their times",
    )


def _by_time(target: Target, listing: Listing) -> RecoveryPoint:
    """As Postgres means it: just before the first commit in WAL order with a later time."""
    time_ns = target.value
    hint = "pgcdp info lists the intervals with their times; leave the target out for the newest write"
    if time_ns < listing.base.time_ns:
        raise TargetError(
            f"{format_time(time_ns)} lies before the oldest recovery point, {_exists(listing)}",
            hint.replace("; leave", "; --target-boundary " + f"{listing.base.number} is the oldest; leave"),
        )
    instant = at_time(time_ns, target.exclusive, listing.history)
    if instant is not None:
        return _by_instant(instant, listing)
    newest = _at(listing, listing.newest_write)
    latest = max([listing.quiet_until_ns, newest.time_ns, *(interval.to_time_ns for interval in listing.intervals)])
    if time_ns > latest:
        raise TargetError(f"{format_time(time_ns)} is later than the newest write, {_exists(listing)}", hint)
    return newest
