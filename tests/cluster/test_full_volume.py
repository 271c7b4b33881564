"""The volume is full, and Postgres may be down for it: every point of it can be opened, and `grow` ends it."""

from __future__ import annotations

import re
from contextlib import suppress

import psycopg
import pytest

from pgcdp import api
from pgcdp.capture import volumes
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.fsio import free_space
from pgcdp.postgres import cluster
from pgcdp.records import Target
from pgcdp.recovery.wal_room import SEGMENTS
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.waiting import wait_until

FULL = [*KILLED, r"No space left on device", r"PANIC:  ", r"FATAL:  the database system is"]
MIB = 1 << 20


def fill(found: ProtectedSet) -> int:
    """Rows that were acknowledged until nothing fits any more."""
    found.sql("create table ledger (n int, filler text)")
    with (found.pgdata / "something else").open("wb", buffering=0) as file, suppress(OSError):
        while free_space(found.pgdata) > 64 * MIB:
            file.write(bytes(MIB))
    rows, complaint = 0, ""
    while not complaint:
        try:
            found.sql("insert into ledger select n, repeat('x', 500) from generate_series(1, 2000) n")
            rows += 2000
        except psycopg.Error as error:  # of the statement, or Postgres is down for it
            complaint = str(error)
    assert re.search(r"No space left on device|terminat|connection", complaint)
    with (found.pgdata / "the rest").open("wb", buffering=0) as file, suppress(OSError):
        while True:  # what a filesystem had set aside for files that grew
            file.write(bytes(MIB))
    return rows


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_its_points_can_be_opened_and_written_to(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    """There is no room in it for the WAL that recovery itself writes."""
    settings = {"max_wal_size": "64MB", "min_wal_size": "32MB", "autovacuum": "off"}
    found = make_set(binaries_of(15), fs=fs, size=512 * MIB, settings=settings, allowed=FULL)
    rows = fill(found)
    found.durable()
    (ahead,) = api.status(found.name)["until_full"]["volumes"]
    assert ahead["room"] < SEGMENTS * 16 * MIB
    checks = {each["name"]: each for each in api.check(found.name)["checks"]}
    assert not checks["space on volume data"]["ok"], ahead
    assert "pgcdp grow" in checks["space on volume data"]["hint"]
    assert api.verify(found.name, Target("newest"))["ok"]
    made = api.clone(found.name, Target("newest"))
    with psycopg.connect(made["dsn"], autocommit=True) as session:
        (count,) = session.execute("select count(*) from ledger").fetchone() or (0,)
        assert rows <= count <= rows + 2000, "one more may have been committed and not answered"
        session.execute("delete from ledger where n > 1000")
        session.execute("vacuum ledger")
        session.execute("select pg_switch_wal()")
        session.execute("checkpoint")
        assert session.execute("select count(*) from ledger").fetchone() == (count // 2,)
    stepped = api.step(made["name"], -1)
    with psycopg.connect(stepped["dsn"], autocommit=True) as session:
        assert (session.execute("select count(*) from ledger").fetchone() or (0,))[0] >= rows - 2000
    api.destroy(made["name"])


def test_a_larger_one_ends_it(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Also where Postgres has gone down for it: the volume is there, captured, and mounted."""
    settings = {"max_wal_size": "64MB", "min_wal_size": "32MB", "autovacuum": "off"}
    found = make_set(binaries_of(15), fs="xfs", size=512 * MIB, settings=settings, allowed=FULL)
    rows = fill(found)
    api.grow(found.name, 640 * MIB)
    if cluster.find_postmaster(found.pgdata) is None:
        found.up()
    wait_until(lambda: _answers(found), what="Postgres answers")
    assert rows <= found.sql("select count(*) from ledger")[0][0] <= rows + 2000
    found.sql("insert into ledger select n, repeat('y', 500) from generate_series(1, 2000) n")
    found.wait_following()
    assert api.verify(found.name, Target("boundary", api.cut(found.name)["number"]))["ok"]


def test_a_rewind_to_where_it_was_full(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Refused while there is no room, with production as it was; a volume that has grown since gives it."""
    settings = {"max_wal_size": "64MB", "min_wal_size": "32MB", "autovacuum": "off"}
    found = make_set(binaries_of(15), fs="xfs", size=512 * MIB, settings=settings, allowed=FULL)
    rows = fill(found)
    volumes.sync_filesystem(found.pgdata)
    full = found.durable()
    for name in ("something else", "the rest"):
        (found.pgdata / name).unlink()
    found.up()
    wait_until(lambda: _answers(found), what="Postgres answers")
    found.sql("truncate ledger")
    target = Target("write", full)
    with pytest.raises(PreconditionError, match=rf"was full at write {full}, with .* needs 48.0 MiB") as told:
        api.rewind(found.name, target, agree=lambda resolved: None)
    assert f"pgcdp grow {found.name} SIZE --volume data" in str(told.value.hint)
    assert found.sql("select count(*) from ledger") == [(0,)]
    api.grow(found.name, 592 * MIB)
    api.rewind(found.name, target, agree=lambda resolved: None, prove=False)
    assert rows <= found.sql("select count(*) from ledger")[0][0] <= rows + 2000
    found.sql("insert into ledger select n, repeat('y', 500) from generate_series(1, 2000) n")
    found.wait_following()
    assert api.verify(found.name, Target("boundary", api.cut(found.name)["number"]))["ok"]


def _answers(found: ProtectedSet) -> bool:
    try:
        found.sql("select 1")
    except (psycopg.Error, PgcdpError):
        return False
    return True
