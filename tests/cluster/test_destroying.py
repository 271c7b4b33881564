"""Statements that destroy before they commit: exclusive is before their first irreversible effect."""

from __future__ import annotations

import threading

from pgcdp import api
from pgcdp.capture import attach
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from pgcdp.recovery import verify
from pgcdp.units import parse_lsn
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet
from tests.waiting import wait_until


def test_a_dropped_database_connects_again(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """While clients write in another database; what they lose is what was said before.

    DROP DATABASE runs a checkpoint between its first irreversible effect and its end: an interval ends there.
    """
    found = make_set(
        pg_binaries,
        settings={"max_wal_size": "256MB", "autovacuum": "off"},  # whose transactions would be counted, too
        allowed=[r"connection to client lost"],
        cut=("checkpoint",),
    )
    found.sql("create database doomed")
    with found.connect("doomed") as connection:
        connection.execute("create table kept as select generate_series(1, 1000) as n")
    with found.connect() as connection:
        connection.execute("create table ledger (client int, counter int)")
    stop = threading.Event()
    acked: list[tuple[int, int]] = []
    failures: list[BaseException] = []

    def write(client: int) -> None:
        try:
            with found.connect() as connection:
                counter = 0
                while not stop.is_set():
                    counter += 1
                    connection.execute("insert into ledger values (%s, %s)", [client, counter])
                    acked.append((client, counter))
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=write, args=(client,)) for client in range(8)]
    for client in clients:
        client.start()
    wait_until(lambda: len(acked) > 200, what="some commits")
    found.sql("drop database doomed")
    goal = len(acked) + 200
    wait_until(lambda: len(acked) > goal, what="some more commits")
    stop.set()
    for client in clients:
        client.join()
    assert not failures
    (dropped,) = api.find(found.name, "drop database doomed")["transactions"]
    resolved = api.resolve(found.name, Target("newest"), before="drop database doomed")
    assert "drops a database" in resolved["recovery_point"]["note"]
    assert resolved["recovery_point"]["write"] < dropped["write"]
    also = [each["xid"] for each in resolved["also_out"]]
    api.cut(found.name)
    assert len(api.info(found.name)["intervals"]) > 1
    source = found.source()
    point = source.resolve(Target("xid", dropped["xid"], exclusive=True))
    assert (point.write, point.note) == tuple(resolved["recovery_point"][key] for key in ("write", "note"))
    with found.running_at(point) as box:
        with box.connect("doomed") as connection:
            assert connection.execute("select count(*) from kept").fetchall() == [(1000,)]
        with box.connect() as connection:
            held = set(connection.execute("select client, counter from ledger").fetchall())
        checks = list(verify.verify_sandbox(box))
    assert all(check.ok for check in checks), checks
    lost = [each for each in acked if each not in held]
    inserted = api.log(found.name, table="ledger", limit=100000)["transactions"]
    behind = [each for each in inserted if parse_lsn(each["lsn"]) >= (point.lsn or 0)]
    assert len(lost) == len(behind)
    assert resolved["out"] == len(behind) + 1
    between = [each["xid"] for each in reversed(behind) if parse_lsn(each["lsn"]) < parse_lsn(dropped["lsn"])]
    assert also == between


def test_what_was_dropped_in_a_transaction_comes_back(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Files go at commit: exactly before it they must all be there, whatever the filesystem did already."""
    found = make_set(pg_binaries)
    with found.connect() as connection:
        for name in ("a", "b", "c"):
            connection.execute(f"create table {name} as select generate_series(1, 50000) as n".encode())
        connection.execute("create materialized view m as select * from a")
        connection.execute("drop table b; truncate c")
    for sql in ("drop table b", "truncate c"):
        source = found.source()
        target = Target("xid", api.find(found.name, sql)["transactions"][0]["xid"], exclusive=True)
        point = source.resolve(target)
        with found.running_at(point) as box, box.connect() as session:
            for name in ("a", "b", "c", "m"):
                assert session.execute(f"select count(*) from {name}".encode()).fetchall() == [(50000,)]


IN_PLACE = "set allow_in_place_tablespaces = on"


def test_a_dropped_tablespace_can_be_used_again(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Its directory goes before DROP TABLESPACE commits."""
    found = make_set(pg_binaries)
    with found.connect() as connection:
        connection.execute(IN_PLACE)
        connection.execute("create tablespace spare location ''")
        connection.execute("drop tablespace spare")
        xid = api.log(found.name)["transactions"][0]["xid"]
    told = api.resolve(found.name, Target("xid", xid, exclusive=True))["recovery_point"]
    assert "drops a tablespace" in told["note"]
    with found.running_at(Target("xid", xid, exclusive=True)) as box, box.connect() as connection:
        connection.execute("create table t tablespace spare as select generate_series(1, 10)")
        assert connection.execute("select count(*) from t").fetchall() == [(10,)]
    with found.running_at(Target("xid", xid)) as box, box.connect() as connection:
        assert connection.execute("select count(*) from pg_tablespace where spcname = 'spare'").fetchall() == [(0,)]


def test_a_database_that_was_moved_is_whole_on_both_sides(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """ALTER DATABASE SET TABLESPACE removes the old files only in a transaction behind the one that names the new."""
    found = make_set(pg_binaries)
    found.sql("create database moving")
    with found.connect("moving") as connection:
        connection.execute("create table kept as select generate_series(1, 1000) as n")
    with found.connect() as connection:
        connection.execute(IN_PLACE)
        connection.execute("create tablespace other location ''")
        begin = parse_lsn(connection.execute("select pg_current_wal_insert_lsn()::text").fetchall()[0][0])
        connection.execute("alter database moving set tablespace other")
    moves = [each for each in api.log(found.name)["transactions"] if parse_lsn(each["lsn"]) >= begin]
    assert moves
    question = (
        "select spcname from pg_database d join pg_tablespace t on t.oid = d.dattablespace where datname = 'moving'"
    )
    seen = []
    for each in reversed(moves):
        for exclusive in (True, False):
            with found.running_at(Target("xid", each["xid"], exclusive=exclusive)) as box:
                with box.connect("moving") as connection:
                    assert connection.execute("select count(*) from kept").fetchall() == [(1000,)]
                    seen.append(connection.execute(question.encode()).fetchall()[0][0])
                assert all(check.ok for check in verify.verify_sandbox(box))
    assert seen[0] == "pg_default"
    assert seen[-1] == "other"


def test_a_drop_of_a_database_that_is_replayed_is_no_failure(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Its directory is gone on the volume already when recovery comes to the record."""
    found = make_set(binaries_of(15), size=384 << 20, settings={"autovacuum": "off"})
    found.sql("create database gone")
    api.cut(found.name)
    found.sql("drop database gone")
    attach.syncfs([found.pgdata])
    found.durable()
    source = found.source()
    with found.running_at(Target("newest")) as box:
        assert "useless files" in box.log_file.read_text()
    assert found.verify(source.window()[1].write)["ok"]
