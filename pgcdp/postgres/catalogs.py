"""A look at the catalogs of all databases by SQL: names, files and sizes of relations (`postgres.relations.Look`)."""

from __future__ import annotations

from typing import Any

from pgcdp.errors import PgcdpError
from pgcdp.log import get
from pgcdp.postgres.relations import Look, Relation
from pgcdp.postgres.session import Dsn, Session

log = get(__name__)

_RELATIONS_SQL = """
select case when c.relisshared then 0 else d.oid end::bigint, c.oid::bigint, n.nspname::text, c.relname::text,
  c.relkind::text, coalesce(pg_relation_filenode(c.oid), 0)::bigint,
  greatest(c.reltuples::bigint, pg_stat_get_live_tuples(c.oid), 0)::bigint,
  coalesce((select i.inhparent from pg_inherits i where i.inhrelid = c.oid order by i.inhseqno limit 1), 0)::bigint,
  coalesce(t.oid, 0)::bigint
from pg_class c
join pg_database d on d.datname = current_database()
join pg_namespace n on n.oid = c.relnamespace
left join pg_class t on c.relkind = 't' and t.reltoastrelid = c.oid
"""
_SCHEMAS_SQL = """
select d.oid::bigint, n.oid::bigint, n.nspname::text from pg_namespace n join pg_database d
on d.datname = current_database()
"""


async def look(dsn: Dsn, session: Session) -> Look:
    """Look at every database that lets connections in; `session` is one to any of them.

    A database that cannot be reached is left out, and the log says so. Raises PreconditionError when `session` fails.
    """
    lsn = await session.lsn()
    found = await session.databases()
    relations: dict[tuple[int, int], Relation] = {}
    schemas: dict[tuple[int, int], str] = {}
    for database in found:
        if not database.connectable:
            continue
        try:
            rows, names = await _look_into(dsn, database.name)
        except PgcdpError as error:
            log.warning("no look at database %s: %s", database.name, error.message)
            continue
        relations.update({(row[0], row[1]): Relation(*row) for row in rows})
        schemas.update({(row[0], row[1]): row[2] for row in names})
    return Look(lsn, {each.oid: each.name for each in found}, schemas, tuple(relations.values()))


async def _look_into(dsn: Dsn, database: str) -> tuple[list[Any], list[Any]]:
    session = await Session.open(dsn, database)
    try:
        return await session.rows(_RELATIONS_SQL), await session.rows(_SCHEMAS_SQL)
    finally:
        await session.close()
