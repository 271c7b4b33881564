"""Prove a data directory right: start Postgres on it in a sandbox and look at everything that can be looked at.

The order matters: recovery, indexes and tables while it runs, the user's own assertions, then a clean shutdown, and
the checksums of all pages as they then are on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pgcdp import proc
from pgcdp.errors import PgcdpError, VerificationFailed
from pgcdp.postgres import session
from pgcdp.postgres.cluster import Binaries
from pgcdp.postgres.role import sql_files
from pgcdp.records import Check
from pgcdp.recovery import assertions, sandbox
from pgcdp.recovery.assertions import Assertion
from pgcdp.recovery.sandbox import Sandbox
from pgcdp.units import format_lsn

_SHOWN = 4
_BTREES = """
select c.oid::regclass::text, bt_index_check(c.oid, true)
from pg_index i join pg_class c on c.oid = i.indexrelid join pg_am a on a.oid = c.relam
where a.amname = 'btree' and i.indisvalid and i.indisready
  and (c.relpersistence = 'p' or c.relpersistence = 'u') and c.relkind = 'i'
"""

Report = Callable[[str], None]


def own_checks() -> list[Path]:
    """pgcdp's own assertions, sql/checks/*.sql."""
    return sql_files("checks")


def verify_directory(
    pgdata: Path,
    settings: Mapping[str, Any] | None,
    *,
    parent: Path,
    sql: Path | None = None,
    checks: Sequence[Path] = (),
    database: str | None = None,
    elsewhere: Mapping[Path, Path] = MappingProxyType({}),
    hide: Sequence[Path] = (),
    binaries: Binaries | None = None,
    jobs: int = 2,
    owns_data: bool = False,
    report: Report = lambda name: None,
) -> list[Check]:
    """Start `pgdata` (a private copy or a mounted scratch image) in a sandbox, run all checks, destroy the sandbox.

    `sql` is the user's file of assertions, `checks` are pgcdp's own (files of sql/checks); `database` is where
    statements run that do not say. The other arguments are those of `sandbox.start`. `report` hears the name of
    each check behind recovery as it begins. A recovery that fails is a failed check, not an error; raises
    PreconditionError when it could not be tried.
    """
    wanted = [] if sql is None else assertions.load(sql)
    own = [assertion for path in checks for assertion in assertions.load(path)]
    started = time.monotonic()
    try:
        found = sandbox.start(
            pgdata, settings, parent=parent, binaries=binaries, elsewhere=elsewhere, hide=hide,
            owns_data=owns_data,
        )  # fmt: skip
    except VerificationFailed as failed:
        return [Check("recovery", False, time.monotonic() - started, failed.message)]
    with found:
        return list(verify_sandbox(found, own, wanted, database=database, jobs=jobs, report=report))


def verify_sandbox(
    box: Sandbox,
    own: Sequence[Assertion] = (),
    wanted: Sequence[Assertion] = (),
    *,
    database: str | None = None,
    jobs: int = 2,
    report: Report = lambda name: None,
) -> Iterator[Check]:
    """All checks on a running sandbox, one after another; it is stopped at the end. `report`: as `verify_directory`."""
    yield recovery(box)
    report("amcheck")
    yield amcheck(box, jobs)
    for prefix, assertion in [*(("check", each) for each in own), *(("sql", each) for each in wanted)]:
        name = f"{prefix}: {assertion.name}"
        report(name)
        yield assert_sql(box, name, assertion, database)
    report("shutdown")
    stopped = shutdown(box)
    yield stopped
    if stopped.ok:
        report("checksums")
        yield page_checksums(box)


def recovery(box: Sandbox) -> Check:
    """What crash recovery said; a warning in it is a failure, for a crash leaves nothing to be warned of."""
    found = box.recovery
    if found.from_lsn is None:
        what = "no recovery was needed"
    elif found.to_lsn is None:
        what = f"from {format_lsn(found.from_lsn)}, nothing to replay"
    else:
        what = f"from {format_lsn(found.from_lsn)} to {format_lsn(found.to_lsn)}"
    if found.defaults:
        what += f"; by default here: {', '.join(found.defaults)}"
    if found.warnings:
        return Check("recovery", False, found.seconds, f"{what}; {_some(found.warnings)}")
    return Check("recovery", True, found.seconds, what)


def amcheck(box: Sandbox, jobs: int = 2) -> Check:
    """Tables, B-trees, and that each row is in its indexes: pg_amcheck --heapallindexed over all databases.

    PostgreSQL 13 has no pg_amcheck: there the B-trees alone are checked, through SQL.
    """
    started = time.monotonic()
    if box.binaries.major < 14:
        return amcheck_by_sql(box)
    try:
        proc.run(
            [
                str(box.binaries.path("pg_amcheck")),
                "--all",
                "--heapallindexed",
                "--install-missing",
                "--no-password",
                f"--jobs={jobs}",
            ],
            user=box.user,
            env=box.environment(),
        )
    except proc.ProcessFailed as failed:
        said = [*failed.completed.stdout.splitlines(), *failed.completed.stderr.splitlines()]
        return Check("amcheck", False, time.monotonic() - started, _some([line for line in said if line.strip()]))
    except PgcdpError as error:
        return Check("amcheck", False, time.monotonic() - started, error.message)
    names = _databases(box)
    return Check("amcheck", True, time.monotonic() - started, f"{len(names)} databases: {', '.join(names)}")


def amcheck_by_sql(box: Sandbox) -> Check:
    """Every B-tree with bt_index_check(heapallindexed)."""
    started = time.monotonic()
    count = 0
    try:
        for name in _databases(box):
            with box.connect(name) as connection:
                session.query(connection, "create extension if not exists amcheck schema pg_catalog")
                count += session.query(connection, _BTREES).count
    except PgcdpError as error:
        return Check("amcheck", False, time.monotonic() - started, error.message)
    detail = f"{count} B-trees (tables are not checked in this version)"
    return Check("amcheck", True, time.monotonic() - started, detail)


def assert_sql(box: Sandbox, name: str, assertion: Assertion, database: str | None = None) -> Check:
    """Run one assertion where it belongs: all databases, its own, `database`, or the first that is no template."""
    started = time.monotonic()
    if assertion.since > box.binaries.major:
        return Check(name, True, 0.0, f"skipped: needs PostgreSQL {assertion.since}")
    try:
        everywhere = _databases(box)
        places = everywhere if assertion.each_database else [assertion.database or database or _default(everywhere)]
        wrong = [f"{place}: {said}" for place in places if (said := _ask(box, place, assertion.sql)) is not None]
    except PgcdpError as error:
        wrong = [error.message]
    seconds = time.monotonic() - started
    if not wrong:
        return Check(name, True, seconds, f"holds in {', '.join(places)}")
    if assertion.severity == "warning":
        return Check(name, True, seconds, f"warning: {_some(wrong)}")
    return Check(name, False, seconds, _some(wrong))


def shutdown(box: Sandbox) -> Check:
    """A clean shutdown: everything that is in memory can be written."""
    started = time.monotonic()
    try:
        box.stop()
    except PgcdpError as error:
        return Check("shutdown", False, time.monotonic() - started, error.message)
    log = box.log_file.read_text(errors="replace")
    panics = [line for line in log.splitlines() if "] PANIC:  " in line]
    detail = _some(panics) if panics else "clean"
    return Check("shutdown", not panics, time.monotonic() - started, detail)


def page_checksums(box: Sandbox) -> Check:
    """pg_checksums over the stopped sandbox, inside its walls: it follows the links of tablespaces."""
    started = time.monotonic()
    if not box.control.checksums:
        return Check("checksums", True, 0.0, "skipped: this cluster has no page checksums (initdb --data-checksums)")
    program = str(box.binaries.path("pg_checksums"))
    try:
        done = proc.run(box.isolated([program, "--check", "-D", str(box.pgdata)]))
    except proc.ProcessFailed as failed:
        said = [line for line in failed.completed.stderr.splitlines() if line.strip()]
        return Check("checksums", False, time.monotonic() - started, _some(said or [failed.message]))
    blocks = next((line.split(":")[1].strip() for line in done.stdout.splitlines() if "Blocks scanned" in line), "?")
    return Check("checksums", True, time.monotonic() - started, f"{blocks} pages")


def _ask(box: Sandbox, database: str, sql: str) -> str | None:
    """None when the statement passes, else what is wrong."""
    try:
        with box.connect(database) as connection:
            answer = session.query(connection, sql, _SHOWN)
    except PgcdpError as error:
        return error.message
    if answer.rows is None:
        return f"gives no rows but {answer.status}: an assertion is a query"
    rows = answer.rows
    if not rows or (answer.count == 1 and len(rows[0]) == 1 and rows[0][0] is True):
        return None
    shown = "; ".join(", ".join(map(str, row)) for row in rows)
    return f"{answer.count} rows: {shown}" + (" ..." if answer.count > len(rows) else "")


def _databases(box: Sandbox) -> list[str]:
    with box.connect() as connection:
        return [each.name for each in session.databases(connection) if each.connectable]


def _default(names: Sequence[str]) -> str:
    plain = [name for name in names if name != "template1"]
    return plain[0] if plain else "postgres"


def _some(lines: Sequence[str]) -> str:
    more = len(lines) - _SHOWN
    return " | ".join(line.strip() for line in lines[:_SHOWN]) + (f" | and {more} more" if more > 0 else "")
