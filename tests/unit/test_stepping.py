"""Steps by commits: none is skipped, none is counted twice, and nothing is guessed over what was not indexed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pgcdp.errors import TargetError
from pgcdp.records import ABORTED, COMMITTED, TRANSACTION, RecoveryPoint, Target
from pgcdp.recovery.commits import Commits, History
from pgcdp.recovery.stepping import by_commits

NO_ENDS = np.empty(0, dtype=TRANSACTION)


def ends_of(*rows: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """(xid, write, status), LSNs as xids."""
    found = np.zeros(len(rows), dtype=TRANSACTION)
    for at, (xid, write, status) in enumerate(rows):
        found[at]["xid"], found[at]["write"], found[at]["status"] = xid, write, status
        found[at]["lsn"], found[at]["end_lsn"] = xid * 100, xid * 100 + 50
    return found


OPENED = 4


def history_of(
    chapters: Mapping[int | None, np.ndarray[Any, Any]],
    unindexed: tuple[int, ...] = (),
    lost: tuple[int | None, ...] = (),
) -> History:
    """`lost`: intervals whose WAL was not seen whole."""

    def commits(number: int | None) -> Commits:
        events = [{"kind": "lost", "lsn": 1, "end_lsn": 2}] if number in lost else []
        return Commits(chapters[number], dict, events, lambda: NO_ENDS)

    def partly(numbers: Sequence[int | None]) -> Mapping[int, int]:
        return {OPENED if number is None else number: 0 for number in numbers if number in lost}

    def summary(number: int | None) -> Mapping[str, Any] | None:
        ends = chapters[number]
        if number is None:
            return None
        writes = {"min_write": int(ends["write"].min()), "max_write": int(ends["write"].max())} if len(ends) else {}
        return {"count": len(ends), **writes}

    return History(list(chapters), commits, summary, dict.fromkeys(unindexed, 0), partly, OPENED)


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
    history = history_of(CHAPTERS, unindexed=(2,))
    first, second, open_now = RecoveryPoint(12, 1, 0), RecoveryPoint(25, 2, 0), RecoveryPoint(50, None, 0)
    for point, count in ((first, 1), (second, 1), (second, -1), (open_now, -4), (open_now, -9), (first, 9)):
        with pytest.raises(TargetError, match="where transactions are not known: interval 2 is not indexed"):
            by_commits(point, count, history)
    assert by_commits(RecoveryPoint(10, 0, 0, boundary=0), 2, history).value == 3
    assert by_commits(RecoveryPoint(29, 2, 0, boundary=2), 1, history).value == 4, "at its end all of it is in"
    assert by_commits(open_now, -3, history).value == 4
    assert by_commits(RecoveryPoint(12, 1, 0), -2, history).value == 1


def test_no_step_goes_over_wal_that_was_not_seen_whole() -> None:
    begin, first = RecoveryPoint(10, 0, 0, boundary=0), RecoveryPoint(12, 1, 0, boundary=1)
    third, early, now = RecoveryPoint(31, 3, 0, boundary=3), RecoveryPoint(40, None, 0), RecoveryPoint(50, None, 0)
    for lost, refused in (
        ((None,), ((third, 1), (early, 1), (now, -1))),
        ((1,), ((begin, 1), (first, -1), (third, -2))),
        ((3,), ((first, 1), (third, -1), (early, -1))),
    ):
        history = history_of(CHAPTERS, lost=lost)
        for point, count in refused:
            with pytest.raises(TargetError, match=r"WAL 0/1 to 0/2 in interval \d was not seen whole"):
                by_commits(point, count, history)
    behind = history_of(CHAPTERS, lost=(1,))
    assert by_commits(first, 1, behind).value == 4, "at its end all of it is in"
    assert by_commits(now, -3, behind).value == 4
    before = history_of(CHAPTERS, lost=(None,))
    assert by_commits(third, -1, before).value == 4, "none of it is in"
