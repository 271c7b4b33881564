"""How long until it is full: too late a warning is as bad as none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcdp.horizon import LEAST_SECONDS, Meter, Piece, Rate, in_words, present, rate_of, until_full

HOUR, DAY = 3600.0, 86400.0


def test_a_steady_rate_tells_the_moment() -> None:
    meter = Meter(window=600, every=15)
    for second in range(0, 1200, 15):
        assert meter.due(second)
        meter.read(second, 1_000_000 + 2000 * second)
        assert not meter.due(second + 14)
    rate = meter.rate()
    assert rate is not None
    assert rate.bytes_per_second == pytest.approx(2000)
    assert 600 <= rate.over_seconds <= 615
    assert until_full(2_000_000, rate) == pytest.approx(1000)


def test_what_began_lately_is_not_diluted_by_what_was_before_the_window() -> None:
    meter = Meter(window=600, every=60)
    for minute in range(60):
        meter.read(minute * 60.0, 0.0)
    for minute in range(60, 71):
        meter.read(minute * 60.0, (minute - 60) * 60 * 5000.0)
    rate = meter.rate()
    assert rate is not None
    assert rate.bytes_per_second == pytest.approx(5000)


def test_too_little_tells_nothing() -> None:
    meter = Meter(window=600, every=1)
    assert meter.rate() is None
    meter.read(0, 0)
    meter.read(LEAST_SECONDS - 1, 1 << 40)
    assert meter.rate() is None
    assert until_full(1, None) is None
    assert rate_of([], HOUR, HOUR) is None


def test_what_is_full_is_full_also_without_a_rate() -> None:
    assert until_full(0, None) == 0
    assert until_full(-5, Rate(1, 60)) == 0


def test_what_shrinks_never_gets_full() -> None:
    meter = Meter(window=600, every=60)
    meter.read(0, 1000)
    meter.read(600, 10)
    assert until_full(1, meter.rate()) is None


def test_a_busy_hour_is_not_hidden_by_a_quiet_day() -> None:
    quiet = [Piece(hour * HOUR, (hour + 1) * HOUR, 0) for hour in range(23)]
    busy = Piece(23 * HOUR, DAY, 3600 * 1000)
    rate = present([*quiet, busy], DAY, (HOUR, DAY))
    assert rate is not None
    assert rate.bytes_per_second == pytest.approx(1000)


def test_idle_time_since_the_last_interval_counts() -> None:
    rate = rate_of([Piece(0, HOUR / 2, 3600 * 500)], HOUR, HOUR)
    assert rate == Rate(500, HOUR)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 1 << 40)), max_size=20))
def test_no_times_make_it_fail_or_negative(raw: list[tuple[float, float, int]]) -> None:
    """Also intervals that end before they begin, or in the future: clocks are set."""
    rate = present([Piece(*each) for each in raw], 5e5, (HOUR, DAY))
    assert rate is None or rate.bytes_per_second >= 0
    if rate is not None and rate.bytes_per_second > 0:
        left = until_full(1 << 30, rate)
        assert left is not None
        assert left > 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.2, "3.2 s"), (130, "2 min 10 s"), (3 * HOUR, "3 h 0 min"), (36 * HOUR, "36 h 0 min"), (50 * HOUR, "2 days"),
     (400 * DAY, "more than a year")],
)  # fmt: skip
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
