"""Salvage brings back the rows that were there, all of them, and touches nothing else."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.errors import PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.records import Target
from pgcdp.recovery.salvage import Wanted
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet

NEWEST = Target("newest")
BEFORE = "delete from orders"


@pytest.fixture
def shop(make_set: MakeSet, binaries_of: BindirOf) -> ProtectedSet:
    """Orders 1 to 1000, of which a DELETE took the even ones; then some were changed and some added."""
    found = make_set(binaries_of(15))
    with found.connect() as session:
        session.execute("""create table orders (id int generated always as identity primary key, note text,
            total numeric, twice numeric generated always as (total * 2) stored, doc json,
            at timestamptz default now())""")
        session.execute("""insert into orders (note, total, doc)
            select 'it''s ' || n, n / 3.0, '{"a": 1}' from generate_series(1, 1000) n""")
        session.execute("create schema s; create table s.other (id int primary key); insert into s.other values (1)")
        session.execute("create unlogged table volatile (id int); insert into volatile values (1)")
        session.execute("create table kept as select * from orders")
    api.cut(found.name)
    with found.connect() as session:
        session.execute("delete from orders where id % 2 = 0")
        session.execute("update orders set note = 'changed' where id <= 9")
        session.execute("insert into orders (note, total) values ('new', 1), ('new', 2)")
    return found


def salvage(found: ProtectedSet, *tables: str, **options: Any) -> dict[str, Any]:
    where = options.pop("where", None)
    schema = options.pop("schema", None)
    before = options.pop("before", BEFORE)
    return api.salvage(found.name, NEWEST, Wanted(tables, schema, where), before=before, **options)


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    """The command as people type it."""
    program = (sys.executable, "-P", "-m", "pgcdp")
    return subprocess.run([*program, *words], check=True, capture_output=True, text=True)


def missing(found: ProtectedSet, one: str, other: str) -> int:
    """How many rows of one table the other does not have."""
    rows = found.sql(f"select count(*) from (select a::text from {one} a except select b::text from {other} b) d")
    return int(rows[0][0])


def test_rows_come_into_a_new_table(shop: ProtectedSet) -> None:
    told = salvage(shop, "orders")
    assert told["tables"][0]["rows"] == 1000
    assert shop.sql(
        "select count(*) from (select a::text from orders_salvaged a except select b::text from kept b) d"
    ) == [(0,)]
    assert shop.sql(
        "select count(*) from (select a::text from kept a except select b::text from orders_salvaged b) d"
    ) == [(0,)]
    assert shop.sql("select count(*) from orders") == [(502,)]
    with pytest.raises(PreconditionError, match=r"table public\.orders_salvaged exists"):
        salvage(shop, "orders")
    told = salvage(shop, "public.orders", name="evens", where="id % 2 = 0")
    assert told["tables"][0]["rows"] == 500


def test_that_a_dropped_table_comes_back_bare_is_said(shop: ProtectedSet) -> None:
    """Whoever renames the new table into its place would run on without its key and its constraints."""
    assert salvage(shop, "s.other")["tables"][0]["note"] is None, "the table itself is still there"
    shop.sql("drop table s.other, s.other_salvaged")
    words = ["salvage", shop.name, "--before", "drop table s.other", "--table", "s.other"]
    said = typed(*words).stderr
    assert "note: s.other itself is gone, and the new table has only its columns and rows: no primary key" in said
    place = shop.root / "other.dump"
    assert f"--file {place.name}, then: pg_restore --dbname=postgres {place.name}" in said
    typed(*words, "--file", str(place))
    subprocess.run(shop.program("pg_restore", "--dbname=postgres", str(place)), check=True, cwd="/")
    assert shop.sql("select conname::text from pg_constraint where conrelid = 's.other'::regclass and contype = 'p'")


def test_that_nothing_was_to_be_put_back_is_said(shop: ProtectedSet) -> None:
    words = ["salvage", shop.name, "--before", BEFORE, "--table", "orders", "--diff", "--apply", "--yes"]
    assert "public.orders: 500 rows inserted, 5 updated\n" in typed(*words).stdout
    assert typed(*words).stdout.endswith(
        "public.orders: nothing to put back, no row is gone or changed; 2 newer ones are kept\n"
    )


def test_only_what_was_lost_is_put_back(shop: ProtectedSet) -> None:
    seen: list[dict[str, Any]] = []
    told = salvage(shop, "orders", diff=True)
    difference = told["tables"][0]["difference"]
    assert (difference["deleted"], difference["changed"], difference["added"]) == (500, 5, 2)
    assert difference["samples"]["added"] == [{"id": "1001"}, {"id": "1002"}]
    assert shop.sql("select count(*) from orders") == [(502,)]
    told = salvage(shop, "orders", diff=True, agree=seen.append)
    assert seen[0]["difference"] == difference
    assert told["tables"][0]["put_back"] == {"inserted": 500, "updated": 5}
    assert missing(shop, "kept", "orders") == 0
    assert shop.sql("select id, note from orders where id > 1000 order by id") == [(1001, "new"), (1002, "new")]
    told = salvage(shop, "orders", diff=True, agree=seen.append)
    assert told["tables"][0]["put_back"] == {"inserted": 0, "updated": 0}
    assert len(seen) == 1


def test_nothing_is_put_back_over_what_came_meanwhile(shop: ProtectedSet) -> None:
    def change(_: dict[str, Any]) -> None:
        shop.sql("update orders set note = 'meanwhile' where id = 11")

    with pytest.raises(PreconditionError, match="has changed since"):
        salvage(shop, "orders", diff=True, agree=change)
    assert shop.sql("select count(*) from orders") == [(502,)]

    def refuse(_: dict[str, Any]) -> None:
        raise PgcdpError("not confirmed")

    with pytest.raises(PgcdpError, match="not confirmed"):
        salvage(shop, "orders", diff=True, agree=refuse)
    assert shop.sql("select count(*) from orders") == [(502,)]


def test_files(shop: ProtectedSet) -> None:
    place = Path(shop.root / "out.csv")
    assert salvage(shop, "orders", file=place, where="id <= 10")["tables"][0]["rows"] == 10
    with place.open() as file:
        assert [row["note"] for row in csv.DictReader(file)] == [f"it's {n}" for n in range(1, 11)]
    with pytest.raises(UsageError, match="exists"):
        salvage(shop, "orders", file=place)
    with pytest.raises(UsageError, match="no known ending"):
        salvage(shop, "orders", file=shop.root / "out.xls")
    dump = shop.root / "out.dump"
    salvage(shop, schema="s", file=dump)
    words = [str(shop.binaries.path("pg_restore")), "--list", str(dump)]
    assert "TABLE DATA s other" in subprocess.run(words, check=True, capture_output=True, text=True).stdout
    text = shop.root / "out.sql"
    salvage(shop, "orders", "s.other", file=text, where="id = 1")
    assert text.read_text().count("it's ") == 1
    assert not list(shop.root.glob("*.partial"))


def test_a_file_that_cannot_be_written_is_said_before_any_work(shop: ProtectedSet) -> None:
    """Even before the target is looked for, of which there is none here."""
    (shop.root / "here.csv").touch()
    refused: list[tuple[str, type[PgcdpError], str]] = [
        ("no/where.csv", PreconditionError, "no is no directory"),
        ("here.csv", UsageError, "here.csv exists"),
        ("out.xls", UsageError, "no known ending"),
    ]
    for name, kind, words in refused:
        with pytest.raises(kind, match=words):
            salvage(shop, "orders", before="drop table orders", file=shop.root / name)


def test_quoted_names_and_the_database_that_is_meant(shop: ProtectedSet) -> None:
    shop.sql("create database another")
    with shop.connect("another") as session:
        session.execute("create table kept (id int primary key)")
    shop.sql('create table s."Order Items.x" (id int); insert into s."Order Items.x" values (1), (2)')
    shop.sql("truncate kept")
    assert salvage(shop, 's."Order Items.x"', before=None)["tables"][0]["rows"] == 2
    with pytest.raises(TargetError, match="was in databases"):
        salvage(shop, "kept", before=None)
    told = salvage(shop, "kept", before="truncate kept")
    assert (told["database"], told["tables"][0]["rows"]) == ("postgres", 1000)


def test_a_prepared_transaction_that_holds_the_table_is_named(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings={"max_prepared_transactions": "5"})
    with found.connect() as live:
        live.execute("create table tr (id int primary key); insert into tr values (1), (2)")
        live.execute("create table rowwise (id int primary key); insert into rowwise values (1), (2)")
        earlier = found.durable()
        live.execute("begin; truncate tr; delete from rowwise where id = 1; prepare transaction 'it''s y'")
        point = Target("write", found.durable())
        xid = live.execute("select transaction::text::bigint from pg_prepared_xacts").fetchone()
        live.execute("commit prepared 'it''s y'")
    assert xid is not None
    tr = Wanted(("tr",))
    ways: list[tuple[Wanted, dict[str, Any]]] = [
        (tr, {"file": found.root / "tr.csv"}),
        (tr, {"file": found.root / "tr.sql"}),
        (tr, {"diff": True}),
        (tr, {}),
        (Wanted(("tr",), None, "id = 1"), {}),
    ]
    for wanted, options in ways:
        with pytest.raises(PreconditionError, match=rf'locked by .* "it\'s y" \(xid {xid[0]}, prepared 20') as raised:
            api.salvage(found.name, point, wanted, **options)
        assert f"--target-xid {xid[0]} " in str(raised.value.hint)
        assert raised.value.exit_code == 6
    rowwise = Wanted(("rowwise",), None, "id = 2")
    with pytest.raises(PreconditionError, match="it's y"):
        api.salvage(found.name, point, rowwise, file=found.root / "rowwise.sql")
    assert api.salvage(found.name, point, rowwise, file=found.root / "rowwise.csv")["tables"][0]["rows"] == 1
    assert api.salvage(found.name, Target("write", earlier), Wanted(("tr",)))["tables"][0]["rows"] == 2


def test_a_schema_that_is_gone(shop: ProtectedSet) -> None:
    """It is not made anew behind its owner's back: who has it, and who may use it, is theirs to say."""
    shop.sql("drop schema s cascade")
    with pytest.raises(PreconditionError, match="schema s does not exist in that database now") as raised:
        salvage(shop, "s.other")
    assert str(raised.value.hint).startswith('create schema "s"; or')
    shop.sql("create schema s")
    assert salvage(shop, "s.other")["tables"][0]["rows"] == 1


@pytest.mark.parametrize("ending", ["sql", "dump"])
def test_partitions_and_heirs_come_along(make_set: MakeSet, binaries_of: BindirOf, ending: str) -> None:
    found = make_set(binaries_of(15))
    with found.connect() as live:
        live.execute("create schema away")
        live.execute("create table parts (id int primary key, body text) partition by range (id)")
        live.execute("create table away.p1 partition of parts for values from (0) to (500)")
        live.execute("create table p2 partition of parts for values from (500) to (2000) partition by range (id)")
        live.execute("""create table "P ""2.$*""" + '"' + """ partition of p2 for values from (500) to (2000)""")
        live.execute("insert into parts select n, 'x' || n from generate_series(1, 1000) n")
        live.execute("create table base (id int); create table heir (more text) inherits (base)")
        live.execute("insert into base values (1); insert into heir values (2, 'two'), (3, 'three')")
        live.execute("create materialized view seen as select 1 as n")
        live.execute("create database copy")
    file = found.root / f"out.{ending}"
    told = salvage(found, "parts", "base", before=None, file=file, where="id <> 3 and id < 901")["tables"]
    assert [each["rows"] for each in told] == [899, 2]
    words = ("psql", "-qv", "ON_ERROR_STOP=1", "-f") if ending == "sql" else ("pg_restore", "--exit-on-error")
    with found.connect("copy") as copy:
        copy.execute("create schema away")
        command = found.program(words[0], "-d", "copy", *words[1:], str(file))
        subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
        for table in ("parts", "away.p1", "base", "heir"):
            query = f"select * from {table} where id <> 3 and id < 901 order by 1".encode()
            with found.connect() as live:
                assert copy.execute(f"select * from {table} order by 1".encode()).fetchall() == (
                    live.execute(query).fetchall()
                )
    if ending == "sql":
        with pytest.raises(UsageError, match="is a materialized view"):
            salvage(found, "seen", before=None, file=found.root / "seen.sql")


def test_a_foreign_table_is_another_servers(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Its rows are not in the recovery point, and what is done to it would be done to them where they live."""
    found = make_set(binaries_of(15))
    found.sql("create database other")
    with found.connect("other") as other:
        other.execute("create table r (id int); insert into r select generate_series(1, 10)")
    with found.connect() as session:
        session.execute("create extension postgres_fdw; create schema f")
        place = f"host '{found.sockets}', dbname 'other'"
        session.execute(f"create server srv foreign data wrapper postgres_fdw options ({place})".encode())
        session.execute("create user mapping for public server srv options (user 'postgres')")
        remote = "server srv options (schema_name 'public', table_name 'r')"
        session.execute(f"create foreign table f.r (id int) {remote}".encode())
        session.execute("create table f.own (id int); insert into f.own values (1), (2)")
        session.execute("create table parts (id int) partition by range (id)")
        session.execute(f"create foreign table f.part partition of parts for values from (0) to (9) {remote}".encode())
        session.execute("create view through as select id from f.r")
    for tables, schema in ((("f.r",), None), ((), "f"), (("parts",), None)):
        with pytest.raises(TargetError, match="is a foreign table") as raised:
            salvage(found, *tables, schema=schema, before=None, where="id = 1", file=found.root / "f.sql")
        assert raised.value.exit_code == 3
    with pytest.raises(PgcdpError, match="could not connect"):
        salvage(found, "f.own", before=None, where="id in (select id from through)", file=found.root / "own.csv")
    with found.connect("other") as other:
        assert other.execute("select count(*) from r").fetchone() == (10,)


def test_what_cannot_be_salvaged_is_said(shop: ProtectedSet) -> None:
    for tables, words in (
        (("volatile",), "is unlogged"),
        (("ordres",), "table ordres did not exist then"),
        (("orders", "nothing"), "table nothing did not exist then"),
    ):
        with pytest.raises(TargetError, match=words) as raised:
            salvage(shop, *tables)
        assert raised.value.hint
    with pytest.raises(UsageError, match="no condition"):
        salvage(shop, "orders", where="nonsense = 1")
    shop.sql("create unlogged table s.orders (id int)")
    with pytest.raises(TargetError, match=r"there are several tables orders: public\.orders, s\.orders"):
        salvage(shop, "orders", before=None)
