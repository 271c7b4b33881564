"""Pure: what a user asks for, and what exists, to a recovery point.

A time means the last write before the first write with a later time. Wall clocks jump: with this meaning nothing that
happened after the time by the clock of its own record is ever in, and the point is the same however it is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import BugError, TargetError
from pgcdp.records import Boundary, Interval, RecoveryPoint, Target
from pgcdp.units import format_time


@dataclass(frozen=True, slots=True)
class Listing:
    """What exists. `base` is the oldest boundary that can be restored (0: the end of the baseline).

    `intervals` follow `base` without gaps; their `to_time_ns` is the latest wall clock of their writes.
    `newest_write` is the newest restorable write, which may still lie in the open interval or the journal.
    `times(n)` gives the wall clock (int64 ns) of each write of interval n, `times(None)` of those behind the last
    boundary, up to `newest_write`. Until `quiet_until_ns` it is known that nothing else was written (the present while
    capture runs), so that a time between the newest write and that is the newest write.
    """

    base: Boundary
    intervals: Sequence[Interval]
    newest_write: int
    times: Callable[[int | None], NDArray[np.int64]]
    quiet_until_ns: int = 0


def resolve(target: Target, listing: Listing) -> RecoveryPoint:
    """The recovery point of a target; at boundary k it has interval=k and boundary=k.

    Raises TargetError when there is none, saying what was asked, what exists and what to type.
    """
    _check(listing)
    if target.kind == "newest":
        return _at(listing, listing.newest_write)
    if target.kind == "write":
        return _by_write(target.value, listing)
    if target.kind == "boundary":
        return _by_boundary(target.value, listing)
    return _by_time(target.value, listing)


def window(listing: Listing) -> tuple[RecoveryPoint, RecoveryPoint]:
    """The oldest and the newest recovery point: the recovery window."""
    _check(listing)
    return _at(listing, listing.base.write), _at(listing, listing.newest_write)


def _check(listing: Listing) -> None:
    number, write = listing.base.number, listing.base.write
    for interval in listing.intervals:
        if interval.number != number + 1 or interval.from_write != write + 1:
            raise BugError(f"interval {interval.number} does not follow boundary {number} at write {write}")
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
            times = listing.times(interval.number)
            return RecoveryPoint(write, interval.number, int(times[write - interval.from_write]))
    first = _boundaries(listing)[-1].write + 1
    return RecoveryPoint(write, None, int(listing.times(None)[write - first]))


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


def _by_boundary(number: int, listing: Listing) -> RecoveryPoint:
    boundaries = _boundaries(listing)
    for boundary in boundaries:
        if boundary.number == number:
            return RecoveryPoint(boundary.write, number, boundary.time_ns, number)
    first, last = boundaries[0].number, boundaries[-1].number
    where = (
        "does not exist yet" if number > last else "cannot be restored any more" if number >= 0 else "does not exist"
    )
    raise TargetError(
        f"boundary {number} {where}, there are boundaries {first} to {last}; {_exists(listing)}",
        f"--target-boundary takes {first} to {last}; pgcdp info lists them with their times",
    )


def _by_time(time_ns: int, listing: Listing) -> RecoveryPoint:
    hint = "pgcdp info lists the intervals with their times; leave the target out for the newest write"
    if time_ns < listing.base.time_ns:
        raise TargetError(
            f"{format_time(time_ns)} lies before the oldest recovery point, {_exists(listing)}",
            hint.replace("; leave", "; --target-boundary " + f"{listing.base.number} is the oldest; leave"),
        )
    for interval in listing.intervals:
        if interval.to_time_ns > time_ns:
            return _before_later(time_ns, listing, interval.from_write, listing.times(interval.number))
    first = _boundaries(listing)[-1].write + 1
    times = listing.times(None)
    if len(times) and int(times.max()) > time_ns:
        return _before_later(time_ns, listing, first, times)
    newest = _at(listing, listing.newest_write)
    latest = max(
        [
            listing.quiet_until_ns,
            listing.base.time_ns,
            newest.time_ns,
            *(i.to_time_ns for i in listing.intervals),
            *times.tolist(),
        ]
    )
    if time_ns > latest:
        raise TargetError(f"{format_time(time_ns)} is later than the newest write, {_exists(listing)}", hint)
    return newest


def _before_later(time_ns: int, listing: Listing, first: int, times: NDArray[np.int64]) -> RecoveryPoint:
    later = times > time_ns
    if not later.any():
        raise BugError(f"no write from {first} on is later than {format_time(time_ns)}, its interval says otherwise")
    return _at(listing, first + int(np.argmax(later)) - 1)
