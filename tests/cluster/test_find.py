"""`find` with the statements that people run: on tables by all their names, through partitions and heirs."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from tests.fix_sets import MakeSet, ProtectedSet

MADE = """
create schema sales;
create table orders (id int primary key, note text);
create table sales.orders (id int primary key, note text);
create table lines (order_id int references orders on delete cascade);
create table parts (id int, region text) partition by list (region);
create table part_a partition of parts for values in ('a');
create table part_b partition of parts for values in ('b') partition by range (id);
create table part_b1 partition of part_b for values from (0) to (100);
create table animals (name text);
create table cats (lives int) inherits (animals);
create table empty_parts (id int) partition by list (id);
create foreign data wrapper nowhere;
create server far foreign data wrapper nowhere;
create foreign table elsewhere (id int) server far;
create table "Mixed Case" (id int);
create unlogged table scratch (id int primary key);
create materialized view m as select random() as id;
create unique index on m (id);
"""


def did(session: psycopg.Connection[Any], statement: str, *, copied: str = "") -> int:
    """Run a statement in a transaction of its own; its xid."""
    with session.transaction():
        row = session.execute("select pg_current_xact_id()::text::bigint").fetchone()
        if copied:
            with session.cursor().copy(statement.encode()) as copy:
                copy.write(copied)
        else:
            session.execute(statement.encode())
    assert row is not None
    return int(row[0])


def hits(found: ProtectedSet, sql: str) -> list[int]:
    """Newest first."""
    return [each["xid"] for each in api.find(found.name, sql, newest=True)["transactions"]]


STATEMENTS = {
    "first": "insert into orders select n, 'x' from generate_series(1, 9) n",
    "copied": "copy sales.orders from stdin",
    "lines": "insert into lines select id from orders",
    "parts": "insert into parts values (1, 'a'), (2, 'a'), (3, 'b'), (4, 'b')",
    "dog": "insert into animals values ('dog')",
    "cat": "insert into cats values ('tom', 9)",
    "changed": "update sales.orders set note = 'z' where id = 2",
    "away": "delete from sales.orders where id = 2",
    "b": "delete from parts where id = 3",
    "moved": "update parts set region = 'b' where id = 2",
    "a": "delete from part_a where id = 1",
    "all": "delete from animals",
    "with": "with gone as (delete from orders where id = 9 returning id) insert into orders select id + 100 from gone",
    "merged": """merge into orders o using (values (1)) v (id) on o.id = v.id when matched then update set note = 'm'
        when not matched then insert values (v.id, 'new')""",
    "conflict": "insert into orders values (2, 'q') on conflict (id) do update set note = 'conflict'",
    "explained": "explain analyze delete from orders where id = 3",
    "cascade": "truncate orders cascade",
    "emptied": "truncate parts",
    "rewritten": "alter table sales.orders alter id type bigint",
    "rewritten parts": "alter table parts add column more float default random()",
    "as": "create table copy_of as select * from sales.orders",
    "into": "select 1 as id into another",
    "refreshed": "refresh materialized view m",
    "concurrently": "refresh materialized view concurrently m",
    "mixed": 'insert into "Mixed Case" values (1)',
    "mixed gone": 'drop table "Mixed Case"',
    "matview": "drop materialized view m",
    "scratch emptied": "truncate scratch",
    "scratch gone": "drop table scratch",
    "part gone": "drop table part_a",
    "heir gone": "drop table cats",
    "part of part gone": "drop table part_b1",
    "animals gone": "drop table animals",
    "parts gone": "drop table parts",
    "empty parts gone": "drop table empty_parts",
    "elsewhere gone": "drop foreign table elsewhere",
    "gone": "drop table lines, orders",
    "sales": "drop table sales.orders",
}

FOUND = {
    "insert into orders": ["with", "copied", "first"],
    "INSERT INTO public.orders": ["with", "first"],
    "insert into sales.orders": ["copied"],
    "copy sales.orders (id) from '/file'": ["copied"],
    "update parts": ["moved"],
    "update part_a": ["moved"],
    "update part_b": [],
    "insert into part_b1": ["moved", "parts"],
    "insert into animals": ["cat", "dog"],
    "insert into cats": ["cat"],
    "UPDATE sales.orders": ["changed"],
    "update orders": ["conflict", "merged", "changed"],
    "update public.orders": ["conflict", "merged"],
    "delete from sales.orders where whatever": ["away"],
    "delete from parts": ["a", "b"],
    "delete from part_b": ["b"],
    "delete from part_a": ["a"],
    "delete from cats": ["all"],
    "delete from orders": ["explained", "with", "away"],
    "with gone as (delete from orders) insert into orders values (1)": ["with"],
    "truncate orders": ["cascade"],
    "truncate lines": ["cascade"],
    "truncate lines, orders": ["cascade"],
    "truncate part_b": ["emptied"],
    "alter table part_a add x int": ["rewritten parts"],
    "alter table orders add x int": ["rewritten"],
    "alter table public.orders add x int": [],
    "create table copy_of (id int)": ["as"],
    "create table another as select 1": ["into"],
    "drop table lines": ["gone"],
    "drop table orders": ["sales", "gone"],
    "truncate scratch": ["scratch emptied"],
    "drop table scratch": ["scratch gone"],
    "drop table part_a": ["part gone"],
    "drop table cats": ["heir gone"],
    "drop table animals": ["animals gone"],
    "drop table part_b1": ["part of part gone"],
    "drop table part_b": ["parts gone"],
    "drop table parts": ["parts gone"],
    "drop table empty_parts": ["empty parts gone"],
}


def test_statements_hit_what_they_did(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Each is found by itself and by others of its kind; before a look at the catalogs, and when all is cut."""
    found = make_set(pg_binaries, settings={"autovacuum": "off"})
    api.cut(found.name)
    with found.connect() as session:
        session.execute(MADE.encode())
        copied = {"copied": "1\tx\n2\ty\n"}
        xids = {name: did(session, sql, copied=copied.get(name, "")) for name, sql in STATEMENTS.items()}
    names = {xid: name for name, xid in xids.items()}
    for _ in range(2):
        assert [name for name, sql in STATEMENTS.items() if xids[name] not in hits(found, sql)] == []
        assert {sql: [names.get(xid) for xid in hits(found, sql)] for sql in FOUND} == FOUND
        ((left,),) = (told["tables"] for told in api.log(found.name, xid=xids["a"])["transactions"])
        assert (left["name"], left["rows"], left["deleted"]) == ("part_a", 1, 1)  # the other one was moved away
        api.cut(found.name)
    for name in ("parts", "animals"):  # what dropped a part of it alone does not make it ambiguous
        point = api.resolve(found.name, Target("newest"), before=f"drop table {name}")
        assert names.get(point["first_out"]["xid"]) == f"{name} gone"
    assert [told["xid"] for told in api.log(found.name, table='"Mixed Case"', operation="drop")["transactions"]] == [
        xids["mixed gone"]
    ]
    for sql, nearest in (
        ("delete from elsewhere.orders", "public.orders, sales.orders, "),
        ("delete from mixed case", 'public."Mixed Case"'),
        ("delete from ORDERZ.orders", "public.orders, sales.orders, "),
    ):
        with pytest.raises(TargetError, match=r"no table .* is known") as raised:
            api.find(found.name, sql.replace("mixed case", '"mixed case"'))
        assert str(raised.value.hint).startswith(f"the nearest are: {nearest}")
    (gone,) = api.log(found.name, xid=xids["empty parts gone"])["transactions"]
    assert gone["objects"] == [{"what": "table", "database": "postgres", "name": "public.empty_parts"}]
    with pytest.raises(TargetError, match="changes no table"):
        api.find(found.name, "select 1")


def test_a_name_without_a_schema_hides_no_schema(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """What was lost in one schema is not passed over because one of the search path has a table of that name."""
    found = make_set(pg_binaries, settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("create schema sales")
        for name in ("orders", "sales.orders", "sales.bills", "bills"):
            session.execute(f"create table {name} as select n as id from generate_series(1, 200) n".encode())
        less = did(session, "delete from orders where id <= 49")
        lost = did(session, "delete from sales.orders")
        emptied = did(session, "delete from sales.bills")
    told = api.find(found.name, "DELETE FROM orders")
    assert [(each["xid"], each["tables"][0]["schema"]) for each in told["transactions"]] == [
        (lost, "sales"), (less, "public"),
    ]  # fmt: skip
    logged = api.log(found.name, table="orders", operation="delete")["transactions"]
    assert [each["xid"] for each in logged] == [lost, less]
    with pytest.raises(TargetError, match='2 transactions did "DELETE FROM orders"') as raised:
        api.resolve(found.name, Target("newest"), before="DELETE FROM orders")
    assert {each["xid"] for each in raised.value.candidates} == {lost, less}
    assert raised.value.hint == (
        f"choose one, such as --target-xid {lost} --exclusive for the first one listed, "
        f"--target-xid {less} --exclusive for the earliest one listed; or name the schema: public.orders, sales.orders"
    )
    with pytest.raises(TargetError, match="no database nodb is known") as raised:
        api.find(found.name, "DELETE FROM orders", database="nodb")
    assert "postgres" in str(raised.value.hint)
    assert api.find(found.name, "DELETE FROM orders", database="postgres")["total"] == 2
    point = api.resolve(found.name, Target("newest"), before="DELETE FROM sales.orders")
    assert point["first_out"]["xid"] == lost
    point = api.resolve(found.name, Target("newest"), before="DELETE FROM bills")
    assert point["first_out"]["xid"] == emptied
