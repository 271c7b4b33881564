"""The names in a directory, read again only when they may be others: there can be ten thousand, and one command asks
some ten times.

A change of a directory sets its time of change (ctime, which nobody can set back). Two changes within one tick of the
clock that is used for it bear the same time, so what was read within a tick of the last change is not kept: as git does
with files that are "racily clean". Since Linux 6.13 a time that was asked for is not given twice.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from pgcdp.capture import kernel

FINE_SINCE = 6, 13
TICK_NS = 100_000_000
"""Where times are fine: for filesystems that take them from elsewhere."""
COARSE_TICK_NS = 2_500_000_000
"""Longer than a kernel's clock stands still (1 to 10 ms, more where its processor is taken away), and for filesystems
whose times are whole seconds."""
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
    tick = TICK_NS if _fine() and status.st_ctime_ns % 1_000_000_000 else COARSE_TICK_NS
    if 0 <= status.st_ctime_ns < time.time_ns() - tick:
        if len(_kept) >= KEPT:
            _kept.clear()
        _kept[place] = identity, names
    return names


@cache
def _fine() -> bool:
    """Whether the kernel gives no time twice that was asked for."""
    try:
        return kernel.version_of(os.uname().release) >= FINE_SINCE
    except ValueError:
        return False
