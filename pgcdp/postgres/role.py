"""What a protected cluster gets from pgcdp: the role of least privilege, and the function that sets marks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pgcdp.errors import PgcdpError
from pgcdp.postgres.session import ROLE, Dsn, connect, databases, query

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection

_MISSING = {
    "role pgcdp": "select exists (select from pg_roles where rolname = 'pgcdp')",
    "membership in pg_read_all_settings": "select pg_has_role('pgcdp', 'pg_read_all_settings', 'usage')",
    "membership in pg_read_all_stats": "select pg_has_role('pgcdp', 'pg_read_all_stats', 'usage')",
    "membership in pg_checkpoint": """select current_setting('server_version_num')::int < 150000
        or pg_has_role('pgcdp', (select oid from pg_roles where rolname = 'pg_checkpoint'), 'usage')""",
    "execute on pg_control_checkpoint": "select has_function_privilege('pgcdp', 'pg_control_checkpoint()', 'execute')",
}
"""What the role needs, and a question that is true when it has it; the later ones are asked when the first is. Of a
membership that is not inherited it has nothing."""
_ATTRIBUTES = {"rolsuper": "SUPERUSER", "rolcreaterole": "CREATEROLE", "rolcreatedb": "CREATEDB",
               "rolreplication": "REPLICATION", "rolbypassrls": "BYPASSRLS"}  # fmt: skip
"""What it must not be."""
_MEMBER_SQL = f"""
select r.rolname::text from pg_auth_members m join pg_roles r on r.oid = m.roleid join pg_roles o on o.oid = m.member
where o.rolname = '{ROLE}' and r.rolname not in ('pg_read_all_settings', 'pg_read_all_stats', 'pg_checkpoint')
order by 1
"""
_MARK = "select to_regprocedure('pgcdp.mark(text, boolean)') is not null"


def sql_files(folder: str) -> list[Path]:
    """pgcdp's own files sql/FOLDER/*.sql: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "_sql" / folder, package.parent / "sql" / folder)
    return sorted(next((place for place in places if place.is_dir()), places[0]).glob("*.sql"))


def install(dsn: Dsn) -> list[str]:
    """Make role and function, in every database that lets connections in; returns their names. Harmless when repeated.

    Raises PgcdpError with Postgres's words when this role may not do that.
    """
    files = {file.stem: file.read_text("utf-8") for file in sql_files("role")}
    with connect(dsn, superuser=True) as connection:
        if not _true(connection, _MISSING["role pgcdp"]) or missing(dsn):
            query(connection, files["role"])
        names = _open_databases(connection)
    for name in names:
        with connect(dsn, name, superuser=True) as connection:
            if not _true(connection, _MARK):
                query(connection, files["mark"])
    return names


def missing(dsn: Dsn) -> list[str]:
    """What of it is not there, in words; databases that let nobody in, and templates, are not looked at."""
    found = []
    with connect(dsn) as connection:
        for what, question in _MISSING.items():
            if not _true(connection, question):
                found.append(what)
                if what == "role pgcdp":
                    break
        names = _open_databases(connection)
    for name in names:
        with connect(dsn, name) as connection:
            if not _true(connection, _MARK):
                found.append(f"function pgcdp.mark in database {name}")
    return found


def excess(dsn: Dsn) -> tuple[list[str], str]:
    """What the role has beyond what it needs, in words, and the SQL that takes it away; nothing when it is absent."""
    with connect(dsn) as connection:
        columns = ", ".join(_ATTRIBUTES)
        rows = query(connection, f"select {columns} from pg_roles where rolname = '{ROLE}'").rows or []
        more = [name for (name,) in query(connection, _MEMBER_SQL).rows or []]
    has = [word for row in rows for word, is_so in zip(_ATTRIBUTES.values(), row, strict=True) if is_so]
    sql = [f"ALTER ROLE {ROLE} {' '.join(f'NO{word}' for word in has)}"] if has else []
    sql += [f'REVOKE "{name.replace(chr(34), chr(34) * 2)}" FROM {ROLE}' for name in more]
    return [*has, *(f"member of {name}" for name in more)], "; ".join(sql)


def _open_databases(connection: Connection) -> list[str]:
    """Those that let connections in, without templates."""
    found = databases(connection)
    return [each.name for each in found if each.connectable and not each.name.startswith("template")]


def _true(connection: Connection, question: str) -> bool:
    answer = query(connection, question)
    if not answer.rows:
        raise PgcdpError(f"postgres gave no answer to: {question}")
    return bool(answer.rows[0][0])
