"""Tables, and their rows carried from one Postgres to another (used by salvage)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from pgcdp.errors import PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.postgres.session import is_ascii

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection

_TABLES_SQL = """
select c.oid::bigint, n.nspname::text, c.relname::text, c.relpersistence::text, c.relkind::text
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p', 'm', 'f') and n.nspname not in ('pg_catalog', 'information_schema')
  and n.nspname not like 'pg\\_%'
order by 2, 3
"""
_PARTS_SQL = """
with recursive below(oid) as (
  select %s::oid union select i.inhrelid from pg_inherits i join below b on i.inhparent = b.oid
)
select c.oid::bigint, n.nspname::text, c.relname::text, c.relpersistence::text, c.relkind::text
from below b join pg_class c on c.oid = b.oid join pg_namespace n on n.oid = c.relnamespace
order by b.oid <> %s::oid, 2, 3
"""
_COLUMNS_SQL = """
select a.attname::text, format_type(a.atttypid, a.atttypmod), a.attgenerated <> '', a.attidentity = 'a'
from pg_attribute a where a.attrelid = %s and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
_KEY_SQL = """
select array_agg(a.attname::text order by k.place)
from pg_index i cross join unnest(i.indkey::int[]) with ordinality as k(number, place)
join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
where i.indrelid = %s and i.indisprimary and k.place <= i.indnkeyatts
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its type as SQL; whether it is generated from others, or always as identity."""

    name: str
    type: str
    generated: bool
    identity: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A table as pg_class has it; `persistence` and `kind` are relpersistence and relkind."""

    oid: int
    schema: str
    name: str
    persistence: str
    kind: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class TableShape:
    """A table: `columns` in order, `key` the names of its primary key's (empty: it has none).

    `parts` are the table itself, then all its partitions and heirs, also theirs: where its rows are.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Its quoted name."""
        return sql.Identifier(self.schema, self.name)


def list_tables(connection: Connection) -> list[tuple[str, str]]:
    """(schema, name) of all tables of users."""
    return [(row[1], row[2]) for row in connection.execute(_TABLES_SQL.encode()).fetchall()]


def find_shapes(connection: Connection, name: str, schema: str | None) -> list[TableShape]:
    """The tables of a name, in that schema or in any."""
    rows = connection.execute(_TABLES_SQL.encode()).fetchall()
    found = [row for row in rows if row[2] == name and schema in (None, row[1])]
    return [_shape(connection, *row[:3]) for row in found]


def _shape(connection: Connection, oid: int, schema: str, name: str) -> TableShape:
    columns = [Column(*row) for row in connection.execute(_COLUMNS_SQL.encode(), [oid]).fetchall()]
    row = connection.execute(_KEY_SQL.encode(), [oid]).fetchone()
    key = tuple(row[0]) if row and row[0] else ()
    parts = connection.execute(_PARTS_SQL.encode(), [oid, oid]).fetchall()
    return TableShape(schema, name, tuple(columns), key, tuple(Part(*row) for row in parts))


class LockedError(PreconditionError):
    """A lock was not to be had in time."""


@contextmanager
def said_by_postgres() -> Iterator[None]:
    """What Postgres refuses is a PgcdpError with its words."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise LockedError(f"postgres refused: {str(error).splitlines()[0]}") from None
    except psycopg.Error as error:
        words = " | ".join(line.strip() for line in str(error).strip().splitlines())
        raise PgcdpError(f"postgres refused: {words}") from None


def lock_to_read(connection: Connection, shape: TableShape) -> None:
    """Nobody holds its parts against reading. Raises LockedError."""
    with said_by_postgres(), connection.transaction():
        for part in shape.parts:
            if part.kind in ("r", "p"):
                connection.execute(
                    sql.SQL("lock table only {} in access share mode").format(sql.Identifier(part.schema, part.name))
                )


def prepared(connection: Connection) -> list[tuple[str, int, datetime]]:
    """(name, xid, time) of the transactions of this database that are prepared and not ended, oldest first."""
    rows = connection.execute(
        "select gid, transaction::text::bigint, prepared from pg_prepared_xacts where database = current_database()"
        " order by 3, 2"
    ).fetchall()
    return [(row[0], row[1], row[2]) for row in rows]


def check_condition(connection: Connection, shape: TableShape, where: str | None) -> None:
    """Raises UsageError when `where` is no condition on the table."""
    try:
        with connection.transaction():
            connection.execute(select(shape, where) + sql.SQL(" limit 0"))
    except psycopg.errors.LockNotAvailable as error:
        raise LockedError(f"postgres refused: {str(error).splitlines()[0]}") from None
    except psycopg.Error as error:
        raise UsageError(
            f'"{where}" is no condition on {shape}: {str(error).splitlines()[0]}', "give what stands behind WHERE"
        ) from None


def select(shape: TableShape, where: str | None, columns: Sequence[str] | None = None) -> sql.Composed:
    """The query for its rows, or some columns of them."""
    chosen = [column.name for column in shape.columns] if columns is None else columns
    names = sql.SQL(", ").join(map(sql.Identifier, chosen))
    query = sql.SQL("select {} from {}").format(names, shape.identifier)
    return query + sql.SQL(" where (") + sql.SQL(where) + sql.SQL(")") if where else query


def copy_to_csv(source: Connection, shape: TableShape, where: str | None, file: Path) -> int:
    """Write rows as CSV with a head; returns their number."""
    statement = sql.SQL("copy ({}) to stdout (format csv, header)").format(select(shape, where))
    with said_by_postgres(), source.cursor() as cursor, file.open("xb") as out, _as_it_is(source, statement) as text:
        with cursor.copy(text) as copy:
            for part in copy:
                out.write(part)
        return cursor.rowcount


def keep_only(source: Connection, shape: TableShape, where: str) -> None:
    """Delete all rows that are not meant: of a database that is thrown away."""
    with said_by_postgres():
        source.execute("set session_replication_role = replica")
        source.execute(
            sql.SQL("delete from {} where (").format(shape.identifier) + sql.SQL(where) + sql.SQL(") is not true")
        )


def count(source: Connection, shape: TableShape) -> int:
    """How many rows it has; 0 for a materialized view that was never filled."""
    with said_by_postgres():
        filled = source.execute("select relispopulated from pg_class where oid = %s", [shape.parts[0].oid]).fetchone()
        if filled is None or not filled[0]:
            return 0
        row = source.execute(sql.SQL("select count(*) from {}").format(shape.identifier)).fetchone()
        return int(row[0]) if row else 0


def copy_into(
    source: Connection,
    shape: TableShape,
    where: str | None,
    target: Connection,
    place: tuple[str, str],
) -> int:
    """Make a new table with the same columns in the target's database and copy rows into it; returns their number.

    Raises PreconditionError when one of that name is there. What it made goes with the caller's transaction.
    """
    name = sql.Identifier(*place)
    known = target.execute("select to_regclass(%s)::text", [name.as_string(target)]).fetchone()
    if known is not None and known[0] is not None:
        raise PreconditionError(f"table {place[0]}.{place[1]} exists", "drop it, or give another name with --as")
    if target.execute("select from pg_namespace where nspname = %s", [place[0]]).fetchone() is None:
        made = sql.SQL("create schema {}").format(sql.Identifier(place[0])).as_string(target)
        raise PreconditionError(
            f"schema {place[0]} does not exist in that database now", f"{made}; or write a file instead: --file F"
        )
    with said_by_postgres():
        target.execute(sql.SQL("create table {} ({})").format(name, _definitions(shape.columns)))
        return carry(source, select(shape, where), target, name)


def copy_into_temporary(
    source: Connection, query: sql.Composed, columns: Sequence[Column], target: Connection, name: str
) -> int:
    """The same into a temporary table, made anew: what a query gives, whose columns are named."""
    with said_by_postgres():
        target.execute(sql.SQL("drop table if exists {}").format(sql.Identifier("pg_temp", name)))
        target.execute(sql.SQL("create temporary table {} ({})").format(sql.Identifier(name), _definitions(columns)))
        return carry(source, query, target, sql.Identifier("pg_temp", name))


def _definitions(columns: Sequence[Column]) -> sql.Composed:
    each = (sql.SQL("{} {}").format(sql.Identifier(column.name), sql.SQL(column.type)) for column in columns)
    return sql.SQL(", ").join(each)


def carry(source: Connection, query: sql.Composed, target: Connection, name: sql.Identifier) -> int:
    """The rows of a query into a table of another database; returns their number."""
    reading = sql.SQL("copy ({}) to stdout (format binary)").format(query)
    writing = sql.SQL("copy {} from stdin (format binary)").format(name)
    with (
        source.cursor() as one, target.cursor() as other,
        _as_it_is(source, reading) as taking, _as_it_is(target, writing) as giving,
    ):  # fmt: skip
        with one.copy(taking) as out, other.copy(giving) as into:
            for part in out:
                into.write(part)
        return other.rowcount


@contextmanager
def _as_it_is(connection: Connection, statement: sql.Composed) -> Iterator[bytes]:
    """For a COPY, given as bytes: text of a SQL_ASCII database need not be UTF-8, and is not looked at inside."""
    text = statement.as_bytes(connection)
    if not is_ascii(connection):
        yield text
        return
    connection.execute("set client_encoding = 'SQL_ASCII'")
    try:
        yield text
    finally:
        with suppress(psycopg.Error):  # a transaction that has failed takes it back by itself
            connection.execute("set client_encoding = 'UTF8'")


def same_columns(then: TableShape, now: Sequence[TableShape]) -> TableShape:
    """The table of the running database that can be compared. Raises TargetError or PreconditionError when none can."""
    if not now:
        raise TargetError(f"table {then} does not exist now", "leave --diff out: its rows come into a new table")
    found = now[0]
    if [(column.name, column.type) for column in found.columns] != [(c.name, c.type) for c in then.columns]:
        raise PreconditionError(
            f"table {then} has other columns now", "leave --diff out and compare by SQL what comes into a new table"
        )
    if not found.key:
        raise PreconditionError(f"table {then} has no primary key", "leave --diff out and compare by SQL")
    heirs = [str(part) for shape in (then, found) if shape.parts[0].kind != "p" for part in shape.parts[1:]]
    if heirs:
        raise PreconditionError(
            f"table {then} has heirs ({', '.join(dict.fromkeys(heirs))}): a row may be of any of them",
            "leave --diff out and compare by SQL what comes into a new table",
        )
    return found
