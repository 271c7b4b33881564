"""Points between transactions: each target leaves in exactly what its definition says, whatever clocks and writes do.

The model is a list of transactions in WAL order, several of them in one write; a point is judged by which of them it
holds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pgcdp.errors import TargetError
from pgcdp.records import (
    ABORTED,
    COMMITTED,
    COMMITTED_PREPARED,
    NOT_IN_WRITE,
    PREPARED,
    TRANSACTION,
    WAL_WRITE,
    Boundary,
    Interval,
    RecoveryPoint,
    Target,
)
from pgcdp.recovery.commits import Commits, History
from pgcdp.recovery.instant import at_xid
from pgcdp.recovery.neighbours import around
from pgcdp.recovery.target import Listing, resolve

BASE_WRITE = 10
FIRST_XID = (1 << 32) - 3
"""Soon the low 32 bits begin anew."""


@dataclass(frozen=True)
class Model:
    """All ends in WAL order, each with its interval (None: the tail), and what resolves targets."""

    ends: list[np.void]
    listing: Listing

    def held(self, point: RecoveryPoint) -> int:
        """How many of the ends a point holds; they must be the first ones."""
        inside = [
            int(end["write"]) < point.write
            or (int(end["write"]) == point.write and (point.lsn is None or int(end["lsn"]) < point.lsn))
            for end in self.ends
        ]
        assert inside == sorted(inside, reverse=True)
        return sum(inside)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Intervals of writes of transactions; clocks go as they like."""
    intervals: list[Interval] = []
    chapters: dict[int | None, Commits] = {}
    summaries: dict[int | None, Mapping[str, Any] | None] = {}
    all_ends: list[np.void] = []
    write, lsn, xid = BASE_WRITE, 1000, FIRST_XID
    numbers: list[int | None] = [*range(1, draw(st.integers(0, 3)) + 1), None]
    for number in numbers:
        first = write + 1
        rows: list[tuple[int, ...]] = []
        wal: list[tuple[int, int, int, int]] = []
        for _ in range(draw(st.integers(1, 4))):
            write += 1
            begin_lsn, at, late = lsn, 0, draw(st.integers(0, 2))
            for place in range(draw(st.integers(0, 4))):
                length = draw(st.integers(3, 9)) * 8
                crossing = place == 0 and bool(rows) and draw(st.booleans())
                status = draw(st.sampled_from([COMMITTED, COMMITTED, COMMITTED, ABORTED, COMMITTED_PREPARED, PREPARED]))
                rows.append(
                    (lsn, lsn + length, write + late, draw(st.integers(0, 30)), xid, 1,
                     NOT_IN_WRITE if crossing else at, at + length, status, late, 0)
                )  # fmt: skip
                xid += draw(st.integers(1, 3))
                lsn += length + draw(st.sampled_from([0, 0, 8, 24, 64]))
                at += length
            if lsn != begin_lsn:
                wal.append((write, begin_lsn, lsn, write + late))
                write += late
        ends = np.array(rows, dtype=TRANSACTION)
        events = [{"kind": "mark", "name": f"m{write}", "write": write, "lsn": None}]
        table = np.array(wal, dtype=WAL_WRITE)
        chapters[number] = Commits(ends, dict, events, lambda table=table: table)  # type: ignore[misc]
        all_ends += list(ends)
        if number is not None:
            boundary = Boundary(number, write, write * 1000, 0, 0, 1, 0, "period")
            intervals.append(Interval(number, first, write, first * 1000, write * 1000, boundary, 1, 0, 0, {}))
            summaries[number] = {"count": len(ends), "marks": 1, "wal_to": int(table["to_lsn"].max(initial=0)),
                "committed": sum(map(is_in, ends)), **({
                f"{name}_{column}": int(getattr(ends[column], name)())
                for column in ("lsn", "xid", "time_us", "write") for name in ("min", "max")
            } if len(ends) else {})}  # fmt: skip
    history = History(numbers, chapters.__getitem__, summaries.get)
    base = Boundary(0, BASE_WRITE, 0, 0, 0, 1, 0, "baseline")

    def times(number: int | None) -> Any:
        last = intervals[-1].to_write if intervals else BASE_WRITE
        if number is None:
            return np.arange(last + 1, write + 1) * 1000
        return np.arange(intervals[number - 1].from_write, intervals[number - 1].to_write + 1) * 1000

    return Model(all_ends, Listing(base, intervals, write, times, 10**9, history))


def is_in(end: np.void) -> bool:
    return int(end["status"]) in (COMMITTED, COMMITTED_PREPARED)


@settings(max_examples=300, deadline=None)
@given(model=models(), data=st.data())
def test_a_transaction_and_its_neighbours(model: Model, data: st.DataObject) -> None:
    assume(model.ends)
    place = data.draw(st.integers(0, len(model.ends) - 1))
    end = model.ends[place]
    xid = int(end["xid"]) & 0xFFFFFFFF if data.draw(st.booleans()) else int(end["xid"])
    before = resolve(Target("xid", xid, exclusive=True), model.listing)
    assert model.held(before) == place
    behind = resolve(Target("xid", xid), model.listing)
    assert model.held(behind) == place + 1
    if end["status"] == COMMITTED_PREPARED:
        assert "is prepared there" in (before.note or "")
    for point in (before, behind):
        assert (f"xid {end['xid']} was rolled back" in (point.note or "")) == (end["status"] == ABORTED)
    found = around(before.write, before.lsn, model.listing.history)
    committed = [each for each in model.ends[:place] if is_in(each)]
    assert (found.last_in is None) == (not committed)
    if committed and found.last_in is not None:
        assert found.last_in["lsn"] == committed[-1]["lsn"]
    assert found.out == sum(is_in(each) for each in model.ends[place:])


@settings(max_examples=400, deadline=None)
@given(model=models(), at=st.integers(-1, 31), exclusive=st.booleans())
def test_a_time_means_the_first_later_commit_or_is_ambiguous(model: Model, at: int, exclusive: bool) -> None:
    target = Target("time", max(0, at) * 1000, exclusive=exclusive)
    last = max(0, at) - exclusive
    later = [place for place, end in enumerate(model.ends) if is_in(end) and end["time_us"] > last]
    if not later:
        assert resolve(target, model.listing).write == model.listing.newest_write
        return
    behind = [end for end in model.ends[later[0] :] if is_in(end) and end["time_us"] <= last]
    if behind:
        with pytest.raises(TargetError, match="is ambiguous") as raised:
            resolve(target, model.listing)
        assert f"xid {behind[0]['xid']}" in raised.value.message
        assert f"--target-xid {model.ends[later[0]]['xid']} --exclusive" in (raised.value.hint or "")
        return
    assert model.held(resolve(target, model.listing)) == later[0]


@settings(max_examples=300, deadline=None)
@given(model=models(), data=st.data())
def test_an_lsn_is_the_first_record_at_or_behind_it(model: Model, data: st.DataObject) -> None:
    assume(model.ends)
    end = data.draw(st.sampled_from(model.ends))
    lsn = int(end["lsn"]) + data.draw(st.sampled_from([-32, -24, -16, -8, 0, 8]))
    newest = max(int(each["end_lsn"]) for each in model.ends)
    assume(1000 <= lsn < newest)
    exclusive = resolve(Target("lsn", lsn, exclusive=True), model.listing)
    assert model.held(exclusive) == sum(int(each["lsn"]) < lsn for each in model.ends)
    inclusive = resolve(Target("lsn", lsn), model.listing)
    room = 24  # of the smallest record: where another fits in between, the end of a transaction is not the first
    whole = [int(each["end_lsn"]) for each in model.ends if int(each["lsn"]) < lsn < int(each["end_lsn"])]
    begin = max([lsn, *whole])
    assert model.held(inclusive) == sum(int(each["lsn"]) < lsn for each in model.ends) + any(
        begin <= int(each["lsn"]) < begin + room for each in model.ends
    )


@settings(max_examples=400, deadline=None)
@given(model=models(), data=st.data())
def test_nothing_is_guessed_over_an_interval_that_is_not_indexed(model: Model, data: st.DataObject) -> None:
    """What is resolved without it is what it would be with it, or it is refused."""
    whole = model.listing.history
    assume(len(whole.numbers) > 1)
    hidden = data.draw(st.sampled_from(whole.numbers[:-1]))
    assert hidden is not None
    inside = whole.commits(hidden).ends
    latest = int(inside["time_us"].max(initial=0)) * 1000
    numbers = [number for number in whole.numbers if number != hidden]
    nothing_is_guessed(model, data, replace(whole, numbers=numbers, unindexed={hidden: latest}))


@settings(max_examples=1000, deadline=None)
@given(model=models(), data=st.data())
def test_nothing_is_guessed_over_wal_that_was_not_seen_whole(model: Model, data: st.DataObject) -> None:
    """The ends of some transactions in the middle of an interval are missing."""
    whole = model.listing.history
    assume(any(len(whole.commits(number).ends) for number in whole.numbers))
    number = data.draw(st.sampled_from([each for each in whole.numbers if len(whole.commits(each).ends)]))
    commits = whole.commits(number)
    first, last = sorted(data.draw(st.integers(0, len(commits.ends) - 1)) for _ in range(2))
    stretch = {"lsn": int(commits.ends["lsn"][first]), "end_lsn": int(commits.ends["end_lsn"][last])}
    event = {"kind": "lost", **stretch, "write": int(commits.ends["write"][last])}
    seen = replace(
        commits,
        ends=np.delete(np.asarray(commits.ends), slice(first, last + 1)),
        events=[*commits.events, event],
    )
    history = replace(
        whole,
        commits=lambda each: seen if each == number else whole.commits(each),
        summary=lambda each: None if each == number else whole.summary(each),
        partly=lambda numbers: {whole.opened if number is None else number: sys.maxsize},
    )
    assert "was not seen whole" in history.not_indexed(history.doubtful)
    nothing_is_guessed(model, data, history)


def nothing_is_guessed(model: Model, data: st.DataObject, known: History) -> None:
    """With a part of the history, a target is resolved as with all of it, or refused."""
    kind = data.draw(st.sampled_from(["time", "lsn"]))
    value = data.draw(st.integers(0, 31)) * 1000 if kind == "time" else data.draw(st.integers(1000, 1800))
    target = Target(kind, value, exclusive=data.draw(st.booleans()))  # type: ignore[arg-type]
    try:
        right = resolve(target, model.listing)
    except TargetError:
        return
    try:
        point = resolve(target, replace(model.listing, history=known))
    except TargetError:
        return
    assert model.held(point) == model.held(right)
    found = around(point.write, point.lsn, known)
    if not found.unknown:
        assert found.out == around(point.write, point.lsn, model.listing.history).out


@settings(max_examples=100, deadline=None)
@given(model=models())
def test_a_mark_is_its_write(model: Model) -> None:
    name = f"m{model.listing.newest_write}"
    assert resolve(Target("name", name=name), model.listing).write == model.listing.newest_write
    with pytest.raises(TargetError, match='no mark or restore point "nothing"') as raised:
        resolve(Target("name", name="nothing"), model.listing)
    assert name in (raised.value.hint or "")


def test_an_unknown_transaction_is_said() -> None:
    listing = Listing(Boundary(0, 1, 0, 0, 0, 1, 0, "baseline"), [], 1, lambda number: np.empty(0, dtype=np.int64))
    with pytest.raises(TargetError, match="no transaction 7 ended"):
        resolve(Target("xid", 7), listing)


def test_what_a_dropped_database_loses_first_may_lie_in_an_earlier_interval() -> None:
    """A boundary between the record of the drop and its commit: exclusive is before the drop all the same."""
    first = {"lsn": 1000, "write": 11, "late": 0, "begin_at": 64}
    event = {"kind": "drop_database", "name": "d", "xid": 700, "lsn": 1100, "write": 12, "first": first}
    other = np.array([(1050, 1080, 12, 1, 699, 1, 0, 30, COMMITTED, 0, 0)], dtype=TRANSACTION)
    drop = np.array([(1200, 1240, 14, 2, 700, 1, 0, 40, COMMITTED, 0, 250)], dtype=TRANSACTION)
    none = np.empty(0, dtype=WAL_WRITE)
    chapters: dict[int | None, Commits] = {
        1: Commits(other, dict, [event], lambda: none),
        2: Commits(drop[:0], dict, [], lambda: none),
        None: Commits(drop, dict, [], lambda: none),
    }
    said: dict[int | None, Mapping[str, Any] | None] = {
        1: {"count": 1, "wal_to": 1150, "min_xid": 699, "max_xid": 699}, 2: {"count": 0, "wal_to": 1180}
    }  # fmt: skip
    history = History([1, 2, None], chapters.__getitem__, said.get)
    point = at_xid(700, True, history)
    assert (point.write, point.lsn, point.blank_write, point.until_lsn) == (11, 1000, 11, 1200)
    between = around(point.write, point.lsn, history, point.until_lsn)
    assert [int(end["xid"]) for end in between.also_out] == [699]
