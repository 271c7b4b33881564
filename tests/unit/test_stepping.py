"""Steps by commits: none is skipped, none is counted twice, and nothing is guessed over what was not indexed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from pgcdp.errors import TargetError
from pgcdp.records import ABORTED, COMMITTED, TRANSACTION, RecoveryPoint, Target
from pgcdp.recovery.instant import Commits, History
from pgcdp.recovery.stepping import by_commits

NO_ENDS = np.empty(0, dtype=TRANSACTION)


def ends_of(*rows: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """(xid, write, status), LSNs as xids."""
    found = np.zeros(len(rows), dtype=TRANSACTION)
    for at, (xid, write, status) in enumerate(rows):
        found[at]["xid"], found[at]["write"], found[at]["status"] = xid, write, status
        found[at]["lsn"], found[at]["end_lsn"] = xid * 100, xid * 100 + 50
    return found


def history_of(chapters: Mapping[int | None, np.ndarray[Any, Any]], unknown: tuple[int, ...] = ()) -> History:
    def commits(number: int | None) -> Commits:
        return Commits(chapters[number], dict, [], lambda: NO_ENDS)

    def summary(number: int | None) -> Mapping[str, Any] | None:
        ends = chapters[number]
        if number is None:
            return None
        writes = {"min_write": int(ends["write"].min()), "max_write": int(ends["write"].max())} if len(ends) else {}
        return {"count": len(ends), **writes}

    return History(list(chapters), commits, summary, dict.fromkeys(unknown, 0))


CHAPTERS = {
    1: ends_of((1, 11, COMMITTED), (2, 11, ABORTED), (3, 12, COMMITTED)),
    3: ends_of((4, 31, COMMITTED)),
    None: ends_of((5, 41, COMMITTED), (6, 41, COMMITTED)),
}


def test_each_commit_is_one_step() -> None:
    history = history_of(CHAPTERS)
    begin = RecoveryPoint(10, 0, 0, boundary=0)
    for count, xid in ((1, 1), (2, 3), (3, 4), (4, 5), (5, 6)):
        assert by_commits(begin, count, history) == Target("xid", xid)
    end = RecoveryPoint(50, None, 0)
    for count, xid in ((-1, 6), (-2, 5), (-3, 4), (-4, 3), (-5, 1)):
        assert by_commits(end, count, history, branch=2) == Target("xid", xid, exclusive=True, branch=2)
    inside = RecoveryPoint(41, None, 0, lsn=600)  # between the two commits of one write
    assert by_commits(inside, 1, history).value == 6
    assert by_commits(inside, -1, history).value == 5


def test_too_many_steps_say_how_many_there_are() -> None:
    history = history_of(CHAPTERS)
    with pytest.raises(TargetError, match="only 1 commit follows this point"):
        by_commits(RecoveryPoint(41, None, 0, lsn=600), 2, history)
    with pytest.raises(TargetError, match="no commit follows this point"):
        by_commits(RecoveryPoint(50, None, 0), 1, history)
    with pytest.raises(TargetError, match="no commit that can be undone lies before"):
        by_commits(RecoveryPoint(10, 0, 0, boundary=0), -1, history)


def test_no_step_goes_over_an_interval_that_is_not_indexed() -> None:
    history = history_of(CHAPTERS, unknown=(2,))
    first, second, open_now = RecoveryPoint(12, 1, 0), RecoveryPoint(25, 2, 0), RecoveryPoint(50, None, 0)
    for point, count in ((first, 1), (second, 1), (second, -1), (open_now, -4), (open_now, -9), (first, 9)):
        with pytest.raises(TargetError, match="where transactions are not known: interval 2 is not indexed"):
            by_commits(point, count, history)
    assert by_commits(RecoveryPoint(10, 0, 0, boundary=0), 2, history).value == 3
    assert by_commits(RecoveryPoint(29, 2, 0, boundary=2), 1, history).value == 4, "at its end all of it is in"
    assert by_commits(open_now, -3, history).value == 4
    assert by_commits(RecoveryPoint(12, 1, 0), -2, history).value == 1
