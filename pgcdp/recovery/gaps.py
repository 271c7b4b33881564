"""Pure: there is no recovery point inside a gap, neither by write nor by time."""

from __future__ import annotations

from collections.abc import Sequence

from pgcdp.errors import TargetError
from pgcdp.records import Gap
from pgcdp.units import format_time

WHY = {
    "changed": "a volume was changed while it was detached, and taken in as it was found",
    "untracked": "the journal could not take writes, and what had changed was taken in later",
}
"""By the reason of a gap (`records.GAP_REASONS`)."""


def with_unrecorded(found: list[Gap], unrecorded: Gap | None) -> list[Gap]:
    """Gaps as the writes tell of them, with what the bitmap of changed blocks says unless its records are there."""
    last = found[-1] if found else None
    if unrecorded is None or (last is not None and (last.end is None or last.end >= unrecorded.begin)):
        return found
    return [*found, unrecorded]


def refuse_in_gap(write: int, gaps: Sequence[Gap]) -> None:
    """Raises TargetError for a write from a begin record up to its end record, with the nearest points beside it."""
    for gap in gaps:
        if gap.begin <= write and (gap.end is None or write < gap.end):
            upto = "on, which has not ended" if gap.end is None else f"to {gap.end - 1}"
            raise TargetError(
                f"write {write} lies in a gap, writes {gap.begin} {upto}: {WHY[gap.reason]}. No recovery point is "
                "there",
                _nearest(gap),
            )


def refuse_time_in_gap(time_ns: int, gaps: Sequence[Gap]) -> None:
    """The same for a time from when on writes are missing, up to when they were taken in."""
    for gap in gaps:
        if gap.since_ns < time_ns and (gap.to_ns is None or time_ns < gap.to_ns):
            upto = "on, and has not ended" if gap.to_ns is None else f"to {format_time(gap.to_ns)}"
            raise TargetError(
                f"{format_time(time_ns)} lies in a gap, from {format_time(gap.since_ns)} {upto}: {WHY[gap.reason]}. "
                "What was there at that time is not known",
                _nearest(gap),
            )


def _nearest(gap: Gap) -> str:
    before = f"--target-write {gap.begin - 1} is the nearest before it"
    return before if gap.end is None else f"{before}, --target-write {gap.end} the nearest behind it"
