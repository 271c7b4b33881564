"""A look at the catalogs of all databases by SQL: names, files and sizes of relations (`postgres.relations.Look`)."""

from __future__ import annotations

import asyncio
from typing import Any

from pgcdp.errors import PgcdpError
from pgcdp.postgres.agent_session import NotRunning, Session
from pgcdp.postgres.relations import Look, Relation, catalogs_among
from pgcdp.postgres.session import Dsn

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


async def look(dsn: Dsn, before: Look | None, patience: float) -> tuple[Look, dict[str, str]]:
    """Look at every database that lets connections in; also: those that did not answer, by name, and why.

    Each has `patience` seconds. What one that did not answer holds is what the look `before` said, and the look is no
    newer than that one then. Raises PreconditionError when no database can be asked which there are, and when Postgres
    is stopped meanwhile: that is no matter of one database.
    """
    session = await Session.open(dsn)
    try:
        lsn = await session.lsn()
        found = await session.databases()
    finally:
        await session.close()
    failed: dict[str, str] = {}
    relations: dict[tuple[int, int], Relation] = {}
    schemas: dict[tuple[int, int], str] = {}
    for database in found:
        if not database.connectable:
            continue
        try:
            rows, names = await asyncio.wait_for(_look_into(dsn, database.name), patience)
        except (PgcdpError, TimeoutError) as error:
            if isinstance(error, PgcdpError):
                await _refuse_stopped(dsn)
            failed[database.name] = getattr(error, "message", f"no answer in {patience:g} s")
            if before is not None:
                lsn = min(lsn, before.lsn)
                relations.update(
                    {(each.database, each.oid): each for each in before.relations if each.database == database.oid}
                )
                schemas.update({key: name for key, name in before.schemas.items() if key[0] == database.oid})
            continue
        relations.update({(row[0], row[1]): Relation(*row) for row in rows})
        schemas.update({(row[0], row[1]): row[2] for row in names})
    databases = {each.oid: each.name for each in found}
    return Look(lsn, databases, schemas, catalogs_among(relations.values()), tuple(relations.values())), failed


async def _refuse_stopped(dsn: Dsn) -> None:
    """Raises NotRunning. What else is wrong, whoever asks this has seen himself."""
    try:
        session = await Session.open(dsn)
    except NotRunning:
        raise
    except PgcdpError:
        return
    await session.close(timeout=1)


async def _look_into(dsn: Dsn, database: str) -> tuple[list[Any], list[Any]]:
    session = await Session.open(dsn, database)
    try:
        return await session.rows(_RELATIONS_SQL), await session.rows(_SCHEMAS_SQL)
    finally:
        await session.close(timeout=1)
