"""One table's rows as they were at a recovery point, into a new table of a running database or into a file.

A Postgres in a sandbox runs on the recovery point; rows are taken from it. Nothing else of the running database is
touched, except by `put_back`, which gives back what was deleted or changed since.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Literal

from pgcdp import proc
from pgcdp.errors import PreconditionError, TargetError, UsageError
from pgcdp.fsio import sync_directory
from pgcdp.postgres import comparing, session, tables
from pgcdp.postgres.cluster import Binaries
from pgcdp.postgres.comparing import Compared
from pgcdp.postgres.locks import waiting_at_most
from pgcdp.postgres.tables import LockedError, TableShape
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery import sandbox
from pgcdp.recovery.nearest import nearest, split_name
from pgcdp.recovery.sandbox import Sandbox
from pgcdp.recovery.scratch import elsewhere, mounted
from pgcdp.recovery.source import Source

Format = Literal["csv", "sql", "custom"]
FORMATS: dict[str, Format] = {".csv": "csv", ".sql": "sql", ".dump": "custom", ".pgdump": "custom"}
"""Formats of files by the end of their names."""
LOCK_TIMEOUT = "5s"
"""How long a session in the sandbox waits for a lock."""
LIVE_SECONDS = 10.0
"""How long one in the running database does."""


@dataclass(frozen=True)
class Wanted:
    """What is to be salvaged: tables as [SCHEMA.]NAME, or all of a schema; the rows that `where` is true for."""

    tables: tuple[str, ...]
    schema: str | None = None
    where: str | None = None
    database: str | None = None


@contextmanager
def opened(
    source: Source,
    point: RecoveryPoint,
    below: Path,
    binaries: Binaries,
    hide: Sequence[Path] = (),
    progress: Report = silent,
) -> Iterator[Sandbox]:
    """A Postgres on the recovery point, in a scratch place; all of it is gone afterwards."""
    with mounted(source, point, below, progress, forgive=True) as pgdata:
        progress(Progress("starting postgres on it"))
        box = sandbox.start(
            pgdata, source.settings(point), parent=pgdata.parent, binaries=binaries,
            elsewhere=elsewhere(source, point, pgdata), hide=hide,
        )  # fmt: skip
        with box:
            yield box


def find_tables(box: Sandbox, wanted: Wanted, likely: str | None = None) -> tuple[str, list[TableShape]]:
    """The database and the tables that are meant, as they were; `likely`, when several databases had such.

    Raises TargetError, with what is there.
    """
    found: dict[str, list[TableShape]] = {}
    known: dict[str, list[tuple[str, str]]] = {}
    for database in _databases(box, wanted.database):
        with box.connect(database) as connection:
            known[database] = tables.list_tables(connection)
            shapes = [
                shape
                for schema, name in _names(wanted, known[database])
                for shape in tables.find_shapes(connection, name, schema)
            ]
            if shapes:
                found[database] = shapes
    if likely in found:
        found = {likely: found[likely]}
    if len(found) > 1:
        raise TargetError(f"{_what(wanted)} was in databases {', '.join(found)}", "choose one with --database D")
    if not found:
        raise TargetError(f"{_what(wanted)} did not exist then", _nearest(wanted, known))
    database, shapes = next(iter(found.items()))
    missing = [name for name in wanted.tables if not any(_is(shape, name) for shape in shapes)]
    if missing:
        raise TargetError(f"table {', '.join(missing)} did not exist then", _nearest(wanted, known))
    _refuse(shapes, wanted)
    with reading(box, database) as connection:
        for shape in shapes:
            tables.lock_to_read(connection, shape)
            if wanted.where:
                tables.check_condition(connection, shape, wanted.where)
    return database, shapes


@contextmanager
def reading(box: Sandbox, database: str) -> Iterator[session.Connection]:
    """A session in which no lock is waited for without end.

    Nobody else is there: only a transaction that was prepared and not ended at this point holds any. Raises
    PreconditionError that names it.
    """
    with box.connect(database, (f"lock_timeout={LOCK_TIMEOUT}",)) as connection:
        try:
            yield connection
        except LockedError as error:
            raise _held(box, database, error) from None


def _held(box: Sandbox, database: str, error: LockedError) -> PreconditionError:
    with box.connect(database) as connection:
        found = tables.prepared(connection)
    if not found:
        return error
    names = ", ".join(
        f'"{name}" (xid {xid}, prepared {at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ})' for name, xid, at in found
    )
    return PreconditionError(
        f"at this point the rows are locked by what was prepared and not yet committed: {names}",
        f"take a later target, such as --target-xid {found[-1][1]} (not exclusive), or one before that time: pgcdp log",
    )


def _databases(box: Sandbox, database: str | None) -> list[str]:
    with box.connect() as connection:
        names = [each.name for each in session.databases(connection) if each.connectable and each.name != "template1"]
    if database is not None and database not in names:
        raise TargetError(f"database {database} did not exist then", f"there were: {', '.join(names)}")
    return names if database is None else [database]


def _names(wanted: Wanted, known: Sequence[tuple[str, str]]) -> list[tuple[str | None, str]]:
    """(schema, name) of each table."""
    if wanted.schema is None:
        return [split_name(name) for name in wanted.tables]
    return [(schema, name) for schema, name in known if schema == wanted.schema]


def _is(shape: TableShape, name: str) -> bool:
    schema, table = split_name(name)
    return table == shape.name and schema in (None, shape.schema)


def _what(wanted: Wanted) -> str:
    return f"schema {wanted.schema}" if wanted.schema else f"table {', '.join(wanted.tables)}"


def _nearest(wanted: Wanted, known: dict[str, list[tuple[str, str]]]) -> str:
    asked = wanted.schema or split_name(wanted.tables[0])[1]
    near = nearest(asked, {name for each in known.values() for name in each})
    return f"the nearest were: {', '.join(near)}" if near else "no table of a user was there"


def _refuse(shapes: Sequence[TableShape], wanted: Wanted) -> None:
    for schema, name in map(split_name, wanted.tables):
        several = sorted({str(shape) for shape in shapes if shape.name == name})
        if schema is None and len(several) > 1:
            raise TargetError(f"there are several tables {name}: {', '.join(several)}", "name the schema too")
    foreign = [str(part) for shape in shapes for part in shape.parts if part.kind == "f"]
    if foreign:
        raise TargetError(
            f"table {', '.join(foreign)} is a foreign table: its rows are those of another server",
            "no recovery point has them; name the other tables with --table",
        )
    unlogged = [str(part) for shape in shapes for part in shape.parts if part.persistence == "u"]
    if unlogged:
        raise TargetError(
            f"table {', '.join(unlogged)} is unlogged: it is empty after any recovery",
            "its rows are not in the WAL; no point has them",
        )


def check_file(file: Path) -> None:
    """A file can be written there, in the format of its name. Raises UsageError or PreconditionError."""
    if file.suffix not in FORMATS:
        raise UsageError(f"{file} has no known ending", f"end it with one of {', '.join(FORMATS)}")
    if file.exists():
        raise UsageError(f"{file} exists", "name a file that does not exist")
    if not file.parent.is_dir():
        raise PreconditionError(f"{file.parent} is no directory", f"mkdir -p {shlex.quote(str(file.parent))}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise PreconditionError(f"{file.parent} cannot be written to", "name a file in another directory")


def to_file(box: Sandbox, database: str, shapes: Sequence[TableShape], wanted: Wanted, file: Path) -> list[int]:
    """Write tables to a new file, in the format of its name; returns the number of rows of each."""
    check_file(file)
    how = FORMATS[file.suffix]
    partial = file.with_name(file.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        rows = _write(box, database, shapes, wanted, partial, how)
        fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.rename(file)
        sync_directory(file.parent)
    finally:
        partial.unlink(missing_ok=True)
    return rows


def _write(
    box: Sandbox, database: str, shapes: Sequence[TableShape], wanted: Wanted, file: Path, how: Format
) -> list[int]:
    if how == "csv":
        if len(shapes) != 1:
            raise UsageError(f"CSV holds one table, not {len(shapes)}", "end the file with .sql or .dump")
        with reading(box, database) as connection:
            return [tables.copy_to_csv(connection, shapes[0], wanted.where, file)]
    views = [str(shape) for shape in shapes if shape.parts[0].kind == "m"]
    if views and (wanted.where or wanted.schema is None):
        raise UsageError(
            f"{', '.join(views)} is a materialized view: pg_dump writes what fills it, not its rows",
            "end the file with .csv, or leave --file out",
        )
    with reading(box, database) as connection:
        if wanted.where:
            for shape in shapes:
                tables.keep_only(connection, shape, wanted.where)
        rows = [tables.count(connection, shape) for shape in shapes]
    words = [str(box.binaries.path("pg_dump")), "--no-sync", f"--lock-wait-timeout={LOCK_TIMEOUT}"]
    words += [f"--format={'plain' if how == 'sql' else 'custom'}"]
    # Of a partitioned table pg_dump writes the definition only, of one with heirs only its own rows.
    names = dict.fromkeys((part.schema, part.name) for shape in shapes for part in shape.parts)
    words += [f"--table={_quoted(schema)}.{_quoted(name)}" for schema, name in names]
    target = f"--dbname=dbname='{_escaped(database)}'"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:  # the program is not run as root: it may be one that the cluster's owner chose
        proc.run([*words, target], user=box.user, env=box.environment(), output=fd)
    finally:
        os.close(fd)
    return rows


def _quoted(name: str) -> str:
    """A name in pg_dump's patterns: quoted, it means itself."""
    return '"' + name.replace('"', '""') + '"'


def _escaped(value: str) -> str:
    """A value between quotes in libpq's connection strings."""
    return value.replace("\\", "\\\\").replace("'", "\\'")


@dataclass(frozen=True)
class Running:
    """The running database that rows are brought into."""

    connection: session.Connection

    def take(self, box: Sandbox, database: str, shape: TableShape, wanted: Wanted, name: str) -> int:
        """Rows into a new table `name` beside the one they come from; all of it or nothing."""
        with reading(box, database) as source, self.connection.transaction():
            return tables.copy_into(source, shape, wanted.where, self.connection, (shape.schema, name))

    def has(self, shape: TableShape) -> bool:
        """Whether there is a table of that name now."""
        return (shape.schema, shape.name) in tables.list_tables(self.connection)

    def compare(self, box: Sandbox, database: str, shapes: Sequence[TableShape], wanted: Wanted) -> list[Compared]:
        """How tables differ now, by primary key; the rows as they were stay in temporary tables."""
        found = []
        with reading(box, database) as source:
            for number, shape in enumerate(shapes):
                now = tables.same_columns(shape, tables.find_shapes(self.connection, shape.name, shape.schema))
                with waiting_at_most(self.connection, [now], LIVE_SECONDS):
                    found.append(comparing.compare(source, self.connection, shape, now, wanted.where, number))
        return found

    def put_back(self, compared: Sequence[Compared]) -> list[tuple[int, int]]:
        """Give back what was deleted and changed, if it still is what `compare` saw; (inserted, updated) of each."""
        with waiting_at_most(self.connection, [each.shape for each in compared], LIVE_SECONDS):
            return comparing.put_back(self.connection, compared)
