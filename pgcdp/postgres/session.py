"""Sessions with Postgres, by psycopg; the agent has its own (agent_session).

psycopg is loaded by the first session: a clone opens without one.

pgcdp runs as root, a cluster's `pg_hba.conf` usually says `local all postgres peer`, and the kernel tells Postgres
the effective user of the thread that called connect(). So a session can be opened "as" the cluster's owner: for the
steps of connecting, that one thread (never the process) takes on his effective user id.

That lets in a superuser, into databases that belong to others. Two things keep them from having their way with it: what
`ALTER DATABASE ... SET search_path` says is passed over (OPTIONS), so that pg_class is that of pg_catalog; and what is
asked is asked with the least rights that do (LEAST_SQL). The second alone would not: whatever a superuser's session
runs can take its rights back (docs/decisions/2026-11-26-least-privilege.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.proc import User, user_named

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

Settings = dict[str, Any]

OPTIONS = {"search_path": "pg_catalog"}
"""Of every session that pgcdp has for itself: at its start, so that they beat what roles and databases have."""
ROLE = "pgcdp"
"""The role of least privilege that a protected cluster gets (`postgres.role`)."""
LEAST_SQL = f"""
select set_config('role', chosen.rolname, false), current_setting('server_version_num')::int >= 150000
  and pg_has_role(chosen.oid, (select oid from pg_roles where rolname = 'pg_checkpoint'), 'usage')
from pg_roles own cross join (
  select oid, rolname from pg_roles
  where rolname = 'pg_monitor' or (rolname = '{ROLE}' and not rolsuper
    and pg_has_role(oid, 'pg_read_all_settings', 'usage') and pg_has_role(oid, 'pg_read_all_stats', 'usage'))
  order by rolname = '{ROLE}' desc limit 1) chosen
where own.rolname = session_user and own.rolsuper
"""
"""From here on a superuser's session has the rights of the role pgcdp; where that is not there, or lacks some, those of
pg_monitor, which is in every cluster and reads settings and statistics. Tells also whether it may run a checkpoint. No
row: the session is no superuser's, and stays what it is."""
ALL_RIGHTS_SQL = "set role none"
"""Ends that. Not RESET: to what a session is reset, a database's owner can say."""

SETTINGS_SQL = """
select name, setting, unit, vartype, context, source, sourcefile, sourceline, boot_val, pending_restart
from pg_settings where source not in ('default', 'client', 'session') or name = any (array[
  'max_connections', 'max_prepared_transactions', 'max_worker_processes', 'max_wal_senders',
  'max_locks_per_transaction', 'wal_level', 'track_commit_timestamp', 'max_replication_slots', 'wal_log_hints',
  'max_active_replication_origins', 'data_checksums', 'block_size', 'wal_segment_size', 'server_version_num',
  'server_version', 'data_directory', 'wal_init_zero', 'full_page_writes', 'fsync'])
order by name collate "C"
"""
IN_FILES_KNOWN_SQL = "select current_setting('is_superuser') = 'on'"
IN_FILES_SQL = """
select name, setting, null as unit, 'string' as vartype, 'user' as context, 'configuration file' as source,
  sourcefile, sourceline, null as boot_val, false as pending_restart
from pg_file_settings own
where applied and (
  name like '%.%' and setting = current_setting(name, true) and not exists (
    select from pg_settings known where known.name like split_part(own.name, '.', 1) || '.%')
  or name = 'search_path' and (pg_stat_file(sourcefile)).modification <= pg_conf_load_time())
order by name collate "C"
"""
"""What is in force from the files, and pg_settings does not show: an application's own settings, as long as no library
says what they mean (its settings may be secrets that are for superusers), and the search path, which is ours here."""
SUPERUSER_SQL = "select rolname::text from pg_roles where oid = 10"
DATABASES_SQL = """
select oid::bigint, datname::text, datallowconn from pg_database order by oid
"""
TABLESPACES_SQL = """
select oid::bigint, spcname::text, pg_tablespace_location(oid) from pg_tablespace
where pg_tablespace_location(oid) <> '' order by oid
"""
HBA_KNOWN_SQL = """
select has_table_privilege('pg_catalog.pg_hba_file_rules', 'select')
  and has_function_privilege('pg_catalog.pg_hba_file_rules()', 'execute')
"""
# Of a rule's options only this: others are secrets of LDAP and RADIUS servers, of which a clone has no use.
HBA_SQL = """
select type, database, user_name, address, netmask,
  case when array_to_string(options, ',') like '%clientcert=%' and auth_method <> 'reject' then 'cert'
    else auth_method end,
  error
from pg_hba_file_rules
where error is not null or type like 'host%'
"""


def dsn_text(host: str, port: int, role: str, database: str) -> str:
    """A libpq connection string."""
    values = {"host": host, "port": str(port), "user": role, "dbname": database}
    return " ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def _quoted(value: str) -> str:
    """A value in a connection string (PostgreSQL's documentation, 34.1.1.1)."""
    escaped = re.sub(r"(['\\])", r"\\\1", value)
    return f"'{escaped}'" if not value or re.search(r"\s", value) else escaped


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
    dsn: Dsn,
    database: str = "postgres",
    *,
    superuser: bool = False,
    options: str = "",
    timeout: int = 10,
    name: str = "pgcdp",
) -> Connection:
    """An autocommit connection for pgcdp's own statements: with OPTIONS, and the least rights unless `superuser`.

    `options` are more server options ("-c work_mem=1GB"). Raises PreconditionError with Postgres's words when there is
    none to be had.
    """
    own = " ".join(f"-c {option}={value}" for option, value in OPTIONS.items())
    connection = _connected(dsn, database, f"{own} {options}", timeout, name)
    if not superuser:
        try:
            query(connection, LEAST_SQL)
        except PgcdpError as error:
            connection.close()
            raise unreachable(dsn, error) from None
    return connection


def connect_as_client(dsn: Dsn, database: str = "postgres", name: str = "pgcdp") -> Connection:
    """An autocommit connection as clients of that database have it: its search path, and all rights of the role.

    Only pg_catalog is in front, whatever the path says. Raises PreconditionError.
    """
    return _with_catalog_first(_connected(dsn, database, "", 10, name))


def connect_to(conninfo: str) -> Connection:
    """The same to what a libpq connection string names. Raises PreconditionError."""
    import psycopg

    try:
        connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=10, application_name="pgcdp")
    except psycopg.Error as error:
        raise PreconditionError(
            f"cannot connect to that database: {first_line(error)}", 'it takes what psql takes, such as "dbname=shop"'
        ) from None
    _speak_text(connection)
    return _with_catalog_first(connection)


def _connected(dsn: Dsn, database: str, options: str, timeout: int, name: str) -> Connection:
    import psycopg

    try:
        with as_user(dsn.owner):
            connection = psycopg.connect(
                dsn.text(database), autocommit=True, connect_timeout=timeout, options=options, application_name=name
            )
    except psycopg.Error as error:
        raise unreachable(dsn, error) from None
    _speak_text(connection)
    return connection


def _speak_text(connection: Connection) -> None:
    """Read the text of a database of SQL_ASCII, whose bytes may be anything, as UTF-8: psycopg gives bytes else."""
    if is_ascii(connection):
        connection.execute("set client_encoding = 'UTF8'")


def is_ascii(connection: Connection) -> bool:
    """Whether its database has the encoding SQL_ASCII: none that anything is checked against."""
    return connection.info.parameter_status("server_encoding") == "SQL_ASCII"


def _with_catalog_first(connection: Connection) -> Connection:
    """Postgres looks into pg_catalog before all else, unless the path itself names it behind something."""
    try:
        rows = query(connection, "select pg_catalog.current_setting('search_path')").rows
        path = str(rows[0][0]) if rows else ""
        names = [each.strip() for each in re.findall(r'\s*(?:"(?:[^"]|"")*"|[^,"])+', path)]
        plain = [each for each in names if each != '"pg_catalog"' and each.lower() != "pg_catalog"]
        if plain != names:
            # As a value: in a text of SQL, what a backslash means is for the database's owner to say.
            query(connection, "select pg_catalog.set_config('search_path', %s, false)", values=[", ".join(plain)])
    except PgcdpError:
        connection.close()
        raise
    return connection


def query(connection: Connection, sql: str, limit: int | None = None, values: Sequence[object] | None = None) -> Answer:
    """Run one statement and give at most `limit` of its rows; `values` are for its %s.

    Raises PgcdpError with Postgres's words when it fails.
    """
    import psycopg

    try:
        cursor = connection.execute(sql.encode(), values, prepare=False)
        if cursor.description is None:
            return Answer(None, 0, cursor.statusmessage or "")
        rows = cursor.fetchall() if limit is None else cursor.fetchmany(limit)
        return Answer(rows, cursor.rowcount, cursor.statusmessage or "")
    except psycopg.Error as error:
        raise PgcdpError(" | ".join(line.strip() for line in str(error).strip().splitlines())) from None


def settings(connection: Connection) -> Settings:
    """What an interval keeps about the configuration, ready for JSON.

    `settings`: rows of pg_settings that are not default, and those that recovery compares, and, where this role may see
    them, more from the configuration files (`IN_FILES_SQL`); `superuser`: name of the bootstrap role; `databases`;
    `tablespaces`: [oid, name, location]. `server_version_num` and `data_directory`.
    `hba`: rules for TCP as pg_hba_file_rules has them, [type, databases, users, address, netmask, method], with the
    method "cert" also where a certificate is asked for besides a password; None when this role may not see them, or
    the file has an error: another one is in force then.
    """
    from psycopg.rows import dict_row

    cursor = connection.cursor(row_factory=dict_row)
    rows = cursor.execute(SETTINGS_SQL).fetchall()
    if connection.execute(IN_FILES_KNOWN_SQL).fetchone() == (True,):
        rows += cursor.execute(IN_FILES_SQL).fetchall()
    superuser = connection.execute(SUPERUSER_SQL).fetchone()
    spaces = [list(row) for row in connection.execute(TABLESPACES_SQL).fetchall()]
    known = connection.execute(HBA_KNOWN_SQL).fetchone()
    hba = rules_in(connection.execute(HBA_SQL).fetchall()) if known and known[0] else None
    return assembled(rows, superuser[0] if superuser else "postgres", databases(connection), spaces, hba)


def databases(connection: Connection) -> list[Database]:
    """All databases, templates included, by OID. Raises PgcdpError."""
    return [Database(*row) for row in query(connection, DATABASES_SQL).rows or []]


def tablespace_names(connection: Connection) -> dict[int, str]:
    """Those that lie in a directory of their own, by OID. Raises PgcdpError."""
    return {oid: name for oid, name, _ in query(connection, TABLESPACES_SQL).rows or []}


@contextmanager
def as_user(user: User | None) -> Iterator[None]:
    """This thread has the effective user and groups of `user` inside; other threads keep theirs. Nothing changes unless
    root, or on a machine whose system calls are not known here.

    Linux keeps credentials for each thread; only the C library changes those of all threads together, so the system
    calls are made directly. Between entering and leaving, nothing else may run in this thread.
    """
    calls = _CALLS.get(platform.machine())
    if user is None or os.geteuid() != 0 or user.uid == 0 or calls is None:
        yield
        return
    setresuid, setresgid, setgroups = calls
    groups, gid = os.getgroups(), os.getegid()
    _set_thread_groups(setgroups, user.groups)
    try:
        _set_thread_id(setresgid, user.gid)
        _set_thread_id(setresuid, user.uid)
        yield
    finally:
        _set_thread_id(setresuid, 0)
        _set_thread_id(setresgid, gid)
        _set_thread_groups(setgroups, groups)


_CALLS = {"x86_64": (117, 119, 116), "aarch64": (147, 149, 159)}
"""Numbers of setresuid, setresgid, setgroups."""


def _set_thread_id(number: int, effective: int) -> None:
    _system_call(number, ctypes.c_int(-1), ctypes.c_int(effective), ctypes.c_int(-1))


def _set_thread_groups(number: int, groups: Sequence[int]) -> None:
    _system_call(number, ctypes.c_size_t(len(groups)), (ctypes.c_uint * len(groups))(*groups))


def _system_call(number: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *arguments) != 0:
        raise OSError(ctypes.get_errno(), "cannot change the effective user of this thread")


def rules_in(rows: Iterable[Sequence[Any]]) -> list[list[Any]] | None:
    """What `settings` tells of them."""
    found = []
    for *rule, error in rows:
        if error is None:
            found.append(rule)
        elif "record cannot match because" not in error:  # SSL is off, or this build has none, or no GSSAPI
            return None
    return found


def assembled(
    rows: list[dict[str, Any]],
    superuser: str,
    found: list[Database],
    spaces: list[list[Any]],
    hba: list[list[Any]] | None,
) -> Settings:
    """What `settings` tells, from rows of the statements above."""
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


def first_line(error: BaseException) -> str:
    """In one line, what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unreachable(dsn: Dsn, error: BaseException) -> PreconditionError:
    """Postgres does not answer there."""
    return PreconditionError(
        f"cannot connect to postgres in {dsn.socket_directory} on port {dsn.port}: {first_line(error)}",
        "see whether it runs and its pg_hba.conf lets this role in",
    )
