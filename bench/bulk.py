"""A table of what does not compress, as large as is asked for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bench.clusters import Side

FILLER = 992
"""Bytes of random content in a row: eight rows are a page."""
PIECE = 16384
"""Rows made at a time."""
ROW = np.dtype(
    [("fields", ">i2"), ("id_length", ">i4"), ("id", ">i8"), ("filler_length", ">i4"), ("filler", np.uint8, FILLER)]
)
LOADING = "-c wal_level=minimal -c max_wal_senders=0 -c archive_mode=off -c fsync=off"
STATEMENTS = (
    "begin",
    "create table bulk (id bigint, filler bytea)",
    "alter table bulk alter filler set storage plain",
    "copy bulk from stdin (format binary, freeze)",  # else autovacuum writes all of it anew later
    "commit",
)


def fill(side: Side, gb: float) -> None:
    """The table `bulk` of about `gb` times 10^9 bytes on disk. Starts the cluster anew twice: loading needs no WAL."""
    side.control("stop", "-m", "fast")
    side.control("start", "-l", "/dev/null", "-o", LOADING)
    words = [word for statement in STATEMENTS for word in ("-c", statement)]
    with subprocess.Popen(
        [*side.psql(), "-v", "ON_ERROR_STOP=1", *words], user="postgres", cwd="/", stdin=subprocess.PIPE
    ) as copy:
        assert copy.stdin is not None
        for piece in _rows(int(gb * 1e9 / 1024)):
            copy.stdin.write(piece)
        copy.stdin.close()
        if copy.wait():
            raise RuntimeError("the table bulk was not filled")
    side.control("stop", "-m", "fast")
    os.sync()
    side.control("start", "-l", "/dev/null")


def _rows(count: int) -> Iterator[bytes]:
    """The stream of COPY BINARY (PostgreSQL's documentation of COPY, "Binary Format")."""
    yield b"PGCOPY\n\xff\r\n\0" + bytes(8)
    for first in range(0, count, PIECE):
        rows = np.zeros(min(PIECE, count - first), dtype=ROW)
        rows["fields"] = 2
        rows["id_length"], rows["id"] = 8, np.arange(first, first + len(rows))
        rows["filler_length"] = FILLER
        rows["filler"] = np.frombuffer(os.urandom(len(rows) * FILLER), dtype=np.uint8).reshape(-1, FILLER)
        yield rows.tobytes()
    yield b"\xff\xff"
