"""The transaction index: which transaction did what to which table, under the name that the table had then."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from pgcdp import api
from pgcdp.cli.log import COLUMNS
from pgcdp.errors import TargetError
from pgcdp.fsio import read_json, write_json
from pgcdp.records import Target
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog
from pgcdp.store.layout import Store
from pgcdp.units import parse_lsn, parse_time
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until


def log(found: ProtectedSet, **wanted: Any) -> list[dict[str, Any]]:
    """Transactions, oldest first."""
    return list(reversed(api.log(found.name, limit=1000, **wanted)["transactions"]))


def deeds(found: ProtectedSet, **wanted: Any) -> list[str]:
    """What the transactions did, in words, oldest first; those without a table are left out."""
    told = []
    for each in log(found, **wanted):
        for table in each["tables"]:
            did = [f"{name} {table[name]}" for name in ("inserted", "updated", "deleted") if table[name]]
            did += [name for name in ("truncated", "dropped", "rewritten") if table[name]]
            told.append(f"{each['status']} {table['schema']}.{table['name']}: {', '.join(did) or 'created'}")
    return told


@pytest.mark.parametrize(
    ("version", "compression"), [(15, "off"), (15, "pglz"), (15, "lz4"), (15, "zstd"), (17, "off"), (18, "pglz")]
)
def test_tables_are_named_as_they_were_called_then(
    make_set: MakeSet, binaries_of: BindirOf, version: int, compression: str
) -> None:
    """Nobody looks at the catalogs between these statements: all names come from the WAL of the catalogs."""
    found = make_set(binaries_of(version), settings={"autovacuum": "off", "wal_compression": compression})
    api.cut(found.name)
    with found.connect() as session:
        session.execute("create table public.a (id int primary key, body text)")
        session.execute("insert into a select n, repeat('x', n % 9000) from generate_series(1, 1000) n")
        session.execute("alter table a rename to b")
        session.execute("delete from b where id <= 10")
        session.execute("truncate b")
        session.execute("insert into b values (1, 'y')")
        session.execute("create schema s")
        session.execute("create table s.b (like b)")
        session.execute("insert into s.b values (2, 'z')")
        session.execute("alter table s.b alter id type bigint")
        session.execute("vacuum full s.b")
        session.execute("begin; alter table s.b rename to never; rollback")
        session.execute("update s.b set body = 'w'")
        session.execute("drop table s.b")
        session.execute("begin; delete from b; rollback")
        session.execute("begin; savepoint one; insert into b values (3, 'q'); release one; commit")
    expected = [
        "committed public.a: created",
        "committed public.a: inserted 1000",
        "committed public.b: deleted 10",
        "committed public.b: truncated",
        "committed public.b: inserted 1",
        "committed s.b: created",
        "committed s.b: inserted 1",
        "committed s.b: rewritten",
        "committed s.b: rewritten",
        "committed s.b: updated 1",
        "committed s.b: dropped",
        "aborted public.b: deleted 1",
        "committed public.b: inserted 1",
    ]
    assert deeds(found) == expected
    api.cut(found.name)
    assert deeds(found) == expected
    with found.connect() as session:
        session.execute("insert into b values (4, 'after')")
    assert deeds(found) == [*expected, "committed public.b: inserted 1"]


def test_find_names_the_transaction(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15))
    with found.connect() as session:
        session.execute("create table orders (id int primary key, paid bool)")
        session.execute("insert into orders select n, n % 2 = 0 from generate_series(1, 1000) n")
        session.execute("delete from orders where id = 7")
        session.execute("begin")
        session.execute("delete from orders where paid")
        xid = session.execute("select txid_current()").fetchone()
        session.execute("commit")
        session.execute("delete from orders where id = 9")
        session.execute("create table parts (id int) partition by range (id)")
        session.execute("create table part1 partition of parts for values from (0) to (10)")
        session.execute("insert into parts values (1)")
    assert xid is not None
    api.cut(found.name)
    with found.connect() as session:
        session.execute("truncate parts")
    assert all(each["tables"] for each in api.log(found.name, operation="insert", limit=1000)["transactions"])
    told = api.find(found.name, "DELETE FROM orders WHERE whatever")
    assert told["total"] == 3
    assert told["transactions"][0]["xid"] == xid[0]
    assert told["transactions"][0]["tables"][0]["deleted"] == 500
    assert told["transactions"][0]["share"] > 0.4
    newest = api.find(found.name, "delete from public.orders", newest=True)
    assert [each["tables"][0]["deleted"] for each in newest["transactions"]] == [1, 500, 1]
    assert api.find(found.name, "truncate parts")["total"] == 1
    with pytest.raises(TargetError, match="no table order_ is known") as raised:
        api.find(found.name, "delete from order_")
    assert "orders" in (raised.value.hint or "")
    with pytest.raises(TargetError, match="3 transactions"):
        api.resolve(found.name, Target("newest"), before="delete from orders")
    point = api.resolve(found.name, Target("newest"), before="truncate parts")
    assert point["first_out"]["xid"] == api.find(found.name, "truncate parts")["transactions"][0]["xid"]


def test_a_transaction_over_several_intervals_is_listed_once(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings={"max_prepared_transactions": "2"})
    with found.connect() as session:
        session.execute("create table t (id int)")
        session.execute("begin; insert into t select generate_series(1, 10)")
        api.cut(found.name)
        session.execute("savepoint s; insert into t values (11)")
        api.cut(found.name)
        session.execute("update t set id = id + 1 where id > 9; commit")
        session.execute("begin; delete from t where id = 1; prepare transaction 'later'")
        api.cut(found.name)
        session.execute("commit prepared 'later'")
    told = [each for each in log(found, table="t") if any(table["inserted"] for table in each["tables"])]
    assert len(told) == 1
    assert (told[0]["tables"][0]["inserted"], told[0]["tables"][0]["updated"]) == (11, 2)
    ended = [(each["status"], each["tables"][0]["deleted"]) for each in log(found, operation="delete")]
    assert ended == [("prepared", 1), ("committed", 1)]
    shown = api.show(found.name, told[0]["write"])["holds"]
    assert told[0]["xid"] in [each["xid"] for each in shown["transactions"]]


def test_names_of_what_was_made_over_several_boundaries(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The rows of pg_class that a transaction makes count when it ends, however many boundaries later."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session, found.connect() as other:
        session.execute("create table old (id int); create table kept (id int); insert into kept values (1)")
        api.cut(found.name)
        session.execute("begin; create schema s; create table s.made (id int); insert into s.made values (1)")
        session.execute("savepoint one; create table moved (id int); alter table moved rename to renamed; release one")
        session.execute("alter table kept alter id type bigint; alter table old rename to new")
        other.execute("begin; create table never (id int); insert into never values (1)")
        api.cut(found.name)
        api.cut(found.name)
        session.execute("insert into s.made values (2); insert into renamed values (3); insert into kept values (2)")
        session.execute("insert into new values (4)")
        other.execute("insert into never values (2); rollback")
        api.cut(found.name)
        session.execute("commit")
        session.execute("insert into renamed values (5)")
        session.execute("insert into kept values (6)")
    expected = [
        "aborted public.never: inserted 2",
        "committed public.kept: rewritten",
        "committed public.new: inserted 1",
        "committed public.renamed: inserted 1",
        "committed s.made: inserted 2",
        "committed public.renamed: inserted 1",
        "committed public.kept: inserted 1",
    ]
    for _ in range(2):
        told = deeds(found)[-len(expected) :]
        assert [told[0], *sorted(told[1:5]), *told[5:]] == expected
        api.cut(found.name)


def test_a_table_in_another_tablespace_is_rewritten(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A new file beside the old one is TRUNCATE only in the same tablespace; the table keeps its rows."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("set allow_in_place_tablespaces = on")
        session.execute("create tablespace spare location ''")
        session.execute("create table moved (id int primary key)")
        session.execute("create table there (id int) tablespace spare")
        session.execute("insert into moved select generate_series(1, 1000)")
        session.execute("insert into there select generate_series(1, 1000)")
        session.execute("alter table moved set tablespace spare")
        session.execute("delete from moved where id <= 10")
        session.execute("alter table moved set tablespace pg_default")
        session.execute("truncate there")
        session.execute("delete from moved where id <= 20")
    for _ in range(2):
        told = {(each["tables"][0]["name"], index): each for index, each in enumerate(log(found)) if each["tables"]}
        assert deeds(found)[-5:] == [
            "committed public.moved: rewritten",
            "committed public.moved: deleted 10",
            "committed public.moved: rewritten",
            "committed public.there: truncated",
            "committed public.moved: deleted 10",
        ]
        assert [each["share"] for each in told.values() if each["tables"][0]["deleted"]] == pytest.approx(
            [0.01, 10 / 990], abs=1e-5
        )
        api.cut(found.name)


def test_databases_are_named_as_they_were_called_then(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """What a new database has of its template is nothing that was made in it."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    api.cut(found.name)
    made = len(deeds(found))
    found.sql("create database d1")
    assert len(deeds(found)) == made

    def work(database: str, name: str) -> None:
        with found.connect(database) as session:
            session.execute(f"create table {name} (id int)".encode())

    def called() -> list[tuple[str, str]]:
        told = [(each["database"], table) for each in log(found) for table in each["tables"]]
        assert not [table["name"] for _, table in told if "/" in table["name"] or table["schema"].startswith("schema ")]
        return [(database, table["name"]) for database, table in told if table["schema"] == "public"][-4:]

    work("d1", "a")
    with found.connect() as session:
        session.execute("begin; alter database d1 rename to never; rollback")
        work("d1", "b")
        session.execute("alter database d1 rename to d2")
        work("d2", "c")
        api.cut(found.name)
        session.execute("alter database d2 rename to d3")
        session.execute("begin; alter database d3 rename to never; rollback")
        work("d3", "d")
    for _ in range(2):
        assert called() == [("d1", "a"), ("d1", "b"), ("d2", "c"), ("d3", "d")]
        api.cut(found.name)


def test_what_a_restart_of_the_agent_leaves_is_the_same(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15))
    # It is kept with the first look at the catalogs: without one, schemas have no names yet.
    wait_until(lambda: found.source().newest_settings(), timeout=90, what="a look at the catalogs")
    with found.connect() as session:
        session.execute("create table t (id int)")
        session.execute("begin; insert into t select generate_series(1, 10)")
        found.kill_agent()
        found.up()
        session.execute("commit")
        before = deeds(found, table="t")
        found.kill_agent()
        found.up()
        api.cut(found.name)
        assert deeds(found, table="t") == before
    assert before[-1] == "committed public.t: inserted 10"


def test_before_means_what_was_done(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """One DELETE by two-phase commit is one; what was rolled back is none, however many there were."""
    found = make_set(binaries_of(15), settings={"max_prepared_transactions": "2"})
    with found.connect() as session:
        session.execute("create table t as select generate_series(1, 100) n")
        session.execute("create table u as select generate_series(1, 100) n")
        session.execute("begin; delete from t where n = 1; prepare transaction 'one'")
        session.execute("begin; delete from u; prepare transaction 'two'")
        session.execute("commit prepared 'one'")
        session.execute("rollback prepared 'two'")
        for _ in range(30):
            session.execute("begin; delete from t; rollback")
    for _ in range(2):
        (only,) = [each for each in api.find(found.name, "delete from t", limit=100)["transactions"]
                   if each["status"] == "committed"]  # fmt: skip
        assert not [
            each for each in api.find(found.name, "delete from t")["transactions"] if each["status"] == "prepared"
        ]
        resolved = api.resolve(found.name, Target("newest"), before="delete from t")
        assert resolved["first_out"]["xid"] == only["xid"]
        with pytest.raises(TargetError, match='no transaction did "delete from u"'):
            api.resolve(found.name, Target("newest"), before="delete from u")
        api.cut(found.name)
    with found.connect() as session:
        session.execute("begin; delete from u; prepare transaction 'two'")
    assert api.resolve(found.name, Target("newest"), before="delete from u")["recovery_point"]["write"]


def test_an_interval_that_is_not_indexed_is_said(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Whatever may lie in it is not passed over without a word."""
    found = make_set(binaries_of(15))
    found.sql("create table t as select generate_series(1, 100) n")
    api.cut(found.name)
    found.sql("delete from t where n = 1")
    hidden = api.cut(found.name)["number"]
    (inside,) = api.find(found.name, "delete from t")["transactions"]
    found.sql("delete from t where n = 2")
    api.cut(found.name)
    (behind, _) = api.find(found.name, "delete from t", newest=True)["transactions"]
    forget_index(found, hidden)
    assert api.log(found.name)["unknown"] == [hidden]
    with pytest.raises(TargetError, match=rf"interval {hidden} is not indexed"):
        api.resolve(found.name, Target("newest"), before="delete from t")
    for target in (Target("lsn", parse_lsn(inside["lsn"])), Target("time", parse_time(inside["time"]) - 1000)):
        with pytest.raises(TargetError, match=rf"interval {hidden}"):
            api.resolve(found.name, target)
    point = api.resolve(found.name, Target("xid", behind["xid"], exclusive=True))
    assert point["out"] is None
    assert f"interval {hidden} is not indexed" in point["unknown"]
    assert api.resolve(found.name, Target("xid", behind["xid"]))["last_in"]["xid"] == behind["xid"]
    assert api.show(found.name, inside["write"])["holds"]["what"] == "wal"


def forget_index(found: ProtectedSet, number: int) -> None:
    """Leave an interval as one whose transactions could not be indexed."""
    place = found.store / "intervals" / f"{number:010d}"
    manifest = read_json(place / "manifest.json")
    manifest.pop("checksum", None)
    write_json(place / "manifest.json", {**manifest, "transactions": None})
    store = Store.open(found.store)
    catalog = Catalog.open(store)  # a manifest never changes, so the mirror would be believed
    catalog.put_interval(Bundle.open(store, number))
    catalog.close()


def test_what_looks_like_a_truncate_is_none(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """VACUUM cuts the free end of a file, all of it when no row is left."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("create table t as select generate_series(1, 20000) n")
        for sql in ("delete from t where n > 10000", "vacuum t", "delete from t", "vacuum t", "create database other"):
            session.execute(sql.encode())
        session.execute("insert into t values (1)")
    with found.connect("other") as session:
        session.execute("create table u (id int)")
    for _ in range(2):
        assert api.find(found.name, "truncate t")["total"] == 0
        (last,) = api.log(found.name, database="postgres", limit=1)["transactions"]
        assert last["tables"][0]["name"] == "t"
        assert {each["database"] for each in api.log(found.name, database="other")["transactions"]} == {"other"}
        with pytest.raises(TargetError, match="no database nope is known") as raised:
            api.log(found.name, database="nope")
        assert "other" in (raised.value.hint or "")
        first = found.source().transactions().history()
        wal = [chapter.wal() for _, chapter in first.newest_first()][-1]
        assert 0 < int(wal["from_lsn"][0]) <= int(wal["to_lsn"][0])
        with pytest.raises(TargetError, match="is not in what can be restored"):
            api.resolve(found.name, Target("lsn", 1))
        api.cut(found.name)


def test_log_follows(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15))
    found.sql("create table t (id int)")
    following = api.follow(found.name, table="t")
    assert next(following)["tables"][0]["inserted"] == 0
    for count in (3, 5):
        found.sql(f"insert into t select generate_series(1, {count})")
        assert next(following)["tables"][0]["inserted"] == count
        api.cut(found.name)


def test_log_follows_for_people(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Each line comes when it is there, also into a pipe; while the set is stopped it says once that it waits."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    found.sql("create table t (id int)")
    command = [sys.executable, "-P", "-m", "pgcdp", "log", "--follow", "--table", "t"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline().split() == list(COLUMNS)
            assert "postgres:public.t" in process.stdout.readline()
            api.down(found.name)
            assert process.stderr.readline().startswith(f"set {found.name} is stopped: waiting")
            api.up(found.name)
            found.sql("insert into t values (1)")
            assert "1 inserted" in process.stdout.readline()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() == "interrupted"
    assert process.returncode == 130


def test_a_damaged_index_keeps_no_interval_from_the_store(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """What lies in the interval before is where indexing begins; without it, it begins anew behind the boundary."""
    allowed = [r"relations\.parquet is damaged", r"the WAL is read anew", r"transactions cannot be listed"]
    found = make_set(binaries_of(15), allowed=allowed)
    found.sql("create table t (id int)")
    number = api.cut(found.name)["number"]
    place = found.store / "intervals" / f"{number:010d}"
    for name in ("relations.parquet", "wal.state", "catalog.notes"):
        raw = bytearray((place / name).read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 8] = b"damaged!"
        (place / name).write_bytes(raw)
    found.sql("insert into t values (1)")
    assert api.cut(found.name)["number"] == number + 1
    assert api.log(found.name)["unknown"] == []
    assert log(found)[-1]["tables"][0]["inserted"] == 1
    damaged = [each["detail"] for each in api.check(found.name, full=True)["checks"] if not each["ok"]]
    assert {name for name in ("relations.parquet", "wal.state", "catalog.notes") if name in " ".join(damaged)} == {
        "relations.parquet",
        "wal.state",
        "catalog.notes",
    }
    (place / "transactions.parquet").unlink()
    assert api.resolve(found.name, Target("boundary", number))["recovery_point"]["boundary"] == number
    assert any("transactions.parquet is missing" in each["detail"] for each in api.check(found.name)["checks"])
