"""The statement of a transaction out of Postgres's own log: of the right one, and of no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import api
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until

LOGGING = {"logging_collector": "on", "log_statement": "mod", "log_timezone": "Europe/Berlin", "autovacuum": "off"}
QUOTED = """DELETE FROM orders
  WHERE note = 'it''s "quoted", \\ and
2026-11-25 03:14:02.876 UTC,"postgres","postgres",1,"[local]",1.1,1,"idle",2026-11-25 03:14:02 UTC,3/3,{xid},LOG,'"""


def xid_of(session: psycopg.Connection[Any]) -> int:
    row = session.execute("select pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def statements(told: dict[str, Any], *unknown: int) -> dict[int, str | None]:
    """By xid. `unknown`: those whose statements the log does not tell, as it says."""
    found = re.search(r"no record with the id of transaction ([\d, ]+), so that", told["note"] or "")
    assert (found[1] if found else told["note"]) == (", ".join(map(str, unknown)) or None)
    return {each["xid"]: each["statement"] for each in told["transactions"]}


def log_files(found: ProtectedSet, directory: str = "log") -> list[Path]:
    return [file for file in (found.pgdata / directory).iterdir() if file.suffix in (".csv", ".json")]


def written(found: ProtectedSet, text: str, directory: str = "log") -> None:
    """Until the log has `text`, and pgcdp knows where that is: the collector writes behind the back of the session that
    logged, and the agent asks for settings behind that of both."""

    def told() -> bool:
        return any(text.encode() in file.read_bytes() for file in log_files(found, directory))

    wait_until(told, what=f"{text!r} in the server's log")
    wait_until(lambda: found.source().newest_settings(), timeout=90, what="the settings of the cluster")


def rotate(found: ProtectedSet) -> None:
    """Until there is one more file: its name changes each second."""
    before = len(log_files(found))

    def rotated() -> bool:
        found.sql("select pg_rotate_logfile()")
        return len(log_files(found)) > before

    wait_until(rotated, what="a new log file")


@pytest.mark.parametrize(
    ("version", "destination"),
    [(15, "csvlog"), (15, "jsonlog"), (17, "stderr, jsonlog"), (17, "csvlog"), (18, "csvlog"), (18, "stderr,jsonlog")],
)
def test_statements_of_two_sessions(make_set: MakeSet, binaries_of: BindirOf, version: int, destination: str) -> None:
    """Each is told of the transaction that ran it, also when its record was written before it had an id."""
    names = {"log_destination": destination, "log_filename": "server-%Y%m%d%H%M%S.log"}
    found = make_set(binaries_of(version), settings={**LOGGING, **names})
    with found.connect() as one, found.connect() as two:
        one.execute("create table orders (id int primary key, note text)")
        one.execute("insert into orders select n, 'n' from generate_series(1, 100) n")
        one.execute("begin")
        two.execute("begin")
        one.execute("DELETE FROM orders WHERE id < 10")
        two.execute("DELETE FROM orders WHERE id > 90 /* the other */")
        first, second = xid_of(one), xid_of(two)
        one.execute("UPDATE orders SET note = 'x' WHERE id = 50")
        two.execute("INSERT INTO orders VALUES (1000, 'y')")
        one.execute("commit")
        rotate(found)
        two.execute("update orders set note = 'z' where id = 1000")
        two.execute("rollback")
        one.execute("begin")
        third = xid_of(one)
        one.execute(QUOTED.format(xid=second).encode())
        one.execute("delete from orders where id = %s", [20])
        one.execute("commit")
        two.execute("DELETE FROM orders WHERE id = 30 -- alone, before it had an id")
        alone_xid = third + 1
        written(found, "-- alone, before it had an id")
    both = {
        first: "DELETE FROM orders WHERE id < 10",
        second: "DELETE FROM orders WHERE id > 90 /* the other */",
    }
    for _ in range(2):
        told = statements(api.find(found.name, "delete from orders"), alone_xid)
        third_told = told.pop(third)
        assert third_told is not None
        text, _, behind = third_told.partition(";\n")
        assert text == QUOTED.format(xid=second)
        assert re.fullmatch(r"delete from orders where id = \$1 -- [Pp]arameters: \$1 = '20'", behind)
        assert {xid: told.pop(xid) for xid in both} == both
        assert set(told.values()) == {None}  # nothing says whose it was
        assert len(told) == 1
        api.cut(found.name)
    updated = statements(api.find(found.name, "update public.orders set note = ''"))
    assert updated == {
        first: "UPDATE orders SET note = 'x' WHERE id = 50",
        second: "update orders set note = 'z' where id = 1000",
    }
    last = statements(api.log(found.name, table="orders"))
    assert last[first] == "UPDATE orders SET note = 'x' WHERE id = 50"
    assert last[second] == "update orders set note = 'z' where id = 1000"
    alone = api.find(None, "delete from orders", found.store)
    assert {each["statement"] for each in alone["transactions"]} == {None}


@pytest.mark.parametrize(("version", "destination"), [(15, "csvlog"), (17, "jsonlog"), (18, "csvlog")])
def test_a_lone_statement_is_told_by_auto_explain(
    make_set: MakeSet, binaries_of: BindirOf, version: int, destination: str
) -> None:
    """And one with parameters by its duration; what a function did is told by who called it."""
    explain = {"shared_preload_libraries": "auto_explain", "auto_explain.log_min_duration": "0"}
    settings = {**LOGGING, **explain, "log_destination": destination, "log_min_duration_statement": "0"}
    found = make_set(binaries_of(version), settings=settings)
    with found.connect() as session:
        session.execute("create table t (id int)")
        session.execute("create function f() returns void language sql as 'truncate t'")
        session.execute("insert into t\nselect n from generate_series(1, 100) n")
        session.execute("delete from t where id = %s", [7])
        session.execute("begin; select 1; commit; begin")
        session.execute("select f()")
        session.execute("commit")
        session.execute("select 'the last one'")
        written(found, "'the last one'")
    assert list(statements(api.find(found.name, "insert into t")).values()) == [
        "insert into t\nselect n from generate_series(1, 100) n"
    ]
    (deleted,) = statements(api.find(found.name, "delete from t")).values()
    assert deleted is not None
    assert re.match(r"delete from t where id = \$1 -- [Pp]arameters: \$1 = '7'", deleted)
    (truncated,) = statements(api.find(found.name, "truncate t")).values()
    assert truncated == "select f()"
    write = api.find(found.name, "delete from t")["transactions"][0]["write"]
    assert [each["statement"] for each in api.show(found.name, write)["holds"]["transactions"]] == [deleted]


def test_statements_are_shown_below_and_a_log_that_cannot_be_read_is_a_note(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    found = make_set(binaries_of(15), settings={**LOGGING, "log_destination": "csvlog", "log_directory": "said"})
    with found.connect() as session:
        session.execute("create table t (id int)")
        session.execute("begin; insert into t values (1)")
        session.execute("insert into t\n values (2) /* \x1b[31m red */")
        session.execute("commit")
    written(found, "values (2)", "said")

    def text(*words: str) -> list[str]:
        command = [sys.executable, "-P", "-m", "pgcdp", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
        return [*done.stdout.splitlines(), *done.stderr.splitlines()]

    shown = text("find", "insert into t")
    assert shown[2].startswith("    begin; insert into t values (1); insert into t values (2) /*")
    assert "\x1b" not in shown[2]
    following = api.follow(found.name, table="t", operation="insert")
    assert (next(following)["statement"] or "").startswith("insert into t\n values (2)")
    (found.pgdata / "said").rename(found.pgdata / "elsewhere")
    (found.pgdata / "said").write_text("no directory")
    for words in (["find", "insert into t"], ["log", "--op", "insert"]):
        lines = text(*words)
        assert "2 inserted" in lines[1]
        assert any("the server's log cannot be read" in line for line in lines)
    (found.pgdata / "said").unlink()
    (found.pgdata / "elsewhere").rename(found.pgdata / "said")
