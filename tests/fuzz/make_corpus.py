"""Makes the seeds of the fuzz targets, as writes: pages of real WAL, and of real logs of filesystems.

fuzz_wal.c and fuzz_logs.c say how an input looks. Run by hand, as root, when the form changes: python -m
tests.fuzz.make_corpus. Segments of 1 MiB; the system identifier is replaced by the target's. The test that runs a
target unpacks its seeds and sets the flags.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import zstandard

from tests.fix_postgres import VERSIONS, Live, all_binaries, new_cluster
from tests.moments import log_ranges

PLACE = Path(__file__).with_name("corpus")
PAGE, PIECE = 8192, 3
LOG_PAGES = 12
IDENTIFIER = bytes.fromhex("8877665544332211")
WORK = (
    "create table t (id int primary key, body text)",
    "insert into t select n, repeat('x', n) from generate_series(1, 40) n",
    "begin; update t set body = 'y' where id < 9; savepoint a; delete from t where id = 3; release a; commit",
    "begin; insert into t values (100, 'z'); rollback",
    "begin; insert into t values (101, 'z'); prepare transaction 'p'",
    "commit prepared 'p'",
    "truncate t",
    "select pg_logical_emit_message(true, 'pgcdp', 'a mark'), pg_create_restore_point('point')",
    "create table parts (id int) partition by range (id)",
    "create table part partition of parts for values from (1) to (2)",
    "vacuum full t",
    "drop table t, parts",
)


def pages_of(live: Live) -> list[bytes]:
    """The pages of WAL that the work takes, from a checkpoint on."""
    with live.connect() as session:
        for statement in ("select pg_switch_wal()", "checkpoint", *WORK):
            session.execute(statement.encode())
        row = session.execute("select pg_walfile_name(pg_current_wal_insert_lsn())").fetchone()
        assert row is not None
        session.execute("select pg_switch_wal()")
    raw = (live.pgdata / "pg_wal" / row[0]).read_bytes()
    pages = [bytearray(raw[at : at + PAGE]) for at in range(0, len(raw), PAGE)]
    pages[0][24:32] = IDENTIFIER
    return [bytes(page) for page in pages if page[:2] != b"\0\0"]


def as_input(pages: list[bytes]) -> bytes:
    """Writes of some pages each, the last page of each being the first of the next, as commits write them."""
    parts = [bytes([0])]
    for first in range(0, len(pages), PIECE):
        some = pages[first : first + PIECE + 1]
        parts += [bytes([0, first, 2 * len(some) - 1]), *some]
    return b"".join(parts)


def log_of(image: Path, fs: str) -> tuple[bytes, list[int]]:
    """A file as long as a segment is filled page by page, each flushed: the log behind it, and where the pages lie."""
    with image.open("wb") as file:
        file.truncate(300 << 20)
    make = {"xfs": ["mkfs.xfs", "-q", "-s", "size=4096"], "ext4": ["mkfs.ext4", "-q", "-b", "4096", "-J", "size=4"]}
    subprocess.run([*make[fs], str(image)], check=True)
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["mount", "-o", "loop", str(image), place], check=True)
        try:
            fd = os.open(Path(place, "segment"), os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, b"\0", (16 << 20) - 1)
            os.fsync(fd)
            for page in range(LOG_PAGES):
                os.pwrite(fd, b"x" * PAGE, page * PAGE)
                os.fdatasync(fd)
            said = subprocess.run(["filefrag", "-v", f"{place}/segment"], check=True, capture_output=True, text=True)
            os.close(fd)
            raw = image.read_bytes()
        finally:
            subprocess.run(["umount", place], check=True)
    extents = [tuple(map(int, e)) for e in re.findall(r"\d+:\s+(\d+)\.\.\s*(\d+):\s+(\d+)\.\.", said.stdout)]
    places = [at + 2 * page - low for page in range(LOG_PAGES) for low, high, at in extents if low <= 2 * page <= high]
    return b"".join(raw[begin:end] for begin, end in log_ranges(str(image), fs)), places


def records_of_xfs(log: bytes) -> list[bytes]:
    """The records of a log that is younger than one round."""
    found = []
    for at in range(0, len(log), 4096):
        length = int.from_bytes(log[at + 12 : at + 16], "big")
        if log[at : at + 4] == b"\xfe\xed\xba\xbe" and length:
            found.append(log[at : at + 512 + length])
    return found


def transactions_of_ext4(log: bytes) -> list[bytes]:
    """The transactions of a journal that is younger than one round, each with its commit block at the end."""
    found, begin = [], 4096
    for at in range(4096, len(log), 4096):
        if log[at : at + 8] == bytes.fromhex("c03b3998") + (2).to_bytes(4, "big"):
            found.append(log[begin : at + 4096])
            begin = at + 4096
    return found


def as_log_input(records: list[bytes], places: list[int], pages: int) -> bytes:
    """Each of the first pages of WAL, then the record or transaction that lets the filesystem find it."""
    parts, at = [bytes([0])], 0
    for place, record in list(zip(places, records[-len(places) :], strict=True))[:pages]:
        parts.append(bytes([2]) + place.to_bytes(2, "little"))
        parts.append(bytes([0, at, len(record) // 512 - 1]) + record)
        at += -(-len(record) // 4096)
    return b"".join(parts)


def main() -> None:
    """Make all seeds anew."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    for fs, split, some in (("xfs", records_of_xfs, LOG_PAGES), ("ext4", transactions_of_ext4, 4)):
        with tempfile.TemporaryDirectory() as scratch:
            log, places = log_of(Path(scratch, "image"), fs)
        raw = as_log_input(split(log), places, some)
        (PLACE / f"{fs}.zst").write_bytes(zstandard.ZstdCompressor(19).compress(raw))
    for version in VERSIONS:
        with all_binaries() as binaries_of:
            live = new_cluster(
                binaries_of(version),
                "--wal-segsize=1",
                max_prepared_transactions="4",
                full_page_writes="off",
                wal_level="logical",
            )
            try:
                pages = pages_of(live)
            finally:
                live.remove()
        raw = as_input(pages[:12])
        (PLACE / f"pg{version}.zst").write_bytes(zstandard.ZstdCompressor(19).compress(raw))


if __name__ == "__main__":
    main()
