"""Whose the blocks are that an interval changed: `files.parquet` of its bundle (FORMAT.md 3.8)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pgcdp.store.frames import FileSummary
from pgcdp.store.parquet import read_table, write_table

FILES = "files.parquet"

SCHEMA = pa.schema(
    [
        ("volume", pa.uint16()),
        ("block", pa.uint64()),
        ("count", pa.uint32()),
        ("at", pa.uint64()),
        ("path", pa.dictionary(pa.int32(), pa.string())),
        ("earlier", pa.bool_()),
    ]
)
"""A run of blocks of one file, or (`path` null) of the filesystem's own; `at`: which block of the file it begins with.

`earlier`: whose they were at the boundary before, where that was another than now.
"""

STILL = "every boundary and write can still be restored; pgcdp show cannot name the files of this interval"


def write_files(place: Path, table: pa.Table) -> FileSummary:
    """Write it beside the interval's writes, synced. `table` has SCHEMA, in order of volume and block."""
    return write_table(place / FILES, table, rising=("block", "at"), repeated=("volume", "path"))


def read_files(place: Path) -> pa.Table | None:
    """The table of an interval; None when nobody asked the filesystem then. Raises DamageError."""
    try:
        return read_table(place / FILES, STILL)
    except FileNotFoundError:
        return None
