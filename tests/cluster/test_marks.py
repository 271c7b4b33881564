"""Marks lead to the moment that they were set at, also those inside of transactions, and only when these committed."""

from __future__ import annotations

import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.postgres import role, session
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet


def counted(found: ProtectedSet, name: str, *, exclusive: bool = False) -> tuple[int, str | None]:
    """How many rows the table has at a mark, and what is noted of the point."""
    source = found.source()
    point = source.resolve(Target("name", name=name, exclusive=exclusive))
    with found.running_at(point) as box, box.connect() as connection:
        return int(connection.execute("select count(*) from t").fetchall()[0][0]), point.note


def test_marks_lead_to_their_moment(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15))
    with found.connect() as connection:
        connection.execute("create table t (id int)")
        connection.execute("insert into t values (1)")
        api.mark(found.name, "outside")
        connection.execute("insert into t values (2)")
        connection.execute("select pgcdp.mark('now')")
        connection.execute("insert into t values (3)")
        connection.execute(
            "begin; insert into t values (4); select pgcdp.mark('inside', true); insert into t values (5)"
        )
        connection.execute("insert into t values (6); commit")
        connection.execute("begin; select pgcdp.mark('undone', true); rollback")
        connection.execute("select pg_create_restore_point('point')")
        connection.execute("insert into t values (7)")
        connection.execute(
            "begin; savepoint s; select pgcdp.mark('sub', true); release s; insert into t values (8); commit"
        )
    for _ in range(2):
        assert counted(found, "outside") == (1, None)
        assert counted(found, "now") == (2, None)
        assert counted(found, "inside") == (6, None)
        assert counted(found, "inside", exclusive=True) == (3, None)
        assert counted(found, "point") == (6, None)
        assert counted(found, "sub") == (8, None)
        with pytest.raises(TargetError, match='no mark or restore point "undone"'):
            counted(found, "undone")
        names = [each["name"] for each in api.info(found.name)["marks"]]
        assert names == ["sub", "point", "inside", "now", "outside"]
        api.cut(found.name)
    assert api.mark(found.name, "now")["earlier"]
    rows, note = counted(found, "now")
    assert (rows, note) == (8, '2 marks are called "now"; this is the newest one')


def test_the_role_has_what_it_needs_and_no_more(make_set: MakeSet, pg_binaries: Binaries) -> None:
    found = make_set(pg_binaries, allowed=[r"permission denied", r"role \"pgcdp\"", r"a mark has a name"])
    dsn = session.Dsn.of(found.config)
    assert role.missing(dsn) == []
    found.sql("create database other")
    assert role.missing(dsn) == ["function pgcdp.mark in database other"]
    assert role.install(dsn) == ["postgres", "other"]
    assert role.missing(dsn) == []
    with found.connect() as connection:
        connection.execute("create table secret (id int)")
        connection.execute("set role pgcdp")
        connection.execute("checkpoint")
        connection.execute("select checkpoint_lsn from pg_control_checkpoint()")
        assert connection.execute("select count(*) from pg_settings where name = 'data_directory'").fetchall() == [(1,)]
        connection.execute("select pgcdp.mark('by the role')")
        for forbidden in ("select * from secret", "create table mine (id int)", "select pgcdp.mark('')"):
            with pytest.raises(Exception, match=r"permission denied|a mark has a name"):
                connection.execute(forbidden.encode())
        connection.execute("reset role")
        connection.execute("revoke pg_checkpoint from pgcdp")
    assert role.missing(dsn) == ["membership in pg_checkpoint"]
