"""The frozen records that cross floors, and the array shapes of engine/FORMAT.md.

Those of which a store has ten thousand are named tuples: they are made five times as fast as frozen dataclasses.

Times are ns since 1970 UTC, LSNs 64-bit integers, sizes bytes; `pgcdp.units` turns them into text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

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

MAP_EXTENT = np.dtype(
    [
        ("block", "<u8"),
        ("count", "<u4"),
        ("volume", "<u2"),
        ("kind", "<u2"),
        ("position", "<u8"),
        ("source", "<u4"),
        ("reserved", "<u4"),
    ]
)
"""One extent of the map of a view, 32 bytes (FORMAT.md 5); `source` is the number of a frames file."""

FILE_EXTENT = np.dtype([("block", "<u8"), ("count", "<u4"), ("volume", "<u2"), ("at", "<u8"), ("file", "<u4")])
"""Blocks of a volume that belong to a file, from its block `at` on; `file` is a number."""

END = np.dtype(
    [
        ("lsn", "<u8"),
        ("end_lsn", "<u8"),
        ("write", "<u8"),
        ("time_us", "<i8"),
        ("first_lsn", "<u8"),
        ("xid", "<u4"),
        ("database", "<u4"),
        ("timeline", "<u4"),
        ("changes", "<u4"),
        ("subxids", "<u4"),
        ("begin_at", "<u4"),
        ("end_at", "<u4"),
        ("status", "<u4"),
    ]
)
"""The end of a transaction in WAL, 72 bytes (FORMAT.md 4.1)."""

CHANGE = np.dtype(
    [
        ("tablespace", "<u4"),
        ("database", "<u4"),
        ("file", "<u4"),
        ("flags", "<u4"),
        ("inserted", "<u8"),
        ("updated", "<u8"),
        ("deleted", "<u8"),
        ("moved", "<u8"),
    ]
)
"""What a transaction did to a file, 48 bytes (FORMAT.md 4.1)."""

TRANSACTION = np.dtype(
    [
        ("lsn", "<u8"),
        ("end_lsn", "<u8"),
        ("write", "<u8"),
        ("time_us", "<i8"),
        ("xid", "<u8"),
        ("timeline", "<u4"),
        ("begin_at", "<u4"),
        ("end_at", "<u4"),
        ("status", "<u4"),
        ("late", "<u4"),
        ("back", "<u8"),
    ]
)
"""The end of a transaction as the transaction index has it: xid of 64 bits, microseconds since 1970.

`write` is the one with which recovery finds the record, `write - late` the one that holds it. `back`: bytes of WAL
since its first change.
"""

COMMITTED, ABORTED, PREPARED, COMMITTED_PREPARED, ABORTED_PREPARED = 1, 2, 3, 4, 5
"""Values of `status` of END and TRANSACTION."""

WAL_WRITE = np.dtype([("write", "<u8"), ("from_lsn", "<u8"), ("to_lsn", "<u8"), ("durable", "<u8")])
"""The WAL that a write completed, 32 bytes (FORMAT.md 4.1)."""

NOTE = np.dtype(
    [
        ("lsn", "<u8"),
        ("end_lsn", "<u8"),
        ("write", "<u8"),
        ("timeline", "<u4"),
        ("xid", "<u4"),
        ("begin_at", "<u4"),
        ("body_length", "<u4"),
        ("magic", "<u2"),
        ("rmid", "u1"),
        ("info", "u1"),
        ("end_at", "<u4"),
    ]
)
"""A WAL record as it is, 48 bytes; its body follows, padded to 8 bytes (FORMAT.md 4.1)."""

NOT_IN_WRITE = 0xFFFFFFFF
"""`begin_at` and `end_at` of what lies in an earlier write."""

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


class Boundary(NamedTuple):
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


REWIND_BEGIN, REWIND_END = 1, 2
"""Flags of the marks between which a rewind in place writes (FORMAT.md 1.3)."""


GAP_BEGIN, GAP_END = 3, 4
"""Flags of the marks between which lies what was changed while nobody captured it (FORMAT.md 1.3)."""
GAP_REASONS = ("changed", "untracked", "lost")
"""Why there is a gap: volumes were changed while they were detached; the journal could not take writes."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Changes that nobody captured, taken into the order of writes all at once: between its first begin record and its
    end record (None: it has not ended), by write number.

    `reason` is one of GAP_REASONS. From `since_ns` on writes are missing, until `to_ns`, when the end record was made.
    `blocks`: so many were taken in.
    """

    begin: int
    end: int | None
    reason: str
    since_ns: int
    to_ns: int | None
    blocks: int


@dataclass(frozen=True, slots=True)
class Rewind:
    """A rewind in place: its first begin record and its end record (None: it has not ended), by write number.

    It brought the volumes to what they were at write `to_write`, with WAL blank from `to_lsn` on (None: all is in).
    """

    begin: int
    end: int | None
    to_write: int
    to_lsn: int | None = None


class Span(NamedTuple):
    """Intervals `first` to `last`, both included; `first` is `last` for a single one."""

    first: int
    last: int

    @property
    def file_name(self) -> str:
        """FIRST-LAST, ten digits each."""
        return f"{self.first:010d}-{self.last:010d}"


class Interval(NamedTuple):
    """A published interval, as its manifest tells it. Writes are `from_write` to `to_write`, both included.

    `outside`: data of the cluster that was captured by nobody when it ended, [name, place]; None: that was not known.
    `covers`: how many intervals it is made of, the last of which bears its number; more than one when retention joined
    them, and the boundaries between are gone. `restorable_by_write`: False when its single writes are gone.
    """

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
    rewinds: tuple[Rewind, ...] = ()
    gaps: tuple[Gap, ...] = ()
    outside: tuple[tuple[str, str], ...] | None = None
    covers: int = 1
    restorable_by_write: bool = True

    @property
    def first(self) -> int:
        """Number of the first interval that it is made of: it runs from boundary `first` - 1."""
        return self.number - self.covers + 1

    @property
    def span(self) -> Span:
        """The intervals that it is made of."""
        return Span(self.first, self.number)


TargetKind = Literal["write", "boundary", "time", "xid", "lsn", "name", "newest"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a user asks for: `value` is a write number, a boundary number, ns since 1970, an xid (64 bits, or the low
    32), an LSN, or 0 for the newest; `name` is that of a mark. `exclusive`: just before it. `branch`: the timeline on
    whose branch a time, an xid or an LSN is meant, or a statement beside it; 0: the current one."""

    kind: TargetKind
    value: int = 0
    name: str = ""
    exclusive: bool = False
    branch: int = 0


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """What a target resolves to: all writes up to `write`, which lies in interval `interval` (None: the open one).

    `time_ns` is when that write was captured; `boundary` is the number of the boundary if the point is one.
    `lsn`: WAL is blank from here on, which is `blank_at` bytes from the beginning of write `blank_write` (that one, or
    one shortly before it); None: all is in. `note`: what the user must know of it. `until_lsn`: where the target
    itself is; what committed between the point and that is out too. None: nothing lies between.
    """

    write: int
    interval: int | None
    time_ns: int
    boundary: int | None = None
    lsn: int | None = None
    blank_at: int | None = None
    blank_write: int | None = None
    note: str | None = None
    until_lsn: int | None = None


Level = Literal["ok", "warning", "failure"]
"""A warning: the promise holds, but for what the text says. A failure: it does not."""


@dataclass(frozen=True, slots=True)
class Remark:
    """What a look at one thing found: `detail` is what is so and what it means, `hint` what mends it."""

    name: str
    level: Level
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a verification or of `pgcdp check`."""

    name: str
    ok: bool
    seconds: float
    detail: str
