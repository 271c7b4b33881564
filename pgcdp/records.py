"""The frozen records that cross floors, and the array shapes of engine/FORMAT.md.

Times are ns since 1970 UTC, LSNs 64-bit integers, sizes bytes; `pgcdp.units` turns them into text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

BLOCK = 4096
"""Bytes of a block: the unit of maps, sums and captured writes."""


class Kind(IntEnum):
    """What a captured write is (FORMAT.md 1.3)."""

    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4
    MARK = 5


RECORD = np.dtype(
    [
        ("kind", "u1"),
        ("flags", "u1"),
        ("volume", "<u2"),
        ("data_length", "<u4"),
        ("number", "<u8"),
        ("wall_ns", "<i8"),
        ("boot_ns", "<i8"),
        ("offset", "<u8"),
        ("length", "<u8"),
    ]
)
"""One record of a batch, 48 bytes (FORMAT.md 1.3)."""

INDEX = np.dtype([*((name, RECORD[name].str) for name in RECORD.names or ()), ("position", "<u8"), ("reserved", "<u8")])
"""One entry of the write index, 64 bytes (FORMAT.md 3.1)."""

EXTENT = np.dtype(
    [("block", "<u8"), ("count", "<u4"), ("volume", "<u2"), ("kind", "<u2"), ("source", "<u8"), ("write", "<u8")]
)
"""One extent of a backward or forward map, 32 bytes (FORMAT.md 3.2)."""

EXTENT_DATA = 0
EXTENT_ZEROS = 1


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the journal: segment sequence number and offset in it."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class Volume:
    """One block device of a set. `number` is its number in captured writes."""

    number: int
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Boundary:
    """A write number at which a Postgres checkpoint is complete on the volumes.

    `number` is the number of the interval that it ends; 0 is the end of the baseline.
    `next_xid` is the 64-bit (epoch, xid) that pg_control names.
    """

    number: int
    write: int
    time_ns: int
    checkpoint_lsn: int
    redo_lsn: int
    timeline: int
    next_xid: int
    reason: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A published interval, as its manifest tells it. Writes are `from_write` to `to_write`, both included."""

    number: int
    from_write: int
    to_write: int
    from_time_ns: int
    to_time_ns: int
    boundary: Boundary
    writes: int
    bytes_written: int
    blocks_changed: int
    stored: dict[str, int]


TargetKind = Literal["write", "boundary", "time", "newest"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a user asks for. `value` is a write number, a boundary number, ns since 1970, or 0 for the newest."""

    kind: TargetKind
    value: int = 0


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """What a target resolves to: all writes up to `write`, which lies in interval `interval` (None: the open one).

    `time_ns` is when that write was captured; `boundary` is the number of the boundary if the point is one.
    """

    write: int
    interval: int | None
    time_ns: int
    boundary: int | None = None
    lsn: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a verification or of `pgcdp check`."""

    name: str
    ok: bool
    seconds: float
    detail: str
