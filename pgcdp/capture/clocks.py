"""Jumps of the wall clock, as the journal shows them: each record bears the wall clock and the boot clock.

The boot clock is never set, and goes on in suspend. While both run, their difference moves only as fast as a time
service slews the wall clock. Records of one segment are of one run of the engine, so of one boot. Those of several need
not be: there only records that follow each other at once by the boot clock are compared, which after a reboot is so
only where the boot before was just as short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.journal import BatchRun
from pgcdp.records import Interval, Remark
from pgcdp.units import format_duration, format_time

JUMP_NS = 1_000_000_000
"""Less is not told: a slewed clock, and the time between the two readings."""
SLEW = 0.1
"""Part of the elapsed time that a time service may correct the clock by without setting it (chrony: at most 8 %)."""
AT_ONCE_NS = 10_000_000_000
CLOCK = "clock"
"""The event: {"event", "write", "to_ns", "seconds"}, a `Jump`."""
KEPT = 10
"""So many of the newest jumps are remembered."""


@dataclass(frozen=True, slots=True)
class Jump:
    """The wall clock was set `seconds` ahead (negative: back) just before write `write`, to `to_ns`."""

    write: int
    to_ns: int
    seconds: float


class ClockWatch:
    """Is shown what is taken from the journal, in order."""

    def __init__(self) -> None:
        self.jumps: deque[Jump] = deque(maxlen=KEPT)
        self._last: tuple[int, int] | None = None
        self._segment = -1

    def take(self, run: BatchRun) -> list[Jump]:
        """The jumps in it, or between what was shown before and its beginning."""
        if not len(run):
            return []
        wall, boot = run.records["wall_ns"], run.records["boot_ns"]
        one_boot = run.position.segment == run.end.segment == self._segment
        if self._last is not None:
            wall = np.concatenate([np.array([self._last[0]], dtype=np.int64), wall])
            boot = np.concatenate([np.array([self._last[1]], dtype=np.int64), boot])
        first = len(run) - len(wall) + 1  # of the records: that behind the first pair
        found = [
            Jump(int(run.records["number"][first + at]), int(wall[at + 1]), moved / 1e9)
            for at, moved in jumps(wall, boot, None if one_boot else AT_ONCE_NS)
        ]
        self._segment = run.end.segment
        self._last = int(wall[-1]), int(boot[-1])
        self.jumps.extend(found)
        return found


def jumps(wall: NDArray[np.int64], boot: NDArray[np.int64], at_once: int | None = None) -> Iterator[tuple[int, int]]:
    """(i, ns) where the wall clock moved by so much more than the boot clock from value i to i + 1; both in ns.

    With `at_once` only where by the boot clock not more than that went by.
    """
    elapsed = np.diff(boot)
    moved = np.diff(wall) - elapsed
    far = np.abs(moved) > JUMP_NS + SLEW * np.maximum(elapsed, 0)
    if at_once is not None:
        far &= (elapsed >= 0) & (elapsed <= at_once)
    for at in np.flatnonzero(far):
        yield int(at), int(moved[at])


def told(found: Iterable[Jump], backward: Iterable[Interval]) -> Iterator[Remark]:
    """What it means; `backward` as `turned_back` tells."""
    name = "clock"
    found, turned = list(found), list(backward)
    if found:
        newest = found[-1]
        way = "ahead" if newest.seconds > 0 else "back"
        yield Remark(
            name, "warning",
            f"the wall clock was set {len(found)} times of late, at last {format_duration(abs(newest.seconds))} {way}, "
            f"to {format_time(newest.to_ns)} before write {newest.write}: a --target-time around there may mean "
            "another moment than it seems",
            "name a transaction, an LSN or a write instead, and let a time service slew the clock (chrony, ntpd)",
        )  # fmt: skip
    if turned:
        last = turned[-1]
        yield Remark(
            name, "warning",
            f"{len(turned)} intervals begin before the one before them ended, by the wall clock; the last one is "
            f"{last.number}: a --target-time there is ambiguous",
            "name a transaction, an LSN or a write instead",
        )  # fmt: skip
    if not found and not turned:
        yield Remark(name, "ok", "no jump seen")


def remembered(events: Iterable[Mapping[str, Any]]) -> list[Jump]:
    """Those of a history's events; an agent that takes a part of the journal again tells them again."""
    found = {int(each["write"]): each for each in events if each.get("event") == CLOCK}
    return [Jump(write, int(each["to_ns"]), float(each["seconds"])) for write, each in sorted(found.items())]


def turned_back(intervals: Iterable[Interval]) -> list[Interval]:
    """Of intervals in order those that begin, by the wall clock, before the end of the one before them."""
    return [
        each for before, each in pairwise(intervals) if each.from_time_ns < before.to_time_ns - JUMP_NS
    ]  # fmt: skip
