"""What a protected cluster gets from pgcdp: the role of least privilege, and the function that sets marks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pgcdp.errors import PgcdpError
from pgcdp.postgres.session import Dsn, connect, databases, query

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection

ROLE = "pgcdp"

_MISSING = {
    "role pgcdp": "select exists (select from pg_roles where rolname = 'pgcdp')",
    "membership in pg_read_all_settings": "select pg_has_role('pgcdp', 'pg_read_all_settings', 'member')",
    "membership in pg_read_all_stats": "select pg_has_role('pgcdp', 'pg_read_all_stats', 'member')",
    "membership in pg_checkpoint": """select current_setting('server_version_num')::int < 150000
        or pg_has_role('pgcdp', (select oid from pg_roles where rolname = 'pg_checkpoint'), 'member')""",
    "execute on pg_control_checkpoint": "select has_function_privilege('pgcdp', 'pg_control_checkpoint()', 'execute')",
}
"""What the role needs, and a question that is true when it has it; the later ones are asked when the first is."""
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
    with connect(dsn) as connection:
        if not _true(connection, _MISSING["role pgcdp"]) or missing(dsn):
            query(connection, files["role"])
        names = _open_databases(connection)
    for name in names:
        with connect(dsn, name) as connection:
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


def _open_databases(connection: Connection) -> list[str]:
    """Those that let connections in, without templates."""
    found = databases(connection)
    return [each.name for each in found if each.connectable and not each.name.startswith("template")]


def _true(connection: Connection, question: str) -> bool:
    answer = query(connection, question)
    if not answer.rows:
        raise PgcdpError(f"postgres gave no answer to: {question}")
    return bool(answer.rows[0][0])
