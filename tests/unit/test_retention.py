"""What a policy lets go of, on made-up listings: never what is pinned, nothing twice, the oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pgcdp.records import BLOCK, Boundary, Interval, Rewind, Span
from pgcdp.store.retention import (
    DAY_NS,
    HOUR_NS,
    Holding,
    Pins,
    Plan,
    Policy,
    Step,
    plan,
    relieve,
    thinned_bytes,
    times_of,
)

START_NS = 1_800_000_000 * 10**9 // DAY_NS * DAY_NS
MINUTE_NS = 60 * 10**9


def boundary(number: int, write: int, time_ns: int, timeline: int = 1) -> Boundary:
    return Boundary(number, write, time_ns, 1000 + number, 990 + number, timeline, 700, "period")


def interval(number: int, time_ns: int, writes: int = 10, timeline: int = 1) -> Interval:
    """Interval n of `writes` writes each."""
    end = boundary(number, number * writes, time_ns, timeline)
    stored = {"writes": 100_000, "backward": 40_000, "forward": 100, "index": 200, "transactions": 50}
    return Interval(
        number, (number - 1) * writes + 1, number * writes, time_ns - 1, time_ns, end, writes, writes * BLOCK,
        writes // 2, stored,
    )  # fmt: skip


def listing(gaps: Sequence[int], timelines: Sequence[int] = ()) -> Holding:
    """An interval after each gap, in ns (one may be negative: a clock that was set back)."""
    time_ns, found = START_NS, []
    for number, gap in enumerate(gaps, 1):
        time_ns += gap
        found.append(interval(number, time_ns, timeline=timelines[number - 1] if timelines else 1))
    return Holding(boundary(0, 0, START_NS), found, frozenset(each.number for each in found))


def carried_out(holding: Holding, plan: Plan) -> Holding:
    """What a store holds when a plan was carried out."""
    base, intervals, latest_ns = holding.base, list(holding.intervals), holding.latest_ns
    if plan.base is not None:
        base = next(each.boundary for each in intervals if each.number == plan.base)
        latest_ns = max([latest_ns, *(each.to_time_ns for each in intervals if each.number <= plan.base)])
        intervals = [each for each in intervals if each.number > plan.base]
    for span in plan.joins:
        parts = [each for each in intervals if span.first <= each.first and each.number <= span.last]
        assert parts[0].first == span.first
        assert parts[-1].number == span.last
        made = parts[-1]._replace(
            covers=span.last - span.first + 1, from_write=parts[0].from_write, restorable_by_write=False,
            rewinds=parts[0].rewinds, to_time_ns=max(each.to_time_ns for each in parts),
            blocks_changed=sum(each.blocks_changed for each in parts),
            stored={name: sum(each.stored[name] for each in parts) for name in parts[0].stored} | {"writes": 0},
        )  # fmt: skip
        intervals = sorted([made, *(each for each in intervals if each not in parts)], key=lambda each: each.number)
    intervals = [each._replace(restorable_by_write=False) if each.number in plan.thin else each for each in intervals]
    numbers = {each.number for each in intervals}
    assert set(plan.thin) <= numbers
    return Holding(base, intervals, numbers & set(holding.indexed), latest_ns)


def points(holding: Holding) -> set[int]:
    """The writes that can be restored."""
    found = {each.write for each in holding.boundaries()}
    for each in holding.intervals:
        if each.restorable_by_write:
            found |= set(range(each.from_write, each.to_write + 1))
    return found


def unpinned(holding: Holding, pins: Pins) -> list[Interval]:
    """Intervals that can be restored by write and hold no pinned one."""
    by_write = [each for each in holding.intervals if each.restorable_by_write]
    return [each for each in by_write if not any(each.from_write <= p < each.to_write for p in pins.points)]


seconds = st.one_of(st.none(), st.integers(0, 12 * 86400).map(float))
policies = st.builds(Policy, seconds, seconds, seconds, seconds)
gaps = st.lists(
    st.one_of(st.integers(1, 90).map(lambda n: n * MINUTE_NS), st.sampled_from([DAY_NS, -3 * HOUR_NS])), max_size=60
)


@st.composite
def pinned(draw: st.DrawFn, count: int) -> Pins:
    newest = draw(st.integers(max(0, count - 2), count))
    chosen = draw(st.lists(st.integers(0, 10 * count), max_size=4))
    return Pins(newest, frozenset(chosen), draw(st.one_of(st.none(), st.integers(0, count))))


@given(gaps=gaps, policy=policies, data=st.data())
def test_what_is_pinned_stays_and_nothing_is_done_twice(gaps: list[int], policy: Policy, data: st.DataObject) -> None:
    holding = listing(gaps)
    pins = data.draw(pinned(len(gaps)))
    now = START_NS + sum(gaps) + data.draw(st.integers(0, DAY_NS))
    found = plan(holding, policy, pins, now)
    left = carried_out(holding, found)
    assert points(left) <= points(holding)
    assert set(pins.points) & points(holding) <= points(left), "a pinned point"
    if pins.verified is not None:
        assert pins.verified in {each.number for each in left.boundaries()}, "the newest verified boundary"
    untouched = [each for each in holding.intervals if each.number >= pins.at]
    assert untouched == [each for each in left.intervals if each.number >= pins.at], "what the image may need"
    assert not plan(left, policy, pins, now), "the plan was carried out"
    chain = [left.base.number, *(each.number for each in left.intervals)]
    assert [each.first - 1 for each in left.intervals] == chain[:-1], "they follow each other"


@given(gaps=gaps, policy=policies, data=st.data())
def test_the_newest_boundary_of_each_hour_and_day_stays(gaps: list[int], policy: Policy, data: st.DataObject) -> None:
    holding = listing(gaps)
    pins = Pins(at=len(gaps))
    left = carried_out(holding, plan(holding, policy, pins, START_NS + 10**20))
    kept = {each.number for each in left.boundaries()}
    times = as_told(holding, now_ns := START_NS + 10**20)
    now = min(now_ns, max(times.values()))
    for size, keep in ((HOUR_NS, policy.hourly), (DAY_NS, policy.daily)):
        newest = {times[each.number] // size: each for each in holding.boundaries()}
        for each in newest.values():
            if keep is None or times[each.number] > now - keep * 10**9:
                assert each.number in kept
    for each in holding.boundaries():
        if policy.boundaries is None or times[each.number] > now - policy.boundaries * 10**9:
            assert each.number in kept
    for part in holding.intervals:
        if policy.writes is None or times[part.number] > now - policy.writes * 10**9:
            assert part in left.intervals, "any write of so long"


def as_told(holding: Holding, now_ns: int) -> dict[int, int]:
    """Times of boundaries, one after the other: one that went back is taken for the next that has passed all before."""
    found = {}
    boundaries = holding.boundaries()
    for at, each in enumerate(boundaries):
        behind = [
            one.time_ns for i, one in enumerate(boundaries)
            if i >= at and one.time_ns >= max((o.time_ns for o in boundaries[:i]), default=0)
        ]  # fmt: skip
        found[each.number] = behind[0] if behind else now_ns
    return found


@given(gaps=gaps, policy=policies, data=st.data())
def test_a_longer_policy_never_keeps_less(gaps: list[int], policy: Policy, data: st.DataObject) -> None:
    holding = listing(gaps)
    name = data.draw(st.sampled_from(["writes", "boundaries", "hourly", "daily"]))
    more: dict[str, Any] = {
        name: None if getattr(policy, name) is None else getattr(policy, name) + data.draw(st.integers(0, 10**6))
    }
    longer = replace(policy, **more)
    pins = data.draw(pinned(len(gaps)))
    now = START_NS + sum(gaps)
    short, long = (points(carried_out(holding, plan(holding, each, pins, now))) for each in (policy, longer))
    assert short <= long


@given(gaps=gaps, first=policies, second=policies, data=st.data())
def test_what_one_policy_left_another_takes_up(
    gaps: list[int], first: Policy, second: Policy, data: st.DataObject
) -> None:
    holding = listing(gaps)
    pins = data.draw(pinned(len(gaps)))
    now = START_NS + sum(gaps)
    left = carried_out(holding, plan(holding, first, pins, now))
    again = carried_out(left, plan(left, second, pins, now + DAY_NS))
    assert points(again) <= points(left)
    assert set(pins.points) & points(holding) <= points(again)
    assert not plan(again, second, pins, now + DAY_NS)


def test_by_default_nothing_ever_goes() -> None:
    holding = listing([DAY_NS] * 4000)
    assert Policy().keeps_all
    assert not plan(holding, Policy(), Pins(at=4000), START_NS + 10**20)


def test_a_cluster_that_stands_still_loses_nothing() -> None:
    holding = listing([MINUTE_NS] * 100)
    policy = Policy(3600.0, 7200.0, 86400.0, 10 * 86400.0)
    pins = Pins(at=100)
    left = carried_out(holding, plan(holding, policy, pins, START_NS + 100 * MINUTE_NS))
    assert not plan(left, policy, pins, START_NS + 10**18), "years later, with nothing written"


def test_a_clock_that_was_ahead_for_a_while_does_not_take_the_rest_with_it() -> None:
    """Boundaries of next year, captured while the clock was wrong; it is right again when this runs."""
    holding = listing([MINUTE_NS] * 50 + [365 * DAY_NS] + [MINUTE_NS] * 3)
    policy = Policy(86400.0, 86400.0, 0.0, 0.0)
    assert not plan(holding, policy, Pins(at=54), START_NS + 60 * MINUTE_NS)


def test_an_hour_is_joined_once() -> None:
    """Boundary by boundary it would be written anew with each: twelve times as much."""
    holding = listing([5 * MINUTE_NS] * 400)
    policy = Policy(0.0, 3600.0, 10 * 86400.0, None)
    joins: list[Span] = []
    left = listing([5 * MINUTE_NS] * 12)
    for count in range(13, 400):
        left = replace(left, intervals=[*left.intervals, holding.intervals[count - 1]], indexed=holding.indexed)
        found = plan(left, policy, Pins(at=count), START_NS + 10**18)
        joins += found.joins
        left = carried_out(left, found)
    assert len(joins) == len({span.first for span in joins})
    assert {span.last - span.first + 1 for span in joins[1:]} == {12}


def test_what_lies_on_two_sides_of_a_seam_is_not_joined() -> None:
    holding = listing([MINUTE_NS] * 20, [1] * 10 + [2] * 10)
    parts = list(holding.intervals)
    parts[4] = parts[4]._replace(rewinds=(Rewind(41, 45, 12),))
    back = parts[14].boundary
    parts[14] = parts[14]._replace(boundary=back._replace(checkpoint_lsn=3))
    holding = Holding(holding.base, parts, frozenset(holding.indexed) - {18})
    found = plan(holding, Policy(0.0, 0.0, None, None), Pins(at=20), START_NS + DAY_NS)
    assert found.base is None
    edges = {span.last for span in found.joins} | {span.first - 1 for span in found.joins}
    assert found.joins == ()
    later = Holding(holding.base, [*parts, interval(21, START_NS + 2 * DAY_NS, timeline=2)], holding.indexed)
    found = plan(later, Policy(0.0, 0.0, 0.0, 0.0), replace(Pins(at=21), verified=0), START_NS + 3 * DAY_NS)
    edges = {0, *(span.last for span in found.joins), *found.thin}
    assert {4, 10, 14, 17, 18, 20} <= edges
    assert found.joins == (Span(1, 4), Span(5, 10), Span(11, 14), Span(15, 17), Span(19, 20))


@given(gaps=gaps, missing=st.integers(1, 10**7), data=st.data(), may_make=st.booleans())
def test_room_is_made_from_the_oldest_on_and_never_from_what_is_pinned(
    gaps: list[int], missing: int, data: st.DataObject, may_make: bool
) -> None:
    holding = listing(gaps)
    pins = data.draw(pinned(len(gaps)))
    there = points(holding)
    while stages := relieve(holding, pins, missing, may_make=may_make):
        found = stages[0]
        before = points(holding)
        back = sum(thinned_bytes(each) for each in holding.intervals if each.number in found.thin)
        if found.base is not None:
            back += sum(sum(e.stored.values()) for e in holding.intervals if e.number <= found.base)
        if not found.thin:
            thinnable = [e for e in unpinned(holding, pins) if e.number < pins.at]
            assert not may_make or not thinnable
        if found.joins:
            assert may_make
            assert not relieve(holding, pins, missing, may_make=False), "the base could have moved"
            back += 1
        holding = carried_out(holding, found)
        assert points(holding) < before, "it comes to an end"
        missing -= back
    assert set(pins.points) & there <= points(holding)
    if pins.verified is not None:
        assert pins.verified in {each.number for each in holding.boundaries()}
    assert {each.number for each in holding.intervals} >= {*range(max(1, pins.at), len(gaps) + 1)}, "the newest"
    thinned = [each.number for each in holding.intervals if not each.restorable_by_write]
    free = unpinned(holding, pins)
    assert not thinned or not free or max(thinned) < min(each.number for each in free), "the oldest first"


def test_fresh_points_of_a_clock_that_was_behind_stay() -> None:
    """A machine comes up in 1970, and the network tells the time some minutes later."""
    behind = 50 * 365 * DAY_NS
    holding = listing([MINUTE_NS] * 50 + [-behind] + [MINUTE_NS] * 3 + [behind] + [MINUTE_NS] * 3)
    policy = Policy(3600.0, 3600.0, 0.0, 0.0)
    now = START_NS + 60 * MINUTE_NS
    assert not plan(holding, policy, Pins(at=58), now), "all of it is of one hour"
    early = Holding(holding.base, holding.intervals[:53], holding.indexed)
    assert not plan(early, policy, Pins(at=53), now - behind), "also while the clock is behind"
    assert not plan(early, policy, Pins(at=53), now)
    later = Holding(holding.base, [*holding.intervals, interval(59, now + 2 * HOUR_NS)], holding.indexed)
    assert plan(later, policy, Pins(at=59), now + DAY_NS).base == 58, "they do not stay for ever"


def test_fresh_points_of_a_clock_that_was_behind_stay_when_all_before_them_went() -> None:
    holding = listing([MINUTE_NS] * 3)
    holding = replace(holding, latest_ns=START_NS + DAY_NS)
    late = Holding(holding.base, [*holding.intervals, interval(4, START_NS + 2 * DAY_NS)], holding.indexed)
    policy = Policy(3600.0, 3600.0, 0.0, 0.0)
    assert plan(late, policy, Pins(at=4), START_NS + 10 * DAY_NS).base == 3
    assert not plan(replace(late, latest_ns=START_NS + DAY_NS), policy, Pins(at=4), START_NS + 10 * DAY_NS)


@given(gaps=gaps, data=st.data())
def test_a_clock_that_jumps_never_makes_a_boundary_older_than_what_came_before(
    gaps: list[int], data: st.DataObject
) -> None:
    holding = listing(gaps)
    now = START_NS + sum(gaps) + data.draw(st.integers(-DAY_NS, DAY_NS))
    times = times_of(holding, now)
    in_order = [times[each.number] for each in holding.boundaries()]
    assert in_order == sorted(in_order)
    assert in_order[-1] <= now
    for each in holding.boundaries():
        assert times[each.number] >= each.time_ns or each.time_ns > now


def test_days_behind_an_old_pin_are_not_joined_to_the_same_each_day() -> None:
    """Else what was let go of in years is copied every day."""
    pins = Pins(at=0, points=frozenset({0}))
    policy = Policy(0.0, 0.0, 0.0, 7 * 86400.0)
    holding = listing([])
    copied = 0
    for day in range(1, 400):
        made = interval(day, START_NS + day * DAY_NS)
        holding = replace(holding, intervals=[*holding.intervals, made], indexed={*holding.indexed, day})
        found = plan(holding, policy, replace(pins, at=day), START_NS + 10**18)
        for span in found.joins:
            copied += sum(e.blocks_changed for e in holding.intervals if span.first <= e.first <= span.last)
        holding = carried_out(holding, found)
    assert len(holding.intervals) < 8 + 10
    assert copied < 10 * sum(each.blocks_changed for each in holding.intervals)


def test_room_is_made_behind_a_pin_that_the_base_cannot_pass() -> None:
    """The oldest first, no more than it takes; never where an open view reads what it would be joined from."""
    holding = listing([DAY_NS] * 20)
    pins = Pins(at=20, points=frozenset({5, 100}))
    while (stages := relieve(holding, pins, 1)) and stages[0].thin:
        holding = carried_out(holding, stages[0])
    (found,) = stages
    assert found == Plan(joins=(Span(2, 3),))
    (found,) = relieve(holding, replace(pins, points=frozenset({5, 60, 100}), shown=frozenset({60})), 10**9)
    assert max(span.last for span in found.joins) <= 6
    (found,) = relieve(holding, pins, 10**9)
    assert {span.last for span in found.joins} <= {*range(3, 11), *range(12, 20)}
    assert not relieve(holding, replace(pins, shown=frozenset({5})), 10**9)


def test_what_cannot_be_read_is_passed_over() -> None:
    holding = listing([MINUTE_NS] * 10)
    pins = Pins(at=10)
    bad: Step = ("thin", Span(1, 1))
    assert relieve(holding, pins, 1)[0] == Plan(thin=(1,))
    assert relieve(holding, pins, 1, avoid={bad})[0] == Plan(thin=(2,))
    policy = Policy(0.0, 0.0, None, None)
    holding = replace(holding, intervals=[*holding.intervals, interval(11, START_NS + DAY_NS)])
    later = START_NS + 2 * DAY_NS
    pins = Pins(at=11, verified=0)
    assert plan(holding, policy, pins, later).joins == (Span(1, 10),)
    found = plan(holding, policy, pins, later, {("join", Span(1, 10))})
    assert found == Plan(thin=tuple(range(1, 11))), "what could not be joined is thinned"
    assert plan(holding, policy, pins, later, {("thin", Span(4, 4))}).joins == (Span(1, 3), Span(5, 10))
    gone = Policy(0.0, 0.0, 0.0, 0.0)
    assert plan(holding, gone, Pins(at=11), later).base == 10
    assert plan(holding, gone, Pins(at=11), later, {("base", Span(10, 10))}).base == 9


def test_no_more_goes_than_was_shown() -> None:
    shown = [Plan(3, (Span(4, 6),), (7, 8)), Plan(thin=(9,))]
    assert Plan(3, (Span(4, 6),), (7, 9, 10)).within(shown) == Plan(3, (Span(4, 6),), (7, 9))
    assert Plan(4, (Span(5, 6), Span(7, 8)), (5, 11)).within(shown) == Plan(thin=(5,))
    assert Plan(2, (), (3, 4)).within(shown) == Plan(2, (), (3, 4))
    assert not Plan(1, (Span(2, 3),), (4,)).within([])
