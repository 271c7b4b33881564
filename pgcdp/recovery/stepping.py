"""Pure: from a recovery point some writes or commits onward or back, and the transactions that are passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import TargetError
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery.commits import History, is_committed, refuse_gap


def by_writes(point: RecoveryPoint, count: int) -> Target:
    """All writes up to the one that is `count` behind the point, or before it.

    A point inside of a write lies between that write and the one before: one onward is all of it.
    """
    inside = 1 if point.lsn is not None and count > 0 else 0
    return Target("write", point.write + count - inside)


def by_commits(point: RecoveryPoint, count: int, history: History, branch: int = 0) -> Target:
    """With the next `count` commits in order of WAL, or without the last `-count`.

    `history` is that of the branch of timeline `branch` (0: the current one), on which the point lies. Raises
    TargetError, also when commits between may be in an interval that could not be indexed.
    """
    onward = count > 0
    left = abs(count)
    for number in history.numbers if onward else reversed(history.numbers):
        said = history.summary(number)
        if said is not None and (not said["count"] or _is_passed(said, point, onward)):
            continue
        ends = history.commits(number).ends
        within = _within(ends["write"], ends["lsn"], point)
        rows = np.flatnonzero(is_committed(ends) & (~within if onward else within))
        if len(rows) >= left:
            refuse_gap(history, _gap(point, number, history, onward), "the commits to step over may lie")
            end = ends[rows[left - 1] if onward else rows[-left]]
            return Target("xid", int(end["xid"]), exclusive=not onward, branch=branch)
        left -= len(rows)
    refuse_gap(history, _gap(point, None if onward else 0, history, onward), "the commits to step over may lie")
    there = abs(count) - left
    if not there:
        raise TargetError(
            "no commit follows this point" if onward else "no commit that can be undone lies before this point",
            "pgcdp log lists transactions, newest first",
        )
    if onward:
        follow = "commit follows" if there == 1 else "commits follow"
        raise TargetError(f"only {there} {follow} this point", f"step {there} --commit goes to the last one")
    raise TargetError(
        f"this point can go back over no more than {there} commit{'s' * (there > 1)}",
        f"step -{there} --commit goes to the first one",
    )


def _is_passed(said: Mapping[str, Any], point: RecoveryPoint, onward: bool) -> bool:
    """Whether all that ended in an interval lies on the other side of a point."""
    return bool(said["max_write"] < point.write if onward else said["min_write"] > point.write)


def _gap(point: RecoveryPoint, number: int | None, history: History, onward: bool) -> list[int]:
    """The intervals from a point to another interval, both included, that may hold commits which are not known."""
    here, there = history.key(point.interval), history.key(number)
    if onward:
        return history.doubtful_within(here + (point.boundary is not None), there)
    return history.doubtful_within(there, here)


def committed(history: History, limit: int) -> tuple[list[np.void], int]:
    """The first `limit` committed transactions of a history in order of WAL, and how many there are."""
    found: list[np.void] = []
    count = 0
    for number in history.numbers:
        said = history.summary(number)
        if said is not None and not said["count"]:
            continue
        ends = history.commits(number).ends
        rows = np.flatnonzero(is_committed(ends))
        found += [ends[row] for row in rows[: limit - len(found)]]
        count += len(rows)
    return found, count


def _within(write: NDArray[np.uint64], lsn: NDArray[np.uint64], point: RecoveryPoint) -> NDArray[np.bool_]:
    held = (lsn < point.lsn) if point.lsn is not None else np.True_
    found: NDArray[np.bool_] = (write < point.write) | ((write == point.write) & held)
    return found
