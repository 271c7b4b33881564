"""Settings and states of a cluster that void the promise: that Postgres recovers at each captured write.

The settings can be read of a cluster that runs (`running`) and of one that does not (`at_rest`). Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pgcdp.errors import PgcdpError
from pgcdp.postgres import session
from pgcdp.postgres.control import State
from pgcdp.records import Remark
from pgcdp.units import format_size

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection, Dsn

MENDED_BY_RELOAD = "set {name} = on in postgresql.conf (or ALTER SYSTEM) and reload"
SETTINGS: tuple[tuple[str, bool, str], ...] = (
    ("fsync", True,
     "Postgres does not wait until its writes are on the volume, so they come in an order that no recovery can use: "
     "a point restored from them may be corrupt"),
    ("full_page_writes", True,
     "a page that a recovery point has only half of cannot be repaired from WAL: such a point may be corrupt"),
    ("wal_init_zero", False,
     "a commit is found one or two writes later than the one that made it durable, so a target may lie behind it"),
)  # fmt: skip
"""(name, whether `off` voids the promise, what it means). Each is mended by a reload."""

EXCLUSIVE_UNTIL = 15
"""The first version without exclusive backup mode."""
LISTED = 10
"""So many unlogged tables are named, the largest."""
LOCK_TIMEOUT = "2s"
"""A size is asked under a lock of the table: not at the cost of waiting behind a DDL that waits itself."""

# Postgres's own schemas aside, whatever is unlogged and has a file; indexes, TOAST and sequences of columns belong to
# their table. A sequence by itself, from version 15 on, begins anew.
_UNLOGGED_SQL = """
select n.nspname::text, c.relname::text, pg_total_relation_size(c.oid)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relpersistence = 'u' and (c.relkind = 'r' or c.relkind = 'S' and not exists (
  select from pg_depend d join pg_class t on t.oid = d.refobjid
  where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.refclassid = 'pg_class'::regclass
    and d.deptype = any ('{a,i}') and t.relpersistence = 'u'))
order by 3 desc, 1, 2
"""
_LABEL = "backup_label"


@dataclass(frozen=True, slots=True)
class Unlogged:
    """An unlogged table and what it takes, indexes included."""

    database: str
    schema: str
    name: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.database}: {self.schema}.{self.name} ({format_size(self.bytes)})"


def settings(value_of: Callable[[str], str | None]) -> Iterator[Remark]:
    """What the settings say; `value_of` gives one by name, None when this version has it not."""
    for name, voids, meaning in SETTINGS:
        value = value_of(name)
        if value == "off":
            hint = MENDED_BY_RELOAD.format(name=name)
            yield Remark(f"setting {name}", "failure" if voids else "warning", f"off: {meaning}", hint)
        elif value is not None:
            yield Remark(f"setting {name}", "ok", value)


def standby(is_one: bool) -> Remark:
    """Whether the cluster replays the WAL of another one."""
    if not is_one:
        return Remark("standby", "ok", "no: the cluster writes its own WAL")
    return Remark(
        "standby", "failure",
        "the cluster is a standby, or its recovery from an archive has not ended: it completes no checkpoint of its "
        "own, so no boundary can be cut at",
        "protect its primary, or promote it first: select pg_promote()",
    )  # fmt: skip


def exclusive_backup(pgdata: Path, major: int, *, runs: bool) -> Remark:
    """Whether a backup_label lies in the data directory: from where it says, the next recovery begins, not from where
    the cluster crashed."""
    name = "exclusive backup"
    if not (pgdata / _LABEL).exists():
        return Remark(name, "ok", "none under way")
    meaning = "after a crash Postgres recovers from where that backup began, and does not start when that WAL is gone"
    if not runs:
        return Remark(
            name, "failure", f"{pgdata / _LABEL} is there: {meaning}",
            "if the directory was restored from a base backup, start the cluster once as you always do; if it is what "
            "an interrupted backup left, remove the file",
        )  # fmt: skip
    if major < EXCLUSIVE_UNTIL:
        return Remark(
            name, "failure", f"one is under way: {meaning}",
            "select pg_stop_backup() ends it; take backups with pg_basebackup or pg_start_backup(..., exclusive => "
            "false)",
        )  # fmt: skip
    return Remark(
        name, "failure", f"{pgdata / _LABEL} was put beside a running cluster: {meaning}",
        f"rm {pgdata / _LABEL}",
    )  # fmt: skip


def unlogged(found: list[Unlogged], unknown: Mapping[str, str]) -> Iterator[Remark]:
    """What it means that some tables are; `unknown`: databases that could not be asked, and why."""
    name = "unlogged tables"
    if found:
        largest = sorted(found, key=lambda each: -each.bytes)
        told = ", ".join(str(each) for each in largest[:LISTED])
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        total = format_size(sum(each.bytes for each in found))
        yield Remark(
            name, "warning",
            f"{len(found)} of {total}, which are empty in every clone and restore, and in production after a crash: "
            f"{told}{more}",
            "ALTER TABLE ... SET LOGGED, for what must not be lost",
        )  # fmt: skip
    for database, why in unknown.items():
        yield Remark(name, "warning", f"database {database} was not looked at: {why}", "look again later")
    if not found and not unknown:
        yield Remark(name, "ok", "none")


def running(dsn: Dsn, pgdata: Path) -> Iterator[Remark]:
    """All of that of a cluster that runs. Raises PreconditionError when it cannot be reached."""
    with session.connect(dsn) as connection:
        names = ", ".join(f"'{name}'" for name, _, _ in SETTINGS)
        rows = session.query(connection, f"select name, setting from pg_settings where name in ({names})").rows or []
        state = session.query(
            connection, "select pg_is_in_recovery(), current_setting('server_version_num')::int / 10000"
        )
        databases = [each.name for each in session.databases(connection) if each.connectable]
    values: dict[str, str] = {str(name): str(value) for name, value in rows}
    yield from settings(values.get)
    in_recovery, major = (state.rows or [(False, 0)])[0]
    yield standby(bool(in_recovery))
    yield exclusive_backup(pgdata, int(major), runs=True)
    found, unknown = unlogged_in(dsn, databases)
    yield from unlogged(found, unknown)


def unlogged_in(dsn: Dsn, databases: list[str]) -> tuple[list[Unlogged], dict[str, str]]:
    """Unlogged tables of these databases, and why some could not be asked."""
    found: list[Unlogged] = []
    unknown: dict[str, str] = {}
    for database in databases:
        try:
            with session.connect(dsn, database, options=f"-c lock_timeout={LOCK_TIMEOUT}") as connection:
                found += _unlogged_of(connection, database)
        except PgcdpError as error:
            unknown[database] = error.message
    return found, unknown


def _unlogged_of(connection: Connection, database: str) -> list[Unlogged]:
    rows = session.query(connection, _UNLOGGED_SQL).rows or []
    return [Unlogged(database, schema, name, int(size or 0)) for schema, name, size in rows]


def at_rest(pgdata: Path, major: int, state: State, ask: Callable[[str], str]) -> Iterator[Remark]:
    """All of that of a cluster that does not run; `state` is pg_control's, `ask` tells a setting as it would be.

    Which tables are unlogged, only a cluster that runs tells. Raises PreconditionError when a setting cannot be read.
    """
    yield from settings(ask)
    signals = [name for name in ("standby.signal", "recovery.signal") if (pgdata / name).exists()]
    yield standby(bool(signals) or state in (State.SHUT_DOWN_IN_RECOVERY, State.IN_ARCHIVE_RECOVERY))
    yield exclusive_backup(pgdata, major, runs=False)
    yield Remark("unlogged tables", "ok", "not looked at: the cluster does not run")
