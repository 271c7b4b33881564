"""The wall clock was set: what was asked by time then means another moment."""

from __future__ import annotations

import numpy as np

from pgcdp.capture.clocks import CLOCK, ClockWatch, Jump, jumps, remembered, told, turned_back
from pgcdp.capture.journal import BatchRun
from pgcdp.records import RECORD, Boundary, Interval, Position

SECOND = 10**9
BEGIN = 1_700_000_000 * SECOND


def run(first: int, wall: list[int], boot: list[int], segment: int = 1, end: int | None = None) -> BatchRun:
    records = np.zeros(len(wall), dtype=RECORD)
    records["number"] = np.arange(first, first + len(wall))
    records["wall_ns"], records["boot_ns"] = wall, boot
    last = segment if end is None else end
    return BatchRun(
        1, records, np.empty(0, np.uint8), np.zeros(len(wall), np.int64), np.array([first + len(wall) - 1]),
        Position(segment, 4096), Position(last, 8192),
    )  # fmt: skip


def even(count: int, begin: int = 0) -> list[int]:
    return [begin + second * SECOND for second in range(count)]


def test_a_clock_that_goes_with_the_boot_clock_makes_no_jump() -> None:
    watch = ClockWatch()
    assert watch.take(run(1, even(100, BEGIN), even(100))) == []
    assert watch.take(run(101, even(100, BEGIN + 100 * SECOND), even(100, 100 * SECOND))) == []
    assert [each.level for each in told(watch.jumps, [])] == ["ok"]


def test_a_jump_back_inside_a_run_names_the_write_behind_it() -> None:
    wall = [BEGIN, BEGIN + SECOND, BEGIN - 3600 * SECOND]
    assert ClockWatch().take(run(7, wall, even(3))) == [Jump(9, BEGIN - 3600 * SECOND, -3602.0)]


def test_a_jump_between_two_runs_of_a_segment_is_seen() -> None:
    watch = ClockWatch()
    watch.take(run(1, [BEGIN], [SECOND]))
    found = watch.take(run(2, [BEGIN + 1000 * SECOND], [2 * SECOND]))
    assert found == [Jump(2, BEGIN + 1000 * SECOND, 999.0)]
    assert [each.level for each in told(watch.jumps, [])] == ["warning"]


def test_a_reboot_is_no_jump() -> None:
    """The boot clock begins anew, and the next run of the engine writes to another segment."""
    watch = ClockWatch()
    watch.take(run(1, [BEGIN], [5000 * SECOND]))
    assert watch.take(run(2, [BEGIN + 300 * SECOND], [60 * SECOND], segment=2)) == []
    assert watch.take(run(3, [BEGIN + 9000 * SECOND], [8000 * SECOND], segment=3)) == []  # a boot that lasted longer
    across = run(4, [BEGIN + 9001 * SECOND, BEGIN + 9900 * SECOND], [8001 * SECOND, 30 * SECOND], segment=3, end=4)
    assert watch.take(across) == []


def test_a_jump_is_seen_where_the_journal_goes_on_in_the_next_segment() -> None:
    watch = ClockWatch()
    watch.take(run(1, [BEGIN], [SECOND]))
    assert len(watch.take(run(2, [BEGIN + 100 * SECOND], [2 * SECOND], segment=2))) == 1


def test_a_clock_that_is_slewed_is_not_set() -> None:
    """chrony may correct 8 s of 100: records far from each other then differ by more than a second."""
    assert list(jumps(np.array([0, 108 * SECOND]), np.array([0, 100 * SECOND]))) == []


def interval(number: int, begin: int, end: int) -> Interval:
    boundary = Boundary(number, number * 10, end, 1, 1, 1, 1, "requested")
    return Interval(number, number * 10 - 9, number * 10, begin, end, boundary, 10, 10, 10, {})


def test_intervals_that_begin_before_the_end_of_the_one_before_are_found() -> None:
    """Also by who has no agent to ask, and of long ago."""
    chain = [
        interval(1, 0, 100 * SECOND),
        interval(2, 100 * SECOND, 200 * SECOND),
        interval(3, 50 * SECOND, 60 * SECOND),
    ]
    assert [each.number for each in turned_back(chain)] == [3]
    assert [each.level for each in told([], turned_back(chain))] == ["warning"]


def test_jumps_that_an_agent_wrote_down_are_told_once_and_in_order() -> None:
    """It is dead by now, and its successor took the same part of the journal again."""
    events = [{"event": CLOCK, "write": write, "to_ns": 7, "seconds": 5.0} for write in (9, 4, 9)]
    assert remembered([*events, {"event": "capture"}]) == [Jump(4, 7, 5.0), Jump(9, 7, 5.0)]
