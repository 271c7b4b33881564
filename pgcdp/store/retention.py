"""Pure: what a policy lets go of, of what a store holds. Nothing is touched here (`recovery.expiring` does that).

There are three ways to let go, from the finest to the coarsest:

- an interval is *thinned*: its single writes go, both its boundaries stay;
- intervals that follow each other are *joined* to one: the boundaries between them go;
- the *base* moves on: all before a boundary goes.

A plan is made of boundaries that stay. What a boundary stays for: its age (all of them, the newest of each hour, of
each day), a pin (a kept mark, an open view), that it is the newest verified one, an interval beside it that keeps its
single writes, or a *seam*: what lies on its two sides cannot be told as one interval, since a rewind, another timeline
or WAL that went back lies between, or only one of them has a transaction index.

Ages count back from the newest boundary (not later than now): a cluster that stands still loses nothing by it. An hour
is looked at as a whole, in UTC: its boundaries go together when all of it is old enough. So each interval is joined
once into an hour and once into a day, and a plan that was carried out leaves nothing to be done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pgcdp.records import BLOCK, Boundary, Interval, Span

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS
AT_ONCE = 32
"""So many intervals are thinned to make room, then it is looked how much came back: before, it is an estimate."""


@dataclass(frozen=True, slots=True)
class Policy:
    """For how long, in seconds, what stays; None: for ever. `least_free`: bytes that shall be free in the store."""

    writes: float | None = None
    boundaries: float | None = None
    hourly: float | None = None
    daily: float | None = None
    least_free: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing ever goes."""
        return self == Policy()


@dataclass(frozen=True, slots=True)
class Pins:
    """What stays whatever its age: `points` by write number; `verified`, the newest verified boundary.

    `at`: the boundary of the image. The interval that ends there, and all behind it, are not touched.
    """

    at: int
    points: frozenset[int] = frozenset()
    verified: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order: move the base to boundary `base` (None: it stays), join, thin."""

    base: int | None = None
    joins: tuple[Span, ...] = ()
    thin: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.base is not None or bool(self.joins or self.thin)


@dataclass(frozen=True)
class Holding:
    """What a store holds: the oldest boundary and the intervals that follow it, joined and single.

    `indexed`: numbers of those whose transactions are known.
    """

    base: Boundary
    intervals: Sequence[Interval]
    indexed: Collection[int] = field(default_factory=frozenset)

    def boundaries(self) -> list[Boundary]:
        """All that can be restored, in order."""
        return [self.base, *(each.boundary for each in self.intervals)]


def plan(holding: Holding, policy: Policy, pins: Pins, now_ns: int) -> Plan:
    """What of a store's holding a policy lets go of. `least_free` is not looked at (`relieve`)."""
    boundaries = holding.boundaries()
    now = min(now_ns, boundaries[-1].time_ns)
    touched = [each for each in holding.intervals if each.number < pins.at]
    whole = {each.number for each in touched if _keeps_writes(each, policy, pins, now)}
    stay = _by_age(boundaries, policy, now) | _pinned(holding, pins)
    stay |= _ends(each for each in holding.intervals if each.number >= pins.at or each.number in whole)
    base = min(stay)
    behind = [each for each in touched if each.first > base]
    joins = _joins(behind, stay | _seams(behind, holding.indexed))
    gone = {number for span in joins for number in range(span.first, span.last + 1)}
    thin = [
        each.number for each in behind
        if each.restorable_by_write and each.number not in whole and each.number not in gone
    ]  # fmt: skip
    return Plan(base if base > holding.base.number else None, tuple(joins), tuple(thin))


def relieve(holding: Holding, pins: Pins, missing: int, may_thin: bool = True) -> Plan:
    """What to let go of so that about `missing` bytes come back, the oldest first; never what is pinned.

    Single writes go before boundaries do (without `may_thin` they stay: thinning needs room first). The plan may give
    less than is missing: look again when it was carried out. An empty one says that nothing else may go.
    """
    if missing <= 0:
        return Plan()
    touched = [each for each in holding.intervals if each.number < pins.at]
    thin, back = list[int](), 0
    for each in touched if may_thin else ():
        if back >= missing or len(thin) == AT_ONCE:
            break
        if each.restorable_by_write and not _holds_pin(each, pins):
            thin.append(each.number)
            back += max(1, thinned_bytes(each))
    if thin:  # what that gives is seen before anything else goes
        return Plan(thin=tuple(thin))
    stay = _pinned(holding, pins) | _ends(each for each in holding.intervals if each.number >= pins.at)
    base = None
    for each in touched:
        if each.number > min(stay) or back >= missing:
            break
        base, back = each.number, back + sum(each.stored.values())
    return Plan(base)


def thinned_bytes(interval: Interval) -> int:
    """About how many bytes come back when an interval is thinned: its writes, without those that its end is made of."""
    if not interval.restorable_by_write or not interval.bytes_written:
        return 0
    kept = min(1.0, interval.blocks_changed * BLOCK / interval.bytes_written)
    return int(interval.stored["writes"] * (1 - kept))


def _keeps_writes(interval: Interval, policy: Policy, pins: Pins, now: int) -> bool:
    """Whether an interval's single writes stay, if they are there."""
    if not interval.restorable_by_write:
        return False
    return _younger(interval.boundary.time_ns, policy.writes, now) or _holds_pin(interval, pins)


def _younger(time_ns: int, seconds: float | None, now: int) -> bool:
    return seconds is None or time_ns > now - int(seconds * 10**9)


def _holds_pin(interval: Interval, pins: Pins) -> bool:
    """Whether a pinned point is one of an interval's single writes."""
    return any(interval.from_write <= point < interval.to_write for point in pins.points)


def _by_age(boundaries: Sequence[Boundary], policy: Policy, now: int) -> set[int]:
    hour, day = _newest(boundaries, HOUR_NS), _newest(boundaries, DAY_NS)
    found = set()
    for each in boundaries:
        end_of_hour, end_of_day = ((each.time_ns // size + 1) * size for size in (HOUR_NS, DAY_NS))
        if (
            _younger(end_of_hour, policy.boundaries, now)
            or (each.number in hour and _younger(end_of_day, policy.hourly, now))
            or (each.number in day and _younger(end_of_day, policy.daily, now))
        ):
            found.add(each.number)
    return found


def _newest(boundaries: Sequence[Boundary], size: int) -> set[int]:
    """The newest boundary of each period."""
    return set({each.time_ns // size: each.number for each in boundaries}.values())


def _pinned(holding: Holding, pins: Pins) -> set[int]:
    """The boundaries that pins need: the pinned one itself, or both ends of the interval where the point lies."""
    found = {each.number for each in holding.boundaries() if each.write in pins.points or each.number == pins.verified}
    return found | _ends(each for each in holding.intervals if _holds_pin(each, pins))


def _ends(intervals: Iterable[Interval]) -> set[int]:
    """The boundaries where intervals begin and end."""
    return {number for each in intervals for number in (each.first - 1, each.number)}


def _seams(intervals: Sequence[Interval], indexed: Collection[int]) -> set[int]:
    """Boundaries between intervals that cannot be told as one."""
    return {one.number for one, other in pairwise(intervals) if not _may_join(one, other, indexed)}


def _may_join(one: Interval, other: Interval, indexed: Collection[int]) -> bool:
    return (
        not other.rewinds
        and one.boundary.timeline == other.boundary.timeline
        and one.boundary.checkpoint_lsn < other.boundary.checkpoint_lsn
        and (one.number in indexed) == (other.number in indexed)
    )


def _joins(intervals: Sequence[Interval], stay: Collection[int]) -> list[Span]:
    """Runs of intervals between boundaries that stay, where they are more than one."""
    found: list[Span] = []
    run: list[Interval] = []
    for each in intervals:
        run.append(each)
        if each.number in stay:
            if len(run) > 1:
                found.append(Span(run[0].first, each.number))
            run = []
    return found
