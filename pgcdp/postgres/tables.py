"""Rows of a table carried from one Postgres to another, and compared there by primary key (used by salvage)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from pgcdp.errors import PgcdpError, PreconditionError, TargetError, UsageError
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
select a.attname::text, format_type(a.atttypid, a.atttypmod), a.attgenerated <> ''
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
    """A column: its type as SQL, and whether it is generated from others."""

    name: str
    type: str
    generated: bool


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


@dataclass(frozen=True, slots=True)
class Difference:
    """How a table differs from what was salvaged: rows that are gone, changed, and new since."""

    deleted: int
    changed: int
    added: int
    samples: dict[str, list[dict[str, str | None]]]


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


@contextmanager
def said_by_postgres() -> Iterator[None]:
    """What Postgres refuses is a PgcdpError with its words."""
    try:
        yield
    except psycopg.Error as error:
        words = " | ".join(line.strip() for line in str(error).strip().splitlines())
        raise PgcdpError(f"postgres refused: {words}") from None


def check_condition(connection: Connection, shape: TableShape, where: str | None) -> None:
    """Raises UsageError when `where` is no condition on the table."""
    try:
        with connection.transaction():
            connection.execute(_select(shape, where) + sql.SQL(" limit 0"))
    except psycopg.Error as error:
        raise UsageError(
            f'"{where}" is no condition on {shape}: {str(error).splitlines()[0]}', "give what stands behind WHERE"
        ) from None


def _select(shape: TableShape, where: str | None) -> sql.Composed:
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in shape.columns)
    query = sql.SQL("select {} from {}").format(names, shape.identifier)
    return query + sql.SQL(" where (") + sql.SQL(where) + sql.SQL(")") if where else query


def copy_to_csv(source: Connection, shape: TableShape, where: str | None, file: Path) -> int:
    """Write rows as CSV with a head; returns their number."""
    statement = sql.SQL("copy ({}) to stdout (format csv, header)").format(_select(shape, where))
    with said_by_postgres(), source.cursor() as cursor, file.open("xb") as out:
        with cursor.copy(statement) as copy:
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


def copy_into(
    source: Connection,
    shape: TableShape,
    where: str | None,
    target: Connection,
    place: tuple[str, str],
    temporary: bool,
) -> int:
    """Make a new table with the same columns in the target's database and copy rows into it; returns their number.

    Raises PreconditionError when one of that name is there. What it made goes with the caller's transaction.
    """
    name = sql.Identifier(place[1]) if temporary else sql.Identifier(*place)
    if not temporary:
        known = target.execute("select to_regclass(%s)::text", [name.as_string(target)]).fetchone()
        if known is not None and known[0] is not None:
            raise PreconditionError(f"table {place[0]}.{place[1]} exists", "drop it, or give another name with --as")
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(each.name), sql.SQL(each.type)) for each in shape.columns
    )
    made = sql.SQL("create temporary table {} ({})" if temporary else "create table {} ({})").format(name, columns)
    with said_by_postgres():
        if temporary:
            target.execute(sql.SQL("drop table if exists pg_temp.{}").format(name))
        target.execute(made)
        reading = sql.SQL("copy ({}) to stdout (format binary)").format(_select(shape, where))
        writing = sql.SQL("copy {} from stdin (format binary)").format(name)
        with source.cursor() as one, target.cursor() as other:
            with one.copy(reading) as out, other.copy(writing) as into:
                for part in out:
                    into.write(part)
            return other.rowcount


def difference(target: Connection, shape: TableShape, salvaged: str, where: str | None, samples: int) -> Difference:
    """How the table in the target's database differs from the temporary table `salvaged`, by primary key."""
    parts = _parts(shape, salvaged, where)
    counts, shown = {}, {}
    with said_by_postgres():
        for name, query in parts.items():
            row = target.execute(sql.SQL("select count(*) from ({}) d").format(query)).fetchone()
            counts[name] = int(row[0]) if row else 0
            with target.cursor(row_factory=psycopg.rows.dict_row) as cursor:
                limited = sql.SQL("select {} from ({}) d limit {}").format(
                    sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(key)) for key in shape.key),
                    query,
                    samples,
                )
                shown[name] = cursor.execute(limited).fetchall()
    return Difference(counts["deleted"], counts["changed"], counts["added"], shown)


def _parts(shape: TableShape, salvaged: str, where: str | None) -> dict[str, sql.Composed]:
    """Queries for the rows that are gone (as they were), changed (as they were) and new (as they are)."""
    now = sql.SQL("({})").format(_select(shape, where))
    then = sql.Identifier(salvaged)
    same = sql.SQL(" and ").join(sql.SQL("o.{0} = n.{0}").format(sql.Identifier(key)) for key in shape.key)
    there = sql.SQL("exists (select from {} n where {})").format(now, same)
    pairs = [_as_text(shape, side) for side in ("o", "n")]
    return {
        "deleted": sql.SQL("select o.* from {} o where not {}").format(then, there),
        "changed": sql.SQL("select o.* from {} o join {} n on {} where {} is distinct from {}").format(
            then, now, same, *pairs
        ),
        "added": sql.SQL("select o.* from {} o where not exists (select from {} n where {})").format(now, then, same),
    }


def _as_text(shape: TableShape, side: str) -> sql.Composed:
    """All columns of a row as text: some types cannot be compared."""
    each = (sql.SQL("{}.{}::text").format(sql.Identifier(side), sql.Identifier(c.name)) for c in shape.columns)
    return sql.SQL("({})").format(sql.SQL(", ").join(each))


def put_back(target: Connection, shape: TableShape, salvaged: str, where: str | None) -> tuple[int, int]:
    """Insert the rows that are gone and give changed ones their old values; returns how many of each."""
    parts = _parts(shape, salvaged, where)
    own = [column.name for column in shape.columns if not column.generated]
    names = sql.SQL(", ").join(map(sql.Identifier, own))
    rest = [name for name in own if name not in shape.key]
    with said_by_postgres():
        inserted = target.execute(
            sql.SQL("insert into {} ({}) overriding system value select {} from ({}) d").format(
                shape.identifier, names, names, parts["deleted"]
            )
        ).rowcount
        if not rest:
            return inserted, 0
        changed = sql.SQL("update {} t set ({}) = row({}) from ({}) d where {}").format(
            shape.identifier,
            sql.SQL(", ").join(map(sql.Identifier, rest)),
            sql.SQL(", ").join(sql.SQL("d.{}").format(sql.Identifier(name)) for name in rest),
            parts["changed"],
            sql.SQL(" and ").join(sql.SQL("t.{0} = d.{0}").format(sql.Identifier(key)) for key in shape.key),
        )
        return inserted, target.execute(changed).rowcount


def lock(target: Connection, shape: TableShape) -> None:
    """Nobody else changes the table until the transaction ends."""
    with said_by_postgres():
        target.execute(sql.SQL("lock table {} in share row exclusive mode").format(shape.identifier))


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
    return found
