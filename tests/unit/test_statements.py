"""SQL to what it does, and which of a transaction's statements did what is looked for."""

from __future__ import annotations

import pytest

from pgcdp.errors import TargetError, UsageError
from pgcdp.postgres.statements import deeds_of, is_statement, telling


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("DELETE FROM orders WHERE id = 7;", "delete orders"),
        ('delete from only "Sales"."Orders" using other', "delete Sales.Orders"),
        ("INSERT INTO orders", "insert orders"),
        ("insert into orders (id)", "insert orders"),
        ("update sales.orders ;", "update sales.orders"),
        ("update orders set id = 1", "update orders"),
        ("copy orders (id) from stdin", "insert orders"),
        ("truncate a, s.b cascade", "truncate a, truncate s.b"),
        ("drop table if exists a, s.b cascade", "drop a, drop s.b"),
        ("drop schema a, b cascade", "drop schema a, drop schema b"),
        ("drop database d with (force)", "drop database d"),
        ("with gone as (delete from a returning *) insert into b select * from gone", "insert b, delete a"),
        ("begin; delete from a; commit;", "delete a"),
        ("vacuum full a", "rewrite a"),
        ("alter table a alter id type bigint", "rewrite a"),
        ("create table a as select 1", "create a"),
        ("select 1 into s.a", "create s.a"),
        ("explain analyze delete from a", "delete a"),
        ("refresh materialized view m", "rewrite m"),
    ],
)
def test_deeds(sql: str, expected: str) -> None:
    assert ", ".join(map(str, deeds_of(sql))) == expected


@pytest.mark.parametrize(
    ("sql", "operations"),
    [
        ("insert into t values (1) on conflict do nothing", ["insert"]),
        ("insert into t values (1) on conflict (id) do update set id = 2", ["insert", "update"]),
        ("merge into t using s on t.id = s.id when matched then delete when not matched then insert values (1)",
         ["insert", "delete"]),
        ("refresh materialized view concurrently t", ["insert", "update", "delete"]),
    ],
)  # fmt: skip
def test_statements_that_may_do_one_thing_or_another(sql: str, operations: list[str]) -> None:
    (deed,) = deeds_of(sql)
    assert [deed.operation, *deed.instead] == operations


@pytest.mark.parametrize("sql", ["delete from a; delete from b", "begin; delete from a; select 1; commit"])
def test_several_statements_are_not_looked_for_as_one(sql: str) -> None:
    with pytest.raises(UsageError, match="is 2 statements") as raised:
        deeds_of(sql)
    assert "give one statement" in str(raised.value.hint)


@pytest.mark.parametrize(
    "sql", ["", "select 1", "vacuum t", "drop index i", "copy t to stdout", "delete orders", "insert"]
)
def test_what_cannot_be_looked_for(sql: str) -> None:
    with pytest.raises(TargetError) as raised:
        deeds_of(sql)
    assert raised.value.hint


def test_which_statement_tells() -> None:
    texts = ["begin", "select 1", "delete from s.a", "delete from b", "delete from a", "delete from a", "?", "commit"]
    assert telling(texts, deeds_of("delete from a")) == ["delete from s.a", "delete from a"]
    assert telling(texts, deeds_of("delete from s.a")) == ["delete from s.a", "delete from a"]
    assert telling(texts, deeds_of("delete from other.a")) == ["delete from a"]
    assert telling(texts, deeds_of("truncate a")) == ["delete from s.a", "delete from b", "delete from a"]
    assert telling(["begin", "select f()", "SAVEPOINT s", "commit"], deeds_of("truncate a")) == ["select f()"]
    assert telling([], deeds_of("truncate a")) == []


def test_is_statement() -> None:
    assert is_statement("select 1")
    assert not is_statement("")
    assert not is_statement("no SQL")
