"""Which points are left in a store that is damaged in part, and which of them are nearest to one that is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from pgcdp.errors import DamageError, HalfWrittenError, PgcdpError
from pgcdp.records import Boundary, Interval, RecoveryPoint, Target
from pgcdp.store.damage import Costs, Damage, Range, look, place_in
from pgcdp.store.image import read_state
from pgcdp.store.layout import Store
from pgcdp.store.published import Published
from pgcdp.store.scrub_record import read_record
from pgcdp.units import format_time


class Listed(Protocol):
    """What a `Source` knows of its store."""

    store: Store

    def base(self) -> Boundary:
        """The oldest boundary."""

    def listed(self) -> dict[int, Published]:
        """The published intervals by number, in order, and what is lost between them."""

    def look(self) -> bool:
        """From now on, the manifest of each interval was looked at."""


Run = tuple[int, int]
"""Writes from the first to the last one, both included."""


def restorable(base: int, intervals: Sequence[Interval], newest: int, lost: Iterable[Range]) -> list[Run]:
    """Pure: the writes that are recovery points, in order, none next to each other.

    `base`: the write of the oldest boundary; `newest`: the newest write, perhaps behind the last interval.
    """
    runs: list[Run] = [(base, base)]
    done = base
    for interval in intervals:
        runs.append((interval.from_write if interval.restorable_by_write else interval.to_write, interval.to_write))
        done = interval.to_write
    if newest > done:
        runs.append((done + 1, newest))
    for first, last in lost:
        end = newest if last is None else last
        runs = [part for run in runs for part in _without(run, first, end)]
    joined: list[Run] = []
    for first, last in runs:
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _without(run: Run, first: int, last: int) -> Iterator[Run]:
    if run[0] < first:
        yield run[0], min(run[1], first - 1)
    if run[1] > last:
        yield max(run[0], last + 1), run[1]


def nearest(runs: Sequence[Run], write: int) -> tuple[int | None, int | None]:
    """Pure: the last recovery point before a write, and the first one behind it."""
    before = max((min(last, write - 1) for first, last in runs if first < write), default=None)
    behind = min((max(first, write + 1) for first, last in runs if last > write), default=None)
    return before, behind


def damages_of(source: Listed) -> list[Damage]:
    """What is known of damage without reading: what is missing or cut short, and what the last scrub found."""
    base, listed = source.base(), source.listed()
    seen = look(source.store, base, listed)
    places = {(each.file, each.offset) for each in seen}
    return [*seen, *(each for each in read_record(source.store).damages if (each.file, each.offset) not in places)]


def write_named(source: Listed, target: Target) -> int | None:
    """The write that a target names by its number or that of a boundary; None when it is named by neither."""
    if target.kind == "write":
        return target.value - target.exclusive
    ends = [each.interval for each in source.listed().values() if each.interval.first <= target.value]
    return ends[-1].to_write if target.kind == "boundary" and ends else None


def refuse_lost_target(source: Listed, target: Target) -> None:
    """Raises DamageError for a write or a boundary of which only that is known that it was in a lost interval."""
    for each in source.listed().values():
        interval = each.interval
        inside = interval.from_write <= target.value - target.exclusive < interval.to_write
        between = interval.first <= target.value < interval.number
        if each.damage and ((target.kind == "write" and inside) or (target.kind == "boundary" and between)):
            raise DamageError(each.damage)


def refuse_lost(source: Listed, point: RecoveryPoint) -> None:
    """Raises DamageError for a point that needs an interval which cannot be read."""
    lost = [each for each in source.listed().values() if each.damage]
    if not lost:
        return
    at = read_state(source.store).boundary
    for each in lost:
        interval = each.interval
        back = point.write < interval.to_write and interval.first <= at
        forward = point.write >= interval.from_write and interval.number > at
        if back or forward:
            raise DamageError(each.damage, hint_of(source, point.write, each.damage))


@contextmanager
def naming_nearest(source: Listed, point: RecoveryPoint) -> Iterator[None]:
    """Damage that is met inside, where `point` is made, names the nearest points that can be restored."""
    try:
        yield
    except DamageError as damage:
        hint = damage.hint
        with suppress(PgcdpError, OSError):
            found = hint_of(source, point.write, damage.message)
            hint = f"{hint}; {found}" if isinstance(damage, HalfWrittenError) else found
        raise type(damage)(damage.message, hint) from damage


def hint_of(source: Listed, write: int, message: str) -> str:
    """The nearest points to a write that cannot be restored for the damage that a message tells of."""
    source.look()
    base, listed = source.base(), source.listed()
    lost = [each.lost for each in damages_of(source) if each.lost is not None]
    place = place_in(source.store, message)
    own = None if place is None else Costs(source.store, base, listed).lost(*place)
    if own is not None:
        lost.append(own)
    intervals = [each.interval for each in listed.values()]
    newest = max(intervals[-1].to_write if intervals else base.write, write)
    before, behind = nearest(restorable(base.write, intervals, newest, [*lost, (write, write)]), write)
    boundaries = {each.write: each for each in (base, *(interval.boundary for interval in intervals))}
    told = [_typed(at, boundaries, where) for at, where in ((before, "before"), (behind, "behind")) if at is not None]
    if not told:
        return "no other point is known that can be restored: bring the file back from a copy of the store"
    return "the nearest that can be restored: " + ", ".join(told)


def _typed(write: int, boundaries: dict[int, Boundary], where: str) -> str:
    boundary = boundaries.get(write)
    if boundary is None:
        return f"--target-write {write} {where} it"
    return f"--target-boundary {boundary.number} ({format_time(boundary.time_ns)}) {where} it"
