"""Pure: what rewinds in place make of the order of writes.

A rewind opens a new *branch*. What lies on it are the writes behind its end record, and before them those up to the
point that it went back to; on that point's own branch, and so on:

    writes      1 ------------- 50 ........ 80 [begin .. end] 95 ------ 120
    branch 0    1 -------------------------- 80
    branch 1    1 ------------- 50                            95 ------ 120

Between begin and end record the volumes are neither the one nor the other: no point lies there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pgcdp.errors import TargetError
from pgcdp.records import Rewind


@dataclass(frozen=True, slots=True)
class Stretch:
    """Writes `first` to `last` of a branch, both included; of the WAL in `last` only what lies before `until_lsn`."""

    first: int
    last: int
    until_lsn: int | None = None

    def holds(self, write: int, lsn: int) -> bool:
        """Whether a record of WAL at `lsn` that became whole with `write` lies here."""
        if not self.first <= write <= self.last:
            return False
        return write < self.last or self.until_lsn is None or lsn < self.until_lsn


def branch_at(write: int, lsn: int | None, rewinds: Sequence[Rewind]) -> list[Stretch]:
    """The branch that a point lies on, from its oldest writes up to the point itself."""
    found: list[Stretch] = []
    for rewind in reversed(rewinds):
        if rewind.end is None or rewind.end > write:
            continue
        found.append(Stretch(rewind.end, write, lsn))
        write, lsn = rewind.to_write, rewind.to_lsn
    return [Stretch(0, write, lsn), *reversed(found)]


def current_branch(rewinds: Sequence[Rewind]) -> list[Stretch]:
    """The branch that production is on; while a rewind has not ended, the one that it left."""
    unended = rewinds[-1].begin - 1 if rewinds and rewinds[-1].end is None else sys.maxsize
    return branch_at(unended, None, rewinds)


def on_branch(write: int, lsn: int, branch: Sequence[Stretch]) -> bool:
    """Whether a record of WAL lies on a branch."""
    return any(stretch.holds(write, lsn) for stretch in branch)


def refuse_inside(write: int, rewinds: Sequence[Rewind]) -> None:
    """Raises TargetError for a write between a begin and its end record, naming the nearest points on both sides."""
    for rewind in rewinds:
        if rewind.begin <= write and (rewind.end is None or write < rewind.end):
            before = f"--target-write {rewind.begin - 1} is the nearest before it"
            if rewind.end is None:
                raise TargetError(
                    f"write {write} lies inside a rewind in place that began with write {rewind.begin} and has not "
                    "ended: no recovery point is there",
                    before,
                )
            raise TargetError(
                f"write {write} lies inside a rewind in place, writes {rewind.begin} to {rewind.end - 1}: no recovery "
                "point is there",
                f"{before}, --target-write {rewind.end} the nearest behind it",
            )
