"""Targets: each resolves to what its definition says, or to an error that says what exists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pgcdp.errors import TargetError
from pgcdp.records import Boundary, Interval, Target
from pgcdp.recovery.target import Listing, resolve, window

BASE_WRITE = 50
BASE_TIME = 1000


def boundary(number: int, write: int, time_ns: int) -> Boundary:
    return Boundary(number, write, time_ns, 0, 0, 1, 0, "period")


def listing_of(walls: list[list[int]], open_walls: list[int], base: int = 0) -> tuple[Listing, list[int]]:
    """Intervals with these wall clocks behind boundary `base` at write 50; and the clock of every write from 50 on."""
    write, intervals = BASE_WRITE, []
    table: dict[int | None, NDArray[np.int64]] = {None: np.array(open_walls, dtype=np.int64)}
    for number, times in enumerate(walls, base + 1):
        end = write + len(times)
        intervals.append(
            Interval(
                number,
                write + 1,
                end,
                min(times),
                max(times),
                boundary(number, end, times[-1]),
                len(times),
                0,
                0,
                {},
            )
        )
        table[number] = np.array(times, dtype=np.int64)
        write = end
    listing = Listing(boundary(base, BASE_WRITE, BASE_TIME), intervals, write + len(open_walls), lambda n: table[n])
    return listing, [BASE_TIME, *(time for times in walls for time in times), *open_walls]


clocks = st.lists(st.lists(st.integers(990, 1100), min_size=1, max_size=12), max_size=6)


@settings(max_examples=200)
@given(walls=clocks, open_walls=st.lists(st.integers(990, 1100), max_size=12), base=st.integers(0, 5))
def test_every_write_of_the_window_and_no_other(walls: list[list[int]], open_walls: list[int], base: int) -> None:
    listing, times = listing_of(walls, open_walls, base)
    ends = {interval.to_write: interval.number for interval in listing.intervals} | {BASE_WRITE: base}
    newest = BASE_WRITE + len(times) - 1
    for write in range(BASE_WRITE, newest + 1):
        point = resolve(Target("write", write), listing)
        assert (point.write, point.boundary) == (write, ends.get(write))
        assert point.time_ns == times[write - BASE_WRITE]
        inside = [i.number for i in listing.intervals if i.from_write <= write <= i.to_write]
        expected = base if write == BASE_WRITE else inside[0] if inside else None
        assert point.interval == expected
    for write in (-1, 0, 1, BASE_WRITE - 1, newest + 1, 10**9):
        with pytest.raises(TargetError, match=f"writes {BASE_WRITE} to {newest} can be restored") as caught:
            resolve(Target("write", write), listing)
        assert caught.value.exit_code == 3
        assert caught.value.hint is not None
        assert f"--target-write takes {BASE_WRITE} to {newest}" in caught.value.hint
    assert resolve(Target("newest"), listing).write == newest
    assert [point.write for point in window(listing)] == [BASE_WRITE, newest]


@settings(max_examples=100)
@given(walls=clocks, base=st.integers(0, 5))
def test_boundaries(walls: list[list[int]], base: int) -> None:
    listing, _ = listing_of(walls, [], base)
    for number in range(base, base + len(walls) + 1):
        point = resolve(Target("boundary", number), listing)
        assert point.interval == point.boundary == number
    for number, words in ((base + len(walls) + 1, "does not exist yet"), (-1, "does not exist")):
        with pytest.raises(TargetError, match=words):
            resolve(Target("boundary", number), listing)
    if base:
        with pytest.raises(TargetError, match="cannot be restored any more"):
            resolve(Target("boundary", base - 1), listing)


def test_a_quiet_cluster_can_be_restored_to_now() -> None:
    listing, _ = listing_of([[1001, 1002]], [1003])
    with pytest.raises(TargetError, match="later than the newest write"):
        resolve(Target("time", 2000), listing)
    assert resolve(Target("time", 2000), replace(listing, quiet_until_ns=2000)).write == 53
    with pytest.raises(TargetError):
        resolve(Target("time", 2001), replace(listing, quiet_until_ns=2000))
