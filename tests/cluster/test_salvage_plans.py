"""What `salvage --diff --apply` costs grows with the rows, not with their square, whatever the planner believes.

A mass DELETE and the VACUUM behind it leave a table of which the planner knows that it is empty: also while its rows
come back. Costs are the seconds that Postgres computed, which do not depend on who else uses the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcdp.postgres import comparing, session, tables
from pgcdp.postgres.comparing import Compared
from tests.fix_postgres import BindirOf, Live

FEW, MANY = 15_000, 60_000
TABLES = {
    "plain": "create table big (id int primary key, body text, seat int)",
    "partitions": "create table big (id int primary key, body text, seat int) partition by range (id);"
    " create table p1 partition of big for values from (0) to (10000);"
    " create table p2 partition of big for values from (10000) to (1000000)",
}


def computed(connection: session.Connection) -> float:
    """Seconds of CPU that the session's process has used."""
    words = Path(f"/proc/{connection.info.backend_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def emptied(live: Live, name: str, definition: str, rows: int, vacuum: str) -> None:
    """A database with the table as it was, and one in which it was filled, emptied and vacuumed."""
    for database in (f"then_{name}", f"now_{name}"):
        live.sql(f"create database {database}")
        with live.connect(database) as made:
            for statement in definition.split(";"):
                made.execute(statement.encode())
            made.execute(f"insert into big select n, 'row ' || n, n from generate_series(1, {rows}) n".encode())
            if database.startswith("now"):
                made.execute("delete from big")
                made.execute(f"vacuum {vacuum} big".encode())


def salvage(live: Live, name: str, where: str | None = None) -> tuple[Compared, tuple[int, int], float]:
    """Compare and put back; the CPU that both sessions used."""
    with live.connect(f"then_{name}") as source, live.connect(f"now_{name}") as target:
        (shape,) = tables.find_shapes(target, "big", None)
        (then,) = tables.find_shapes(source, "big", None)
        found = comparing.compare(source, target, then, shape, where, 0)
        (done,) = comparing.put_back(target, [found])
        return found, done, computed(source) + computed(target)


@pytest.mark.parametrize("vacuum", ["", "(truncate false)"])
@pytest.mark.parametrize("kind", TABLES)
def test_an_emptied_table_is_not_read_again_for_each_row(
    make_cluster: Callable[..., Live], binaries_of: BindirOf, kind: str, vacuum: str
) -> None:
    live = make_cluster(binaries_of(15))
    live.sql("alter system set autovacuum = off")
    live.sql("select pg_reload_conf()")
    spent: dict[str, list[float]] = {}
    for rows in (FEW, MANY):
        name = f"r{rows}"
        emptied(live, name, TABLES[kind], rows, vacuum)
        for what, before, expected in (
            ("inserted", "select", (rows, 0)),
            ("nothing to do", "select", (0, 0)),
            ("updated", "update big set seat = -id", (0, rows)),
            ("both", "delete from big where id % 2 = 0; update big set seat = -id", (rows // 2, rows // 2)),
        ):
            with live.connect(f"now_{name}") as now:
                now.execute(before.encode())
            _, done, seconds = salvage(live, name)
            assert done == expected
            spent.setdefault(what, []).append(seconds)
    print(spent)
    for what, (few, many) in spent.items():
        assert many < 8 * few + 0.5, f"{what}: {few} s for {FEW} rows, but {many} s for {MANY}"


def test_few_rows_of_a_large_table_are_found_by_its_key(
    make_cluster: Callable[..., Live], binaries_of: BindirOf
) -> None:
    """While the table is locked it is not read as a whole."""
    live = make_cluster(binaries_of(15))
    emptied(live, "few", TABLES["plain"], 200_000, "")
    with live.connect("now_few") as now:
        now.execute("insert into big select n, 'row ' || n, n from generate_series(1, 200000) n where n <> 7")
        now.execute("update big set seat = 0 where id = 9")
    with live.connect("then_few") as source, live.connect("now_few") as target:
        (shape,), (then,) = tables.find_shapes(target, "big", None), tables.find_shapes(source, "big", None)
        found = comparing.compare(source, target, then, shape, "id <= 20", 0)
        assert (found.difference.deleted, found.difference.changed, found.difference.added) == (1, 1, 0)

        def read() -> int:
            target.execute("select pg_stat_force_next_flush()")
            row = target.execute("select seq_tup_read from pg_stat_user_tables where relname = 'big'").fetchone()
            assert row is not None
            return int(row[0])

        before = read()
        assert comparing.put_back(target, [found]) == [(1, 1)]
        assert read() == before
