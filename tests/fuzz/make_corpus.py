"""Makes the seeds of the fuzz target: pages of real WAL, as writes (fuzz_wal.c says how an input looks).

Run by hand, as root, when the form changes: python -m tests.fuzz.make_corpus. Segments of 1 MiB; the system identifier
is replaced by the target's. The test that runs the target unpacks them and sets the flags.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import zstandard

from tests.fix_postgres import VERSIONS, Live, all_binaries, new_cluster

PLACE = Path(__file__).with_name("corpus")
PAGE, PIECE = 8192, 3
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


def main() -> None:
    """Make all seeds anew."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
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
