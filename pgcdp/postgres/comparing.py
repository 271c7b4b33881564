"""A table of the running database compared by primary key with rows as they were, and given back what it lost.

Rows as they were lie in a temporary table of the session, `then`; `known` are the keys of rows that are new only to
what was chosen of them, `seen` the keys that differed, with a hash of the row that was there (null: none); `deleted`
and `changed` the rows that are put back, as they were.

After a mass DELETE and a VACUUM the planner takes the table for empty, and every plan that scans it once a row for
cheap. So no query here is left to what it believes: how each joins is chosen by what is there (`_choose_joins`), and
rows are put back from temporary tables of their own, whose size it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres.tables import TableShape, copy_into_temporary, said_by_postgres, select

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection

SAMPLES = 10
LOOKUP_PAGES = 16
"""Pages that finding a row by the primary key may cost, before its table is rather read as a whole."""
_PAGES_SQL = """
select coalesce(sum(pg_relation_size(oid)) / current_setting('block_size')::int, 0)::bigint from unnest(%s::oid[]) oid
"""
_REFERENCES_SQL = """
select distinct conrelid::bigint, confrelid::bigint from pg_constraint
where contype = 'f' and conrelid = any (%s::oid[]) and confrelid = any (%s::oid[])
"""
_TRIGGERS_SQL = """
select distinct tgname::text from pg_trigger where not tgisinternal and tgenabled <> 'D' and tgrelid = any (%s::oid[])
union select distinct rulename::text from pg_rewrite where ev_type in ('2', '3') and ev_class = any (%s::oid[])
order by 1
"""
_ON_DELETE_SQL = """
select conname || ' of ' || conrelid::regclass from pg_constraint
where contype = 'f' and confdeltype <> 'a' and confrelid = any (%s::oid[])
union select tgname::text from pg_trigger
where not tgisinternal and tgenabled <> 'D' and tgtype & 8 <> 0 and tgrelid = any (%s::oid[])
union select rulename::text from pg_rewrite where ev_type = '4' and ev_class = any (%s::oid[])
order by 1
"""
"""What happens when rows go: foreign keys that are not plain ones, triggers, rules."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How a table differs from what was salvaged: rows that are gone, changed, and new since."""

    deleted: int
    changed: int
    added: int
    samples: dict[str, list[dict[str, str | None]]]


@dataclass(frozen=True, slots=True)
class Compared:
    """A table as it is now, the number of its temporary tables, the rows that it had then, and how it differs."""

    shape: TableShape
    number: int
    rows: int
    difference: Difference

    @property
    def seen(self) -> sql.Identifier:
        """Its temporary table of what differed."""
        return _temporary("seen", self.number)


def _temporary(what: str, number: int) -> sql.Identifier:
    return sql.Identifier("pg_temp", f"pgcdp_{what}_{number}")


def compare(
    source: Connection, target: Connection, then: TableShape, shape: TableShape, where: str | None, number: int
) -> Compared:
    """Compare `shape`, of the running database, with those rows of `then`, the same table in a sandbox, that `where`
    is true for. Rows are the same ones by their keys, whatever `where` says of them now; new ones are those that it is
    true for and whose key was not there.
    """  # fmt: skip
    rows = copy_into_temporary(source, select(then, where), then.columns, target, f"pgcdp_then_{number}")
    keys = [column for column in shape.columns if column.name in shape.key]
    names = [column.name for column in keys]
    there = sql.SQL("exists (select from {} o where {})").format(_temporary("then", number), _same(shape, "o", "n"))
    with said_by_postgres():
        _analyze(target, shape, "then", number)
        _join_whole(target)
        chosen = sql.SQL("select {} from ({}) n where not {}").format(_list(names), select(shape, where), there)
        new = copy_into_temporary(target, chosen, keys, source, f"pgcdp_new_{number}")
        _analyze(source, shape, "new", number)
        _choose_joins(source, then, new)
        known = sql.SQL("select {} from {} n where exists (select from {} o where {})").format(
            _list(names), _temporary("new", number), shape.identifier, _same(shape, "o", "n")
        )
        copy_into_temporary(source, known, keys, target, f"pgcdp_known_{number}")
        _analyze(target, shape, "known", number)
        unknown = sql.SQL("not exists (select from {} o where {})").format(
            _temporary("known", number), _same(shape, "o", "n")
        )
        added = sql.SQL("select n.* from ({}) n where not {} and {}").format(select(shape, where), there, unknown)
        parts = _parts(shape, number)
        with target.transaction():
            target.execute("set transaction isolation level repeatable read")
            _choose_joins(target, shape, rows)
            target.execute(sql.SQL("drop table if exists {}").format(_temporary("seen", number)))
            target.execute(
                sql.SQL("create temporary table {} as {}").format(
                    sql.Identifier(f"pgcdp_seen_{number}"), _differing(shape, number)
                )
            )
            found = {name: _count(target, query) for name, query in parts.items()}
            samples = {name: _samples(target, shape, query) for name, query in parts.items()}
            _join_whole(target)
            found["added"], samples["added"] = _count(target, added), _samples(target, shape, added)
    return Compared(shape, number, rows, Difference(found["deleted"], found["changed"], found["added"], samples))


def _analyze(connection: Connection, shape: TableShape, what: str, number: int) -> None:
    """What the planner knows of a temporary table is true."""
    connection.execute(sql.SQL("analyze {} ({})").format(_temporary(what, number), _list(shape.key)))


def _join_whole(connection: Connection) -> None:
    """From here on tables are joined by hash or merge: no scan is repeated for each row."""
    connection.execute("set enable_nestloop = off")


def _choose_joins(connection: Connection, shape: TableShape, rows: int) -> None:
    """From here on so many rows find theirs in a table: few in a large one by its key, more as `_join_whole` has it.

    Where the key is allowed, it is by far the cheapest way by the pages alone, which the planner always knows.
    """
    pages = connection.execute(_PAGES_SQL, [[part.oid for part in shape.parts]]).fetchone()
    if pages is not None and pages[0] > LOOKUP_PAGES * rows * len(shape.parts):
        connection.execute("set enable_nestloop = on")
    else:
        _join_whole(connection)


def put_back(target: Connection, compared: Sequence[Compared]) -> list[tuple[int, int]]:
    """Give back to all tables what was deleted and changed, or to none; returns (inserted, updated) of each.

    Raises PreconditionError when one is not what `compare` saw, PgcdpError when rows would not be as they were.
    """
    done: dict[int, tuple[int, int]] = {}
    ordered = _parents_first(target, compared)
    with said_by_postgres(), target.transaction():
        target.execute(
            "set transaction isolation level read committed"
        )  # each statement sees what the locks waited for
        target.execute("set constraints all deferred")
        for each in ordered:
            target.execute(sql.SQL("lock table {} in share row exclusive mode").format(each.shape.identifier))
        for each in ordered:
            _choose_joins(target, each.shape, each.rows)
            _refuse_changed(target, each)
            _set_aside(target, each)
        # Triggers of users run as these write, whose joins are their own affair.
        target.execute("set enable_nestloop to default; set local enable_material = off")
        for each in ordered:
            done[each.number] = _put_back(target, each)
        target.execute("set constraints all immediate")
        for each in ordered:
            _choose_joins(target, each.shape, each.rows)
            _refuse_different(target, each)
    return [done[each.number] for each in compared]


def _parents_first(target: Connection, compared: Sequence[Compared]) -> list[Compared]:
    """Tables that others refer to come before these; as given where they refer to each other in a circle."""
    owner = {part.oid: each.number for each in compared for part in each.shape.parts}
    sorter: TopologicalSorter[int] = TopologicalSorter({each.number: () for each in compared})
    for child, parent in target.execute(_REFERENCES_SQL, [list(owner), list(owner)]).fetchall():
        if owner[child] != owner[parent]:
            sorter.add(owner[child], owner[parent])
    try:
        order = list(sorter.static_order())
    except CycleError:
        return list(compared)
    return sorted(compared, key=lambda each: order.index(each.number))


def _refuse_changed(target: Connection, each: Compared) -> None:
    now = _differing(each.shape, each.number)
    either = sql.SQL("((table {0}) except all ({1})) union all (({1}) except all (table {0}))").format(each.seen, now)
    if _count(target, sql.SQL("select d.hash from ({}) d").format(either)):
        raise PreconditionError(f"table {each.shape} has changed since the difference was shown", "run it again")


def _set_aside(target: Connection, each: Compared) -> None:
    """Keep what is put back, with an index and known to the planner: then any way to write it is a good one.

    Of a row that changed only its key is looked for, so that a table which is taken for empty is read once.
    """
    for what, query in _parts(each.shape, each.number).items():
        place = _temporary(what, each.number)
        target.execute(sql.SQL("drop table if exists {}").format(place))
        name = sql.Identifier(f"pgcdp_{what}_{each.number}")
        target.execute(sql.SQL("create temporary table {} as {}").format(name, query))
        target.execute(sql.SQL("create unique index on {} ({})").format(place, _list(each.shape.key)))
        _analyze(target, each.shape, what, each.number)


def _refuse_different(target: Connection, each: Compared) -> None:
    left = {name: _count(target, query) for name, query in _parts(each.shape, each.number).items()}
    if not any(left.values()):
        return
    oids = [part.oid for part in each.shape.parts]
    names = [row[0] for row in target.execute(_TRIGGERS_SQL, [oids, oids]).fetchall()]
    raise PgcdpError(
        f"{left['deleted']} rows would still be gone from {each.shape} and {left['changed']} not be as they were: "
        + (f"its triggers or rules {', '.join(names)} changed them" if names else "something changed them on their way")
        + "; nothing was put back",
        "disable what takes part and run it again, or leave --diff out: the rows come into a new table",
    )


def _put_back(target: Connection, each: Compared) -> tuple[int, int]:
    """Insert and update; where unique values moved between rows, in the other order, or by taking rows out first."""
    if each.difference.changed:
        _refuse_identity(target, each)
    clash: psycopg.Error | None = None
    for update_first in (False, True) if each.difference.deleted else (False,):
        try:
            with target.transaction():
                return _in_turn(target, each, update_first)
        except (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation) as error:
            if not each.difference.changed:
                raise
            clash = error
        except psycopg.errors.ForeignKeyViolation:
            if clash is None:
                raise
    assert clash is not None
    return _anew(target, each, clash)


def _in_turn(target: Connection, each: Compared, update_first: bool) -> tuple[int, int]:
    shape = each.shape
    own = _own(shape)
    inserted = updated = 0
    rest = [column.name for column in shape.columns if not column.generated and not column.identity]
    rest = [name for name in rest if name not in shape.key]
    for update in (update_first, not update_first):
        if update and each.difference.changed and rest:
            statement = sql.SQL("update {} t set ({}) = row({}) from {} d where {}")
            values = sql.SQL(", ").join(sql.SQL("d.{}").format(sql.Identifier(name)) for name in rest)
            updated = target.execute(
                statement.format(
                    shape.identifier, _list(rest), values, _temporary("changed", each.number), _same(shape, "t", "d")
                )
            ).rowcount
        elif not update and each.difference.deleted:
            statement = sql.SQL("insert into {} ({}) overriding system value select {} from {} d")
            inserted = target.execute(
                statement.format(shape.identifier, _list(own), _list(own), _temporary("deleted", each.number))
            ).rowcount
    return inserted, updated


def _anew(target: Connection, each: Compared, clash: psycopg.Error) -> tuple[int, int]:
    """Take out the rows that changed and insert them with those that are gone, in one statement.

    Foreign keys are checked at its end: that the rows were away for a moment is nobody's business, unless something is
    to happen when they go.
    """
    shape = each.shape
    oids = [part.oid for part in shape.parts]
    names = [row[0] for row in target.execute(_ON_DELETE_SQL.encode(), [oids, oids, oids]).fetchall()]
    if names:
        raise PreconditionError(
            f"unique values of {shape} moved between rows ({_words(clash)}), which cannot be taken out for a moment "
            f"because of {', '.join(names)}; nothing was put back",
            "leave --diff out: the rows come into a new table",
        )
    statement = sql.SQL(
        "with gone as (delete from {} t using {} d where {} returning 1)"
        " insert into {} ({}) overriding system value select {} from (table {} union all table {}) d"
        " where (select count(*) from gone) > 0"
    )
    deleted, changed = _temporary("deleted", each.number), _temporary("changed", each.number)
    own = _own(shape)
    target.execute(
        statement.format(
            shape.identifier,
            changed,
            _same(shape, "t", "d"),
            shape.identifier,
            _list(own),
            _list(own),
            deleted,
            changed,
        )
    )
    return each.difference.deleted, each.difference.changed


def _own(shape: TableShape) -> list[str]:
    """Columns that a row brings with it."""
    return [column.name for column in shape.columns if not column.generated]


def _words(error: psycopg.Error) -> str:
    return " | ".join(line.strip() for line in str(error).strip().splitlines())


def _refuse_identity(target: Connection, each: Compared) -> None:
    """Postgres updates a column that is generated always as identity to nothing but its default."""
    for name in [column.name for column in each.shape.columns if column.identity and column.name not in each.shape.key]:
        query = sql.SQL("select 1 from {} o join {} n on {} where o.{} is distinct from n.{}").format(
            _temporary("changed", each.number), each.shape.identifier, _same(each.shape, "o", "n"),
            sql.Identifier(name), sql.Identifier(name),
        )  # fmt: skip
        count = _count(target, query)
        if count:
            raise PreconditionError(
                f"column {name} of {each.shape} is generated always as identity, and differs in {count} rows",
                f"alter table {each.shape} alter column {name} set generated by default, and run it again",
            )


def _parts(shape: TableShape, number: int) -> dict[str, sql.Composed]:
    """Queries for the rows that are gone and those that changed, both as they were."""
    then, same = _temporary("then", number), _same(shape, "o", "n")
    return {
        "deleted": sql.SQL("select o.* from {} o where not exists (select from {} n where {})").format(
            then, shape.identifier, same
        ),
        "changed": sql.SQL("select o.* from {} o join {} n on {} where {} is distinct from {}").format(
            then, shape.identifier, same, _row(shape, "o"), _row(shape, "n")
        ),
    }


def _differing(shape: TableShape, number: int) -> sql.Composed:
    """A query for the keys of rows that are gone or changed, with the hash of what is there now."""
    keys = sql.SQL(", ").join(sql.SQL("o.{0}::text").format(sql.Identifier(name)) for name in shape.key)
    there = sql.SQL("n.{}").format(sql.Identifier(shape.key[0]))
    return sql.SQL(
        "select row({})::text as key, case when {} is not null then md5({}::text) end as hash"
        " from {} o left join {} n on {} where {} is distinct from {}"
    ).format(
        keys, there, _row(shape, "n"), _temporary("then", number), shape.identifier, _same(shape, "o", "n"),
        _row(shape, "o"), _row(shape, "n"),
    )  # fmt: skip


def _count(target: Connection, query: sql.Composed) -> int:
    row = target.execute(sql.SQL("select count(*) from ({}) d").format(query)).fetchone()
    return int(row[0]) if row else 0


def _samples(target: Connection, shape: TableShape, query: sql.Composed) -> list[dict[str, str | None]]:
    keys = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in shape.key)
    with target.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute(sql.SQL("select {} from ({}) d limit {}").format(keys, query, SAMPLES)).fetchall()


def _same(shape: TableShape, one: str, other: str) -> sql.Composed:
    sides = sql.Identifier(one), sql.Identifier(other)
    return sql.SQL(" and ").join(sql.SQL("{1}.{0} = {2}.{0}").format(sql.Identifier(key), *sides) for key in shape.key)


def _row(shape: TableShape, side: str) -> sql.Composed:
    """All columns of a row as text: some types cannot be compared."""
    each = (sql.SQL("{}.{}::text").format(sql.Identifier(side), sql.Identifier(c.name)) for c in shape.columns)
    return sql.SQL("row({})").format(sql.SQL(", ").join(each))


def _list(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))
