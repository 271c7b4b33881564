"""The names in a directory, read again only when they may be others: there can be ten thousand, and one command asks
some ten times.

A change of a directory sets its time of change (ctime, which nobody can set back). Two changes within one tick of the
filesystem's clock bear the same time, so what was read within a tick of the last change is not kept: as git does with
files that are "racily clean".
"""

from __future__ import annotations

import os
import time
from pathlib import Path

TICK_NS = 100_000_000
"""More than a kernel's coarse clock is behind: a tick of it is 1 to 10 ms."""
COARSE_TICK_NS = 2_500_000_000
"""The same for filesystems whose times are whole seconds."""
KEPT = 16
"""Directories whose names are kept; a command has four."""

_kept: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {}


def entries(directory: Path) -> tuple[str, ...]:
    """What `os.listdir` says. FileNotFoundError when it is missing."""
    place = os.fspath(directory)
    status = os.stat(place)
    identity = status.st_dev, status.st_ino, status.st_ctime_ns
    kept = _kept.get(place)
    if kept is not None and kept[0] == identity:
        return kept[1]
    names = tuple(os.listdir(place))
    tick = TICK_NS if status.st_ctime_ns % 1_000_000_000 else COARSE_TICK_NS
    if 0 <= status.st_ctime_ns < time.time_ns() - tick:
        if len(_kept) >= KEPT:
            _kept.clear()
        _kept[place] = identity, names
    return names
