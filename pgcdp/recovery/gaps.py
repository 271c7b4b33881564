"""Pure: there is no recovery point inside a gap, neither by write nor by time."""

from __future__ import annotations

from collections.abc import Sequence

from pgcdp.errors import TargetError
from pgcdp.records import Gap
from pgcdp.units import format_time

WHY = {
    "changed": "a volume was changed while it was detached, and taken in as it was found",
    "untracked": "the journal could not take writes, and what had changed was taken in later",
    "lost": "writes were only in a journal that cannot be read any more, and what the volumes had was taken in later",
}
"""By the reason of a gap (`records.GAP_REASONS`)."""


def with_unrecorded(found: list[Gap], unrecorded: Gap | None) -> list[Gap]:
    """Gaps as the writes tell of them, with what the bitmap of changed blocks says unless its records are there."""
    last = found[-1] if found else None
    if unrecorded is None or (last is not None and (last.end is None or last.end >= unrecorded.begin)):
        return found
    return [*found, unrecorded]


def before_open(gaps: Sequence[Gap]) -> int | None:
    """While a gap lasts: the newest write in front of it. None when there is none."""
    last = gaps[-1] if gaps else None
    return None if last is None or last.end is not None else _first_joined(last, gaps).begin - 1


def newest_before(gaps: Sequence[Gap]) -> tuple[int, str] | None:
    """While a gap lasts because the journal could not grow: the newest write that is a recovery point, and what must
    be known of it. None when there is no such gap."""
    last = gaps[-1] if gaps else None
    if last is None or last.end is not None or last.reason != "untracked":
        return None
    first = _first_joined(last, gaps)
    return first.begin - 1, (
        f"the newest write in front of a gap that has not ended: what was changed since {format_time(first.since_ns)} "
        f"is in no recovery point, since {WHY['untracked'].partition(',')[0]}. pgcdp status tells when the set has "
        "healed; run this again then"
    )


def refuse_in_gap(write: int, gaps: Sequence[Gap]) -> None:
    """Raises TargetError for a write from a begin record up to its end record, with the nearest points beside it.

    Where the next gap begins right behind an end record, what was changed is not all there with the first one.
    """
    begins = {gap.begin for gap in gaps}
    for gap in gaps:
        joined = gap.end is not None and gap.end + 1 in begins
        if gap.begin <= write and (gap.end is None or write < gap.end or (joined and write == gap.end)):
            upto = "on, which has not ended" if gap.end is None else f"to {gap.end if joined else gap.end - 1}"
            raise TargetError(
                f"write {write} lies in a gap, writes {gap.begin} {upto}: {WHY[gap.reason]}. No recovery point is "
                "there",
                _nearest(gap, gaps),
            )


def refuse_time_in_gap(time_ns: int, gaps: Sequence[Gap]) -> None:
    """The same for a time from when on writes are missing, up to when they were taken in."""
    for gap in gaps:
        if gap.since_ns < time_ns and (gap.to_ns is None or time_ns < gap.to_ns):
            upto = "on, and has not ended" if gap.to_ns is None else f"to {format_time(gap.to_ns)}"
            raise TargetError(
                f"{format_time(time_ns)} lies in a gap, from {format_time(gap.since_ns)} {upto}: {WHY[gap.reason]}. "
                "What was there at that time is not known",
                _nearest(gap, gaps),
            )


def _nearest(gap: Gap, gaps: Sequence[Gap]) -> str:
    """Before and behind all that are joined with this one."""
    first, last = _first_joined(gap, gaps), gap
    for each in gaps:
        last = each if last.end is not None and last.end + 1 == each.begin else last
    before = f"--target-write {first.begin - 1} is the nearest before it"
    return before if last.end is None else f"{before}, --target-write {last.end} the nearest behind it"


def _first_joined(gap: Gap, gaps: Sequence[Gap]) -> Gap:
    """The oldest of those that end right before the next one begins, up to this one."""
    for each in reversed(gaps):
        gap = each if each.end is not None and each.end + 1 == gap.begin else gap
    return gap
