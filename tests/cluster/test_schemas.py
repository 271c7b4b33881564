"""DROP SCHEMA is found by the row of the schema that went, not by the tables that were in it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet


def did(session: psycopg.Connection[Any], *statements: str, end: str = "commit") -> int:
    """Run statements in one transaction; its xid."""
    session.execute("begin")
    row = session.execute("select pg_current_xact_id()::text::bigint").fetchone()
    for statement in statements:
        session.execute(statement.encode())
    session.execute(end.encode())
    assert row is not None
    return int(row[0])


def found_by(found: ProtectedSet, sql: str, **wanted: Any) -> list[tuple[int, str]]:
    """(xid, status), newest first."""
    told = api.find(found.name, sql, newest=True, **wanted)
    assert told["total"] == len(told["transactions"])
    return [(each["xid"], each["status"]) for each in told["transactions"]]


def test_who_dropped_a_schema(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Some rows are known from before the boundary, some are made behind it; all the same when it is cut, or twice."""
    found = make_set(pg_binaries, settings={"max_prepared_transactions": "2", "autovacuum": "off"})
    with found.connect() as session:
        for name in ("early", "kept", "filled"):
            session.execute(f"create schema {name}; create table {name}.x (id int)".encode())
        session.execute("create table filled.y as select 1 as id")
        api.cut(found.name)
        for name in ("empty", "a", "b", "c", "renamed", "again", "prepared", '"With Space"'):
            session.execute(f"create schema {name}".encode())
        session.execute("create table a.x (id int); create table b.x (id int); insert into b.x values (1)")
        tables = did(session, "drop table filled.x")
        rolled = did(session, "drop schema filled cascade", end="rollback")
        full = did(session, "drop schema filled cascade")
        empty = did(session, "drop schema empty")
        early = did(session, "drop table early.x", "savepoint s", "drop schema early", "release s")
        several = did(session, "drop schema a, b, c cascade")
        session.execute("alter schema renamed rename to other")
        other = did(session, "drop schema other")
        undone = did(session, "savepoint s", "drop schema kept cascade", "rollback to s", "drop table kept.x")
        again = [did(session, "drop schema again"), did(session, "create schema again", "drop schema again")]
        quoted = did(session, 'drop schema "With Space"')
        prepared = did(session, "drop schema prepared", end="prepare transaction 'p'")
        session.execute("begin")
        session.execute("create schema late")
        row = session.execute("select pg_current_xact_id()::text::bigint").fetchone()
        session.execute("drop schema late")
        expected: dict[str, list[tuple[int, str]]] = {
            "drop schema filled": [(full, "committed"), (rolled, "aborted")],
            "drop schema empty": [(empty, "committed")],
            "drop schema early": [(early, "committed")],
            "drop schema a": [(several, "committed")],
            "drop schema c": [(several, "committed")],
            "drop schema a, c cascade": [(several, "committed")],
            "drop schema a, empty": [],
            "drop schema other": [(other, "committed")],
            "drop schema kept": [(undone + 1, "aborted")],  # the subtransaction
            "drop schema again": [(xid, "committed") for xid in reversed(again)],
            'drop schema "With Space"': [(quoted, "committed")],
            "drop schema prepared": [(prepared, "prepared")],
            "drop table filled.x": [(tables, "committed")],
            "drop table kept.x": [(undone, "committed")],
        }  # fmt: skip
        assert {sql: found_by(found, sql) for sql in expected} == expected
        api.cut(found.name)
        session.execute("commit")
        session.execute("commit prepared 'p'")
        expected["drop schema prepared"] = [(prepared, "committed")]
        assert row is not None
        expected["drop schema late"] = [(row[0], "committed")]
        assert {sql: found_by(found, sql) for sql in expected} == expected
        api.cut(found.name)
    assert {sql: found_by(found, sql) for sql in expected} == expected
    gone = {
        xid: [each["name"] for told in api.log(found.name, xid=xid)["transactions"] for each in told["objects"]]
        for xid in (early, several, rolled, undone)
    }
    assert gone == {early: ["early"], several: ["a", "b", "c"], rolled: [], undone: []}
    with pytest.raises(TargetError, match="no schema filled is known in database template1"):
        api.find(found.name, "drop schema filled", database="template1")
    assert found_by(found, "drop schema filled", database="postgres") == expected["drop schema filled"]
    point = api.resolve(found.name, Target("newest"), before="DROP SCHEMA filled CASCADE")
    assert point["first_out"]["xid"] == full
    with pytest.raises(TargetError, match="no transaction did"):
        api.resolve(found.name, Target("newest"), before="drop schema kept")
    with pytest.raises(TargetError, match="no schema filledd is known") as raised:
        api.find(found.name, "drop schema filledd")
    assert "nearest are: filled" in (raised.value.hint or "")


PARTITIONED = """
create table parts (id int) partition by list (id);
create table part_1 partition of parts for values in (1);
create table part_2 partition of parts for values in (2);
"""


def test_where_the_row_is_not_known_the_tables_tell(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Without full page writes, for what was made before the last checkpoint."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("alter system set full_page_writes = off")
        session.execute("select pg_reload_conf()")
        for name in ("one", "two"):
            session.execute(f"create schema {name}; create table {name}.x (id int)".encode())
        session.execute(PARTITIONED.encode())
        api.cut(found.name)
        api.cut(found.name)
        session.execute("drop table two.x")
        parts = did(session, "drop table parts")
        dropped = did(session, "drop schema one cascade")
        session.execute("drop schema two")
    assert found_by(found, "drop schema one") == [(dropped, "committed")]
    api.cut(found.name)
    assert found_by(found, "drop schema one") == [(dropped, "committed")]
    assert found_by(found, "drop schema two") == []
    assert found_by(found, "drop table parts") == [(parts, "committed")]
    assert found_by(found, "drop table one.x") == [(dropped, "committed")]


def test_where_pg_namespace_was_rewritten_the_tables_tell(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("vacuum full pg_namespace")
        session.execute("create schema one; create table one.x (id int)")
        found.kill_agent()
        found.up()  # it looks at the catalogs as it starts
        api.cut(found.name)
        dropped = did(session, "drop schema one cascade")
    assert found_by(found, "drop schema one") == [(dropped, "committed")]
