"""pg_control: read it from bytes, and recognise it inside captured writes.

The layout is `ControlFileData` of src/include/catalog/pg_control.h on 64-bit little-endian machines with 8-byte
alignment (x86_64, aarch64). PostgreSQL 13 to 16 write version 1300, 17 writes 1700: all fields that are read here lie
at the same places, since the `wal_level` that 17's CheckPoint gained sits in what was padding. 18 (1800) has a
`default_char_signedness` before the nonce, so its CRC lies four bytes later.
The CRC is CRC-32C over all bytes before it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import google_crc32c
import numpy as np
import numpy.typing as npt

from pgcdp.errors import DamageError, PreconditionError
from pgcdp.records import BLOCK
from pgcdp.units import format_lsn

FILE_BYTES = 8192
"""Size of the file global/pg_control; all that matters lies in its first 512 bytes."""

_CRC_OFFSET = {1300: 288, 1700: 288, 1800: 292}
_NEEDED = max(_CRC_OFFSET.values()) + 4


class State(IntEnum):
    """DBState: what the cluster was doing when pg_control was written."""

    STARTUP = 0
    SHUT_DOWN = 1
    SHUT_DOWN_IN_RECOVERY = 2
    SHUTTING_DOWN = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class Control:
    """What pg_control says. LSNs are 64-bit positions, `next_xid` is 64 bits (epoch and xid), times are seconds.

    `crc_ok` tells whether the checksum over it is right; without it no other field is to be believed.
    """

    system_identifier: int
    version: int
    catalog_version: int
    state: State | None
    time: int
    checkpoint_lsn: int
    redo_lsn: int
    timeline: int
    previous_timeline: int
    next_xid: int
    checkpoint_time: int
    min_recovery_lsn: int
    backup_start_lsn: int
    backup_end_lsn: int
    wal_level: int
    wal_log_hints: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    track_commit_timestamp: bool
    block_size: int
    wal_segment_size: int
    checksums: bool
    crc_ok: bool


# (field, offset, struct code) in ControlFileData; checkPointCopy begins at 40.
_FIELDS = (
    ("system_identifier", 0, "Q"),
    ("version", 8, "I"),
    ("catalog_version", 12, "I"),
    ("state", 16, "I"),
    ("time", 24, "q"),
    ("checkpoint_lsn", 32, "Q"),
    ("redo_lsn", 40, "Q"),
    ("timeline", 48, "I"),
    ("previous_timeline", 52, "I"),
    ("next_xid", 64, "Q"),
    ("checkpoint_time", 104, "q"),
    ("min_recovery_lsn", 136, "Q"),
    ("backup_start_lsn", 152, "Q"),
    ("backup_end_lsn", 160, "Q"),
    ("wal_level", 172, "i"),
    ("wal_log_hints", 176, "?"),
    ("max_connections", 180, "i"),
    ("max_worker_processes", 184, "i"),
    ("max_wal_senders", 188, "i"),
    ("max_prepared_transactions", 192, "i"),
    ("max_locks_per_transaction", 196, "i"),
    ("track_commit_timestamp", 200, "?"),
    ("block_size", 216, "I"),
    ("wal_segment_size", 228, "I"),
    ("checksums", 252, "I"),
)


def parse(data: bytes | bytearray | memoryview) -> Control:
    """Read pg_control from its first bytes (at least 296).

    Raises DamageError when there are too few, PreconditionError for a version that is not 13 to 18's. A wrong CRC
    is no error here: see `Control.crc_ok` and `read_checked`.
    """
    if len(data) < _NEEDED:
        raise DamageError(f"pg_control has only {len(data)} bytes, at least {_NEEDED} are needed")
    version = int.from_bytes(data[8:12], "little")
    if version not in _CRC_OFFSET:
        raise PreconditionError(
            f"pg_control has version {version}, which is none of {', '.join(map(str, _CRC_OFFSET))}",
            "pgcdp reads clusters of PostgreSQL 13 to 18",
        )
    values = {name: struct.unpack_from("<" + code, data, offset)[0] for name, offset, code in _FIELDS}
    values["state"] = State(values["state"]) if values["state"] < len(State) else None
    values["checksums"] = values["checksums"] != 0
    return Control(**values, crc_ok=_crc_ok(data, version))


def parse_checked(data: bytes | bytearray | memoryview, name: str) -> Control:
    """`parse`, and raise DamageError naming `name` when the CRC is wrong."""
    control = parse(data)
    if not control.crc_ok:
        raise DamageError(f"{name}: the checksum of pg_control is wrong")
    return control


def find_control_blocks(data: npt.NDArray[np.uint8], system_identifier: int) -> list[tuple[int, Control]]:
    """Blocks of captured data that hold a whole, valid pg_control of this cluster: [(byte position, Control)].

    `data` is one write's data or several behind each other, each 4096-aligned in it; its length is a multiple of
    4096. A block counts when it begins with the system identifier and its CRC is right: that is pg_control as Postgres
    writes it, for a filesystem's blocks are at least as long as the part that matters.
    """
    whole = len(data) // BLOCK * BLOCK
    first_words = data[:whole].reshape(-1, BLOCK)[:, :8]
    wanted = np.frombuffer(struct.pack("<Q", system_identifier), dtype=np.uint8)
    # Two steps: the first two bytes sort out nearly all blocks, so that the comparison of eight stays cheap.
    near = np.flatnonzero((first_words[:, 0] == wanted[0]) & (first_words[:, 1] == wanted[1]))
    exact = near[(first_words[near] == wanted).all(axis=1)]
    found = []
    for block in exact.tolist():
        start = block * BLOCK
        head = data[start : start + 512].tobytes()
        if int.from_bytes(head[8:12], "little") in _CRC_OFFSET and (control := parse(head)).crc_ok:
            found.append((start, control))
    return found


def describe(control: Control) -> str:
    """One line for people."""
    state = control.state.name.lower().replace("_", " ") if control.state is not None else "unknown state"
    return (
        f"checkpoint {format_lsn(control.checkpoint_lsn)}, redo {format_lsn(control.redo_lsn)}, "
        f"timeline {control.timeline}, next xid {control.next_xid}, {state}"
    )


def _crc_ok(data: bytes | bytearray | memoryview, version: int) -> bool:
    at = _CRC_OFFSET[version]
    stored = int.from_bytes(data[at : at + 4], "little")
    return int(google_crc32c.value(bytes(data[:at]))) == stored
