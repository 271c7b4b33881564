"""How long until something is full, at the present rate. Pure: from what was measured, without looking at anything."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from pgcdp.units import format_duration, format_size

YEAR = 365 * 86400.0
LEAST_SECONDS = 60.0
"""What was seen for less time tells no rate."""


class Rate(NamedTuple):
    """Bytes a second, as seen over so many seconds."""

    bytes_per_second: float
    over_seconds: float

    def __str__(self) -> str:
        a_day = self.bytes_per_second * 86400
        told = f"{format_size(int(a_day))} a day"
        if self.bytes_per_second >= 64 << 10:
            told = f"{format_size(int(self.bytes_per_second))} a second"
        return f"{told}, the last {in_words(self.over_seconds)}"


class Meter:
    """Values of something that grows, as they were read over the last `window` seconds; times are monotonic seconds."""

    def __init__(self, window: float, every: float) -> None:
        self._window = window
        self._every = every
        self._seen: deque[tuple[float, float]] = deque()

    def due(self, now: float) -> bool:
        """Whether the newest value is old enough for another one."""
        return not self._seen or now - self._seen[-1][0] >= self._every

    def read(self, now: float, value: float) -> None:
        """It is `value` now. One that is less than before (made anew, given back) does not begin anew: it may be so."""
        self._seen.append((now, value))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._window:
            self._seen.popleft()

    def rate(self) -> Rate | None:
        """None while too little was seen. Less than zero when it shrinks."""
        if len(self._seen) < 2:
            return None
        (then, before), (now, value) = self._seen[0], self._seen[-1]
        return rate_between(then, before, now, value)


def rate_between(then: float, before: float, now: float, value: float) -> Rate | None:
    """From two readings."""
    seconds = now - then
    return None if seconds < LEAST_SECONDS else Rate((value - before) / seconds, seconds)


class Piece(NamedTuple):
    """So many bytes came between two times, in seconds: an interval."""

    begin: float
    end: float
    bytes: int


def rate_of(pieces: Iterable[Piece], now: float, window: float) -> Rate | None:
    """From those that ended in the last `window` seconds, the time since then included; None when that is too little.

    What ends in the future, since the clock was set, is taken as of now.
    """
    recent = [each for each in pieces if each.end > now - window]
    if not recent:
        return None
    begin = min(min(each.begin for each in recent), now)
    return rate_between(begin, 0, now, sum(each.bytes for each in recent))


def present(pieces: Iterable[Piece], now: float, windows: Iterable[float]) -> Rate | None:
    """The fastest over several windows: what began an hour ago is not hidden by a quiet day."""
    known = list(pieces)
    rates = [rate for window in windows if (rate := rate_of(known, now, window)) is not None]
    return max(rates, default=None)


def until_full(room: int, rate: Rate | None) -> float | None:
    """Seconds until `room` bytes are gone; None when that is not known, or never happens at this rate."""
    if room <= 0:
        return 0.0
    if rate is None or rate.bytes_per_second <= 0:
        return None
    return room / rate.bytes_per_second


def in_words(seconds: float) -> str:
    """ "12 min 5 s", "3 h 10 min", "12 days", "more than a year"."""
    if seconds > YEAR:
        return "more than a year"
    if seconds >= 2 * 86400:
        return f"{int(seconds // 86400)} days"
    return format_duration(seconds)
