"""Pure: the transactions that a point is between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgcdp.recovery.commits import History, is_committed


@dataclass(frozen=True, slots=True)
class Around:
    """What a point is between: the last transaction in, the first one out, and how many committed behind it.

    `also_out`: those that committed behind it and still before what was asked for. `unknown`: intervals that may hold
    others.
    """

    last_in: np.void | None
    first_out: np.void | None
    out: int
    also_out: list[np.void]
    unknown: list[int]


def around(write: int, lsn: int | None, history: History, until_lsn: int | None = None) -> Around:
    """What a point is between; `until_lsn`: where what was asked for is, when that is later."""
    last_in: np.void | None = None
    first_out: np.void | None = None
    out = 0
    also: list[np.void] = []
    doubt_from = 0  # the interval from which on others may be
    first_in: int | None = None  # the interval whose first transaction that is out was not looked at
    for number in reversed(history.numbers):
        counted = _committed_behind(history.summary(number), write, until_lsn or 0)
        if counted is not None:
            out += counted
            first_in = number if counted else first_in
            continue
        ends = history.commits(number).ends
        committed = is_committed(ends)
        within = ends["write"] < write
        within |= (ends["write"] == write) & ((ends["lsn"] < lsn) if lsn is not None else True)
        outside = np.flatnonzero(committed & ~within)
        out += len(outside)
        if len(outside):
            first_out, first_in = ends[outside[0]], None
            also[:0] = ends[outside[ends["lsn"][outside] < (until_lsn or 0)]]
        inside = np.flatnonzero(committed & within)
        if len(inside):
            last_in = ends[inside[-1]]
            seen = all(event["end_lsn"] <= int(last_in["lsn"]) for event in history.lost(number))
            doubt_from = history.key(number) + 1 if seen else history.key(number)
            break
    if first_in is not None:
        ends = history.commits(first_in).ends
        first_out = ends[np.argmax(is_committed(ends))]
    return Around(last_in, first_out, out, also, history.doubtful_within(doubt_from, history.opened))


def _committed_behind(said: Mapping[str, Any] | None, write: int, until_lsn: int) -> int | None:
    """How many committed in an interval, when all of them are behind `write` and `until_lsn`; None: look into it."""
    if said is None or not said["count"]:
        return None if said is None else 0
    if "committed" not in said or said["min_write"] <= write or said["min_lsn"] < until_lsn:
        return None
    return int(said["committed"])
