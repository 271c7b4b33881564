"""Sessions with Postgres: psycopg for commands, asyncpg for the agent.

pgcdp runs as root, a cluster's `pg_hba.conf` usually says `local all postgres peer`, and the kernel tells Postgres
the effective user of the thread that called connect(). So a session can be opened "as" the cluster's owner: for the
steps of connecting, that one thread (never the process) takes on his effective user id.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Awaitable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import psycopg
from psycopg import conninfo as psycopg_conninfo

from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.proc import User, user_named
from pgcdp.units import parse_lsn

T = TypeVar("T")
Settings = dict[str, Any]
Connection = psycopg.Connection[Any]

_SETTINGS_SQL = """
select name, setting, unit, vartype, context, source, sourcefile, sourceline, boot_val, pending_restart
from pg_settings where source not in ('default', 'client', 'session') or name = any (array[
  'max_connections', 'max_prepared_transactions', 'max_worker_processes', 'max_wal_senders',
  'max_locks_per_transaction', 'wal_level', 'track_commit_timestamp', 'max_replication_slots', 'wal_log_hints',
  'max_active_replication_origins', 'data_checksums', 'block_size', 'wal_segment_size', 'server_version_num',
  'server_version', 'data_directory', 'wal_init_zero', 'full_page_writes', 'fsync'])
order by name collate "C"
"""
_CHECKPOINT_SQL = "select checkpoint_lsn::text from pg_control_checkpoint()"
_SUPERUSER_SQL = "select rolname::text from pg_roles where oid = 10"
_DATABASES_SQL = """
select oid::bigint, datname::text, datallowconn from pg_database order by oid
"""
_TABLESPACES_SQL = """
select oid::bigint, spcname::text, pg_tablespace_location(oid) from pg_tablespace
where pg_tablespace_location(oid) <> '' order by oid
"""
_HBA_KNOWN_SQL = """
select has_table_privilege('pg_catalog.pg_hba_file_rules', 'select')
  and has_function_privilege('pg_catalog.pg_hba_file_rules()', 'execute')
"""
# Of a rule's options only this: others are secrets of LDAP and RADIUS servers, which do not belong into a store.
_HBA_SQL = """
select type, database, user_name, address, netmask,
  case when array_to_string(options, ',') like '%clientcert=%' and auth_method <> 'reject' then 'cert'
    else auth_method end,
  error
from pg_hba_file_rules
where error is not null or type like 'host%'
"""


def dsn_text(host: str, port: int, role: str, database: str) -> str:
    """A libpq connection string."""
    return psycopg_conninfo.make_conninfo(host=host, port=port, user=role, dbname=database)


@dataclass(frozen=True, slots=True)
class Dsn:
    """How to reach a cluster on this machine. `owner` is the user to connect as for peer authentication, or None."""

    socket_directory: Path
    port: int
    role: str = "postgres"
    owner: User | None = None

    @classmethod
    def of(cls, config: Config) -> Dsn:
        """That of a set's protected cluster."""
        cluster = config.cluster
        return cls(Path(cluster.socket_directory), cluster.port, role=cluster.owner, owner=user_named(cluster.owner))

    def text(self, database: str = "postgres") -> str:
        """A libpq connection string."""
        return dsn_text(str(self.socket_directory), self.port, self.role, database)


@dataclass(frozen=True, slots=True)
class Database:
    """A row of pg_database."""

    oid: int
    name: str
    connectable: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What a statement gave: its first rows (None when it is of a kind that gives none), their number, its tag."""

    rows: list[tuple[Any, ...]] | None
    count: int
    status: str


def connect(
    dsn: Dsn, database: str = "postgres", *, options: str = "", timeout: int = 10, name: str = "pgcdp"
) -> Connection:
    """An autocommit connection. `options` are server options ("-c work_mem=1GB").

    Raises PreconditionError with Postgres's words when there is none to be had.
    """
    try:
        with as_user(dsn.owner):
            return psycopg.connect(
                dsn.text(database), autocommit=True, connect_timeout=timeout, options=options, application_name=name
            )
    except psycopg.Error as error:
        raise _unreachable(dsn, error) from None


def connect_to(conninfo: str) -> Connection:
    """An autocommit connection to what a libpq connection string names. Raises PreconditionError."""
    try:
        return psycopg.connect(conninfo, autocommit=True, connect_timeout=10, application_name="pgcdp")
    except psycopg.Error as error:
        raise PreconditionError(
            f"cannot connect to that database: {_first_line(error)}", 'it takes what psql takes, such as "dbname=shop"'
        ) from None


def query(connection: Connection, sql: str, limit: int | None = None) -> Answer:
    """Run one statement and give at most `limit` of its rows. Raises PgcdpError with Postgres's words when it fails."""
    try:
        cursor = connection.execute(sql.encode(), prepare=False)
        if cursor.description is None:
            return Answer(None, 0, cursor.statusmessage or "")
        rows = cursor.fetchall() if limit is None else cursor.fetchmany(limit)
        return Answer(rows, cursor.rowcount, cursor.statusmessage or "")
    except psycopg.Error as error:
        raise PgcdpError(" | ".join(line.strip() for line in str(error).strip().splitlines())) from None


def settings(connection: Connection) -> Settings:
    """What an interval keeps about the configuration, ready for JSON.

    `settings`: rows of pg_settings that are not default, and those that recovery compares; `superuser`: name of the
    bootstrap role; `databases`; `tablespaces`: [oid, name, location]. `server_version_num` and `data_directory`.
    `hba`: rules for TCP as pg_hba_file_rules has them, [type, databases, users, address, netmask, method], with the
    method "cert" also where a certificate is asked for besides a password; None when this role may not see them, or
    the file has an error: another one is in force then.
    """
    cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
    rows = cursor.execute(_SETTINGS_SQL).fetchall()
    superuser = connection.execute(_SUPERUSER_SQL).fetchone()
    spaces = [list(row) for row in connection.execute(_TABLESPACES_SQL).fetchall()]
    known = connection.execute(_HBA_KNOWN_SQL).fetchone()
    hba = _rules(connection.execute(_HBA_SQL).fetchall()) if known and known[0] else None
    return _assemble(rows, superuser[0] if superuser else "postgres", databases(connection), spaces, hba)


def databases(connection: Connection) -> list[Database]:
    """All databases, templates included, by OID."""
    return [Database(*row) for row in connection.execute(_DATABASES_SQL).fetchall()]


def outside(connection: Connection, pgdata: Path) -> dict[str, Path]:
    """Where the cluster has data outside its data directory: "pg_wal" and "pg_tblspc/OID" to the place."""
    rows = connection.execute(_TABLESPACES_SQL).fetchall()
    return _outside([list(row) for row in rows], pgdata)


class Session:
    """The agent's connection (asyncpg): one at a time, opened again by the caller when it breaks."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, dsn: Dsn, database: str = "postgres", timeout: float = 10.0) -> Session:
        """Connect. Raises PreconditionError when Postgres cannot be reached."""
        opening = asyncpg.connect(
            host=str(dsn.socket_directory),
            port=dsn.port,
            user=dsn.role,
            database=database,
            timeout=timeout,
            server_settings={"application_name": "pgcdp agent"},
        )
        try:
            return cls(await _StepsAs(dsn.owner, opening))
        except (OSError, asyncpg.PostgresError, TimeoutError) as error:
            raise _unreachable(dsn, error) from None

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return bool(self._connection.is_closed())

    async def checkpoint(self) -> None:
        """Run an immediate checkpoint and wait for its end. Raises PreconditionError when there was none."""
        await self._ask(self._connection.execute("checkpoint"))

    async def checkpoint_lsn(self) -> int:
        """Where the newest completed checkpoint's record begins, as pg_control says."""
        return parse_lsn(await self._ask(self._connection.fetchval(_CHECKPOINT_SQL)))

    async def lsn(self) -> int:
        """Where the next WAL record will be inserted."""
        return parse_lsn(await self._ask(self._connection.fetchval("select pg_current_wal_insert_lsn()::text")))

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a statement."""
        return [tuple(row) for row in await self._ask(self._connection.fetch(sql))]

    async def settings(self) -> Settings:
        """As `settings` of this module."""
        rows = [dict(row) for row in await self._ask(self._connection.fetch(_SETTINGS_SQL))]
        superuser = await self._ask(self._connection.fetchval(_SUPERUSER_SQL))
        spaces = await self._ask(self._connection.fetch(_TABLESPACES_SQL))
        known = await self._ask(self._connection.fetchval(_HBA_KNOWN_SQL))
        hba = _rules(await self._ask(self._connection.fetch(_HBA_SQL))) if known else None
        return _assemble(rows, superuser or "postgres", await self.databases(), [list(row) for row in spaces], hba)

    async def databases(self) -> list[Database]:
        """All databases, templates included, by OID."""
        return [Database(*row) for row in await self._ask(self._connection.fetch(_DATABASES_SQL))]

    async def outside(self, pgdata: Path) -> dict[str, Path]:
        """As `outside` of this module."""
        rows = await self._ask(self._connection.fetch(_TABLESPACES_SQL))
        return _outside([list(row) for row in rows], pgdata)

    async def close(self, timeout: float = 5.0) -> None:
        """End the session; never fails."""
        try:
            await self._connection.close(timeout=timeout)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._connection.terminate()

    async def _ask(self, request: Awaitable[T]) -> T:
        try:
            return await request
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise PreconditionError(f"postgres did not do what pgcdp asked: {_first_line(error)}") from None


@contextmanager
def as_user(user: User | None) -> Iterator[None]:
    """This thread's effective user id is `user`'s inside; other threads keep theirs. Nothing changes unless root.

    Linux keeps credentials for each thread; only the C library changes those of all threads together, so the system
    call is made directly. Between entering and leaving, nothing else may run in this thread.
    """
    if user is None or os.geteuid() != 0 or user.uid == 0:
        yield
        return
    _set_thread_euid(user.uid)
    try:
        yield
    finally:
        _set_thread_euid(0)


class _StepsAs(Awaitable[T]):
    """Awaits something with each of its steps run by `as_user`; between the steps the event loop is itself."""

    def __init__(self, user: User | None, awaited: Awaitable[T]) -> None:
        self._user = user
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._awaited.__await__()
        value: Any = None
        failure: BaseException | None = None
        while True:
            try:
                with as_user(self._user):
                    waiting = steps.send(value) if failure is None else steps.throw(failure)
            except StopIteration as end:
                result: T = end.value
                return result
            value, failure = None, None
            try:
                value = yield waiting
            except BaseException as error:  # a cancellation belongs to what is awaited
                failure = error


_SETRESUID = {"x86_64": 117, "aarch64": 147}


def _set_thread_euid(uid: int) -> None:
    number = _SETRESUID.get(platform.machine())
    if number is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), ctypes.c_int(-1), ctypes.c_int(uid), ctypes.c_int(-1)) != 0:
        raise OSError(ctypes.get_errno(), "cannot change the effective user of this thread")


def _rules(rows: Iterable[Sequence[Any]]) -> list[list[Any]] | None:
    found = []
    for *rule, error in rows:
        if error is None:
            found.append(rule)
        elif "record cannot match because" not in error:  # SSL is off, or this build has none, or no GSSAPI
            return None
    return found


def _assemble(
    rows: list[dict[str, Any]],
    superuser: str,
    found: list[Database],
    spaces: list[list[Any]],
    hba: list[list[Any]] | None,
) -> Settings:
    values = {row["name"]: row["setting"] for row in rows}
    return {
        "server_version_num": int(values["server_version_num"]),
        "data_directory": values.get("data_directory"),
        "superuser": superuser,
        "databases": [{"oid": each.oid, "name": each.name, "connectable": each.connectable} for each in found],
        "tablespaces": [{"oid": oid, "name": name, "location": place} for oid, name, place in spaces],
        "settings": rows,
        "hba": hba,
    }


def _outside(spaces: list[list[Any]], pgdata: Path) -> dict[str, Path]:
    real = Path(os.path.realpath(pgdata))
    found = {}
    wal = Path(os.path.realpath(pgdata / "pg_wal"))
    if not wal.is_relative_to(real):
        found["pg_wal"] = wal
    for oid, _, location in spaces:
        place = Path(os.path.realpath(real / location))
        if not place.is_relative_to(real):
            found[f"pg_tblspc/{oid}"] = place
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _unreachable(dsn: Dsn, error: BaseException) -> PreconditionError:
    return PreconditionError(
        f"cannot connect to postgres in {dsn.socket_directory} on port {dsn.port}: {_first_line(error)}",
        "see whether it runs and its pg_hba.conf lets this role in",
    )
