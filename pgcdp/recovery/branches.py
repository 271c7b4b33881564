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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import TargetError
from pgcdp.records import Rewind


@dataclass(frozen=True, slots=True)
class Stretch:
    """Writes `first` to `last` of a branch, both included.

    Of the WAL in `last` only what lies before `until_lsn`, of that in `first` only what does not lie before `from_lsn`.
    """

    first: int
    last: int
    until_lsn: int | None = None
    from_lsn: int | None = None


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


def beyond(branch: Sequence[Stretch], other: Sequence[Stretch]) -> list[Stretch]:
    """What of a branch is not on another one."""
    for number, stretch in enumerate(branch):
        rest = list(branch[number + 1 :])
        if number >= len(other) or other[number].first != stretch.first:
            return [stretch, *rest]
        ours, theirs = _end(stretch), _end(other[number])
        if ours == theirs:
            continue
        if ours < theirs:
            return rest
        last, lsn = other[number].last, other[number].until_lsn
        return [Stretch(last + (lsn is None), stretch.last, stretch.until_lsn, lsn), *rest]
    return []


def _end(stretch: Stretch) -> tuple[int, float]:
    return stretch.last, float("inf") if stretch.until_lsn is None else stretch.until_lsn


def on_branch(write: NDArray[Any], lsn: NDArray[Any], branch: Sequence[Stretch]) -> NDArray[np.bool_]:
    """Which records of WAL, at `lsn` and whole with `write`, lie on a branch."""
    found = np.zeros(len(write), dtype=np.bool_)
    for each in branch:
        here = (write >= each.first) & (write <= each.last)
        if each.until_lsn is not None:
            here &= (write < each.last) | (lsn < each.until_lsn)
        if each.from_lsn is not None:
            here &= (write > each.first) | (lsn >= each.from_lsn)
        found |= here
    return found


def share(first: int, last: int, branch: Sequence[Stretch]) -> bool | None:
    """Whether writes `first` to `last` lie on a branch; None: some of them, or some of their WAL."""
    if not any(each.first <= last and first <= each.last for each in branch):
        return False
    whole = any(
        (each.first < first or (each.first == first and each.from_lsn is None))
        and (last < each.last or (last == each.last and each.until_lsn is None))
        for each in branch
    )
    return True if whole else None


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
