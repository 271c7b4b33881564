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
once into an hour and once into a day, and a plan that was carried out leaves nothing to be done. Where days go but
cannot be dropped, since a pin is older, they are joined when there are many (`_of_like_size`).

Clocks are wrong at times. A boundary whose time cannot be right counts as young as it may be (`times_of`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from pgcdp.records import BLOCK, Boundary, Interval, Span

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS
Step = tuple[Literal["base", "join", "thin"], Span]
"""One step of a plan: what is done, and to which intervals (`base`: the one that ends at the new oldest boundary)."""


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

    `at`: the boundary of the image. The interval that ends there, and all behind it, are not touched. `shown`: those of
    the points that open views show; they read what lies behind, so that joining it gives nothing back.
    """

    at: int
    points: frozenset[int] = frozenset()
    verified: int | None = None
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order: move the base to boundary `base` (None: it stays), join, thin."""

    base: int | None = None
    joins: tuple[Span, ...] = ()
    thin: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.base is not None or bool(self.joins or self.thin)

    def within(self, shown: Iterable[Plan]) -> Plan:
        """What of this plan lets go of no more than plans that were shown."""
        plans = list(shown)
        base = max((each.base for each in plans if each.base is not None), default=None)
        gone = {number for each in plans for number in each.thin}
        gone |= {number for each in plans for span in each.joins for number in range(span.first, span.last + 1)}
        joins = {span for each in plans for span in each.joins}
        return Plan(
            None if base is None or self.base is None or self.base > base else self.base,
            tuple(span for span in self.joins if span in joins or span.last <= (base or 0)),
            tuple(number for number in self.thin if number in gone or number <= (base or 0)),
        )


@dataclass(frozen=True)
class Holding:
    """What a store holds: the oldest boundary and the intervals that follow it, joined and single.

    `indexed`: numbers of those whose transactions are known. `latest_ns`: the latest time of what was let go of.
    """

    base: Boundary
    intervals: Sequence[Interval]
    indexed: Collection[int] = field(default_factory=frozenset)
    latest_ns: int = 0

    def boundaries(self) -> list[Boundary]:
        """All that can be restored, in order."""
        return [self.base, *(each.boundary for each in self.intervals)]


def times_of(holding: Holding, now_ns: int) -> dict[int, int]:
    """When each boundary was, by number; they never go back, and none is later than now.

    A time later than now was of a clock that was ahead; one before something older, of a clock that was behind (1970,
    until the network told it). Such a boundary is as young as the next one that may be right, or as now: nobody knows.
    """
    reached, right = holding.latest_ns if holding.latest_ns <= now_ns else 0, list[bool]()
    for each, latest in [(holding.base, 0), *((one.boundary, one.to_time_ns) for one in holding.intervals)]:
        reached = max(reached, latest if latest <= now_ns else 0)
        right.append(reached <= each.time_ns <= now_ns)
        reached = max(reached, each.time_ns if each.time_ns <= now_ns else 0)
    found, after = dict[int, int](), now_ns
    for each, is_right in zip(reversed(holding.boundaries()), reversed(right), strict=True):
        after = each.time_ns if is_right else after
        found[each.number] = after
    return found


def choose(
    holding: Holding, policy: Policy, pins: Pins, now_ns: int, missing: int = 0, *,
    may_make: bool = True, may_join: bool = True, avoid: Collection[Step] = (),
) -> tuple[list[Plan], bool]:  # fmt: skip
    """All that would go now, in stages: what the policy says, and when that is done, what makes room; and which it is.

    `missing`: bytes that shall come back. Without `may_make` nothing is made that needs room, without
    `may_join` nothing is joined. `avoid`: what could not be done. This is the one place where it is decided: for who
    looks and for who does it.
    """
    found = plan(holding, policy, pins, now_ns, avoid, may_join=may_join)
    if not may_make:
        found = Plan(found.base)
    if found:
        return [found], False
    return relieve(holding, pins, missing, may_make=may_make, may_join=may_join, avoid=avoid), True


def plan(
    holding: Holding, policy: Policy, pins: Pins, now_ns: int, avoid: Collection[Step] = (), *, may_join: bool = True
) -> Plan:
    """What of a store's holding a policy lets go of. `least_free` is not looked at (`relieve`).

    An interval that cannot be thinned is joined with no other; where a join cannot be made, its parts are thinned.
    """
    times = times_of(holding, now_ns)
    now = max(times.values())
    touched = [each for each in holding.intervals if each.number < pins.at]
    whole = {each.number for each in touched if _keeps_writes(each, policy, pins, now, times)}
    stay = _by_age(times, policy, now) | _pinned(holding, pins)
    stay |= _ends(each for each in holding.intervals if each.number >= pins.at or each.number in whole)
    base = _base(holding, min(stay), avoid)
    behind = [each for each in touched if each.first > base]
    runs = _runs(behind, stay | _seams(behind, holding.indexed) | _ends(_not_thinned(behind, avoid)))
    runs = [run if _in_one_day(run, times) else _of_like_size(run) for run in runs]
    joins = _spans(runs, avoid) if may_join else []
    left = whole | {number for span in joins for number in range(span.first, span.last + 1)}
    thin = [
        each.number for each in behind
        if each.restorable_by_write and each.number not in left and ("thin", each.span) not in avoid
    ]  # fmt: skip
    return Plan(base if base > holding.base.number else None, tuple(joins), tuple(thin))


def relieve(
    holding: Holding, pins: Pins, missing: int, *,
    may_make: bool = True, may_join: bool = True, avoid: Collection[Step] = (),
) -> list[Plan]:  # fmt: skip
    """What to let go of so that about `missing` bytes come back, the oldest first; never what is pinned.

    In stages: single writes first; then the oldest boundaries; then, when a pin keeps the base, boundaries behind it.
    How much comes back is an estimate: look again between them. None at all: nothing else may go.
    """
    touched = [each for each in holding.intervals if each.number < pins.at]
    thin, back = list[int](), 0
    for each in touched if may_make else ():
        if back >= missing:
            break
        if each.restorable_by_write and not _holds_pin(each, pins) and ("thin", each.span) not in avoid:
            thin.append(each.number)
            back += max(1, thinned_bytes(each))
    stay = _pinned(holding, pins) | _ends(each for each in holding.intervals if each.number >= pins.at)
    base = holding.base.number
    for each in touched:
        if each.number > min(stay) or back >= missing:
            break
        base = each.number if ("base", each.span) not in avoid else base
        back += sum(each.stored.values()) - (thinned_bytes(each) if each.number in thin else 0)
    joins = list[Span]()
    if may_make and may_join and back < missing:
        behind = [each for each in touched if base < each.first and each.to_write <= min(pins.shown, default=1 << 64)]
        runs = _runs(behind, stay | _seams(behind, holding.indexed) | _ends(_not_thinned(behind, avoid)))
        joins = _by_pieces(runs, missing - back, avoid)
    stages = [Plan(thin=tuple(thin)), Plan(base if base > holding.base.number else None), Plan(joins=tuple(joins))]
    return [each for each in stages if each and missing > 0]


def _by_pieces(runs: Iterable[Sequence[Interval]], missing: int, avoid: Collection[Step]) -> list[Span]:
    """Joins of the oldest first, none of more than it takes, that give about so many bytes back."""
    found, back = list[Span](), 0
    for run in runs:
        rest = list(_of_like_size(run))
        while len(rest) > 1 and back < missing:
            size = largest = _increments(rest[0])
            count, blocks = 1, 0
            while count < len(rest) and (blocks < rest[0].blocks_changed or back + size - largest < missing):
                blocks += rest[count].blocks_changed
                size, largest = size + _increments(rest[count]), max(largest, _increments(rest[count]))
                count += 1
            span = Span(rest[0].first, rest[count - 1].number)
            if ("join", span) not in avoid:
                found.append(span)
                back += size - largest
            rest = list(_of_like_size(rest[count:]))
    return found


def _increments(interval: Interval) -> int:
    """Bytes that an interval takes when its single writes are gone; those of its forward increment are not known."""
    return sum(size for name, size in interval.stored.items() if name not in ("writes", "index"))


def thinned_bytes(interval: Interval) -> int:
    """About how many bytes come back when an interval is thinned: its writes, without those that its end is made of."""
    if not interval.restorable_by_write or not interval.bytes_written:
        return 0
    kept = min(1.0, interval.blocks_changed * BLOCK / interval.bytes_written)
    return int(interval.stored["writes"] * (1 - kept))


def _keeps_writes(interval: Interval, policy: Policy, pins: Pins, now: int, times: Mapping[int, int]) -> bool:
    """Whether an interval's single writes stay, if they are there."""
    if not interval.restorable_by_write:
        return False
    return _younger(times[interval.number], policy.writes, now) or _holds_pin(interval, pins)


def _younger(time_ns: int, seconds: float | None, now: int) -> bool:
    return seconds is None or time_ns > now - int(seconds * 10**9)


def _holds_pin(interval: Interval, pins: Pins) -> bool:
    """Whether a pinned point is one of an interval's single writes."""
    return any(interval.from_write <= point < interval.to_write for point in pins.points)


def _by_age(times: Mapping[int, int], policy: Policy, now: int) -> set[int]:
    hour, day = _newest(times, HOUR_NS), _newest(times, DAY_NS)
    found = set()
    for number, time_ns in times.items():
        end_of_hour, end_of_day = ((time_ns // size + 1) * size for size in (HOUR_NS, DAY_NS))
        if (
            _younger(end_of_hour, policy.boundaries, now)
            or (number in hour and _younger(end_of_day, policy.hourly, now))
            or (number in day and _younger(end_of_day, policy.daily, now))
        ):
            found.add(number)
    return found


def _newest(times: Mapping[int, int], size: int) -> set[int]:
    """The newest boundary of each period."""
    return set({times[number] // size: number for number in sorted(times)}.values())


def _base(holding: Holding, number: int, avoid: Collection[Step]) -> int:
    """The newest boundary up to `number` that can be made the oldest one."""
    there = [each.number for each in holding.intervals if each.number <= number and ("base", each.span) not in avoid]
    return max([holding.base.number, *there])


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
        and not other.gaps
        and one.boundary.timeline == other.boundary.timeline
        and one.boundary.checkpoint_lsn < other.boundary.checkpoint_lsn
        and (one.number in indexed) == (other.number in indexed)
    )


def _not_thinned(intervals: Iterable[Interval], avoid: Collection[Step]) -> list[Interval]:
    return [each for each in intervals if ("thin", each.span) in avoid]


def _runs(intervals: Sequence[Interval], stay: Collection[int]) -> list[Sequence[Interval]]:
    """Runs of intervals between boundaries that stay."""
    found, run = list[Sequence[Interval]](), list[Interval]()
    for each in intervals:
        run.append(each)
        if each.number in stay:
            found.append(run)
            run = []
    return found


def _in_one_day(run: Sequence[Interval], times: Mapping[int, int]) -> bool:
    """Whether nothing will ever be added to what a run is joined to, but once to a day."""
    return times[run[0].number] // DAY_NS == times[run[-1].number] // DAY_NS


def _of_like_size(run: Sequence[Interval]) -> Sequence[Interval]:
    """The end of a run from where on what is joined is not much larger than what it is joined with.

    Days that go one by one behind an old pin would else be joined to what the others were joined to, each time anew. So
    each block is copied a few times only, and the number of those that are left grows with the logarithm.
    """
    rest = sum(each.blocks_changed for each in run)
    for at, each in enumerate(run):
        rest -= each.blocks_changed
        if rest >= each.blocks_changed:
            return run[at:]
    return run[-1:]


def _spans(runs: Iterable[Sequence[Interval]], avoid: Collection[Step]) -> list[Span]:
    """What can be joined, where a run is more than one interval."""
    found = [Span(run[0].first, run[-1].number) for run in runs if len(run) > 1]
    return [span for span in found if ("join", span) not in avoid]
