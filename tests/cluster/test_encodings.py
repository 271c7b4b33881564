"""Clusters whose encoding is not UTF-8, as initdb makes them where no locale is set: text is text to every command."""

from __future__ import annotations

import psycopg
import pytest

from pgcdp import api
from pgcdp.records import Target
from pgcdp.recovery.salvage import Wanted
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet


def told(found: ProtectedSet, statement: str) -> list[tuple[object, ...]]:
    """What a client that speaks UTF-8 is answered."""
    with psycopg.connect(found.dsn(), autocommit=True, client_encoding="UTF8") as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.mark.parametrize(("encoding", "table"), [("SQL_ASCII", "bücher"), ("LATIN1", "buecher")])
def test_text_is_text(make_set: MakeSet, binaries_of: BindirOf, encoding: str, table: str) -> None:
    """A table's name beyond ASCII is read from WAL as UTF-8."""
    found = make_set(binaries_of(15), initdb=("--no-locale", f"--encoding={encoding}"))
    told(found, f'create table "{table}" ("größe" int primary key, titel text)')
    told(found, f"""insert into "{table}" values (1, 'Für'), (2, 'Über')""")
    found.sql("create database other")
    if encoding == "SQL_ASCII":
        told(found, f"""insert into "{table}" values (3, E'\\xfc')""")  # in no encoding at all
    assert api.cut(found.name)["number"] >= 1
    assert api.verify(found.name, Target("newest"))["ok"]
    before = found.durable()
    told(found, f'delete from "{table}"')
    (deleted,) = api.find(found.name, f'delete from "{table}"')["transactions"]
    assert [each["name"] for each in deleted["tables"]] == [table]
    wanted = Wanted((f'"{table}"',), None, None)
    target = Target("write", before)
    (row,) = api.salvage(found.name, target, wanted, diff=True, agree=lambda difference: None)["tables"]
    assert row["put_back"] == {"inserted": 3 if encoding == "SQL_ASCII" else 2, "updated": 0}
    titles = told(found, f"""select string_agg(titel, '-' order by "größe") from "{table}" where "größe" < 3""")
    assert titles == [("Für-Über",)]
    hexadecimal = told(found, f"""select encode(titel::bytea, 'hex') from "{table}" where "größe" = 3""")
    assert hexadecimal == ([("fc",)] if encoding == "SQL_ASCII" else [])
    assert api.check(found.name)["ok"]
    api.down(found.name)
    found.up()
    assert told(found, f'select count(*) from "{table}" where "größe" < 3') == [(2,)]
