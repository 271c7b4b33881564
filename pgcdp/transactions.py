"""The use cases about transactions: list them, find the one that did something, count what would be lost.

As in `pgcdp.api`, each returns plain values in the shape of docs/json.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pgcdp import logged
from pgcdp.around import end_json, side
from pgcdp.errors import TargetError
from pgcdp.postgres.statements import Deed, deeds_of
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery import losses, search
from pgcdp.recovery.branches import beyond, branch_at, current_branch
from pgcdp.recovery.history import Transactions
from pgcdp.recovery.nearest import dotted_name, split_name
from pgcdp.recovery.search import Known, Wanted
from pgcdp.recovery.source import Source
from pgcdp.units import format_lsn, format_time, parse_lsn

Json = dict[str, Any]


def log(source: Source, *, limit: int | None = 20, behind_lsn: int = 0, branch: int = 0, **wanted: Any) -> Json:
    """Transactions, newest first, as docs/json.md has it; `limit` None: all.

    `behind_lsn`: only those that ended behind it. `branch`: the timeline of another branch than the current one.
    `wanted`: as `_wanted`.
    """

    def look() -> Json:
        transactions = source.transactions(branch=branch)
        meant = replace(_wanted(source, transactions, **wanted), behind_lsn=behind_lsn)
        return _told(transactions, search.listing(transactions, meant, limit))

    found = source.again(look)
    return {**found, "note": logged.add_statements(source, found["transactions"])}


def _wanted(
    source: Source,
    transactions: Transactions,
    *,
    table: str | None = None,
    operation: str | None = None,
    xid: int | None = None,
    since_ns: int | None = None,
    until_ns: int | None = None,
    database: str | None = None,
) -> Wanted:
    """What touched `table` ([SCHEMA.]NAME) or a partition of it, by `operation`, and ended within these times."""
    tables = None
    if database is not None:
        search.check_database(transactions, database)
    if table is not None:
        schema, name = split_name(table)
        tables = Known.of(transactions).tables(name, schema, database)
    return Wanted(
        tables, operation, xid,
        None if since_ns is None else since_ns // 1000, None if until_ns is None else until_ns // 1000,
        database=database,
    )  # fmt: skip


def find(
    source: Source, sql: str, *, newest: bool = False, database: str | None = None, limit: int = 20,
    statements: bool = True, done: bool = False, branch: int = 0,
) -> Json:  # fmt: skip
    """Transactions that did what a statement does, largest share of a table first: as `log`.

    `done`: without those that were rolled back.
    """
    deeds = deeds_of(sql)

    def on(timeline: int) -> Json:
        transactions = source.transactions(branch=timeline)
        found = search.find(transactions, deeds, limit, newest=newest, database=database, done=done)
        return _told(transactions, found)

    def look() -> tuple[Json, str | None]:
        try:
            told = on(branch)
        except TargetError as failure:
            elsewhere = None if branch else _elsewhere(source, on)
            if elsewhere is None:
                raise
            raise TargetError(failure.message, elsewhere) from None
        return told, None if branch or told["total"] else _elsewhere(source, on)

    told, elsewhere = source.again(look)
    said = logged.add_statements(source, told["transactions"], deeds) if statements else None
    return {**told, "note": elsewhere or said}


def before(source: Source, sql: str, branch: int = 0) -> tuple[Target, str | None]:
    """Just before the one transaction that did what a statement does, and its database.

    `branch`: as in `log`. Raises TargetError for no such transaction or several.
    """
    found = find(source, sql, statements=False, done=True, branch=branch)
    there = f" --branch {branch}" if branch else ""
    told = found["transactions"]
    if not told:
        where = f": {found['unseen']}" if found["unseen"] else ""
        hint = found["note"] or f"pgcdp log{there} lists transactions, newest first"
        raise TargetError(f'no transaction did "{sql}"{where}', hint)
    if found["unseen"] or len(told) > 1:
        many = f'{found["total"]} transactions did "{sql}"'
        if found["unseen"]:
            many = f'more than one transaction may have done "{sql}": {found["unseen"]}'
        first, oldest = (f"--target-xid {each['xid']} --exclusive{there}" for each in (told[0], earliest(told)))
        hint = f"choose one, such as {first}"
        if oldest != first:
            hint += f" for the first one listed, {oldest} for the earliest one listed"
        schemas = _schemas(told, deeds_of(sql))
        if len(schemas) > 1:
            hint += f"; or name the schema: {', '.join(schemas)}"
        raise TargetError(many, hint, told, found["total"] - len(told))
    return Target("xid", int(told[0]["xid"]), exclusive=True, branch=branch), told[0]["database"]


def _elsewhere(source: Source, on: Callable[[int], Json]) -> str | None:
    """Which branches that a rewind left have what the current one has not; `on(timeline)` looks there."""
    found = []
    for timeline in source.branches() if source.transactions().rewinds() else ():
        with suppress(TargetError):
            if on(timeline)["total"]:
                found.append(timeline)
    if not found:
        return None
    return f"timeline {', '.join(map(str, found))}, which a rewind has left, has it: --branch {found[-1]}"


def earliest(told: Sequence[Json]) -> Json:
    """Of transactions the one that ended first."""
    return min(told, key=lambda each: (each["write"], parse_lsn(each["lsn"])))


def _schemas(told: Sequence[Json], deeds: Sequence[Deed]) -> list[str]:
    """Tables whose schema a statement does not say, as SCHEMA.NAME."""
    asked = {each.name for each in deeds if each.schema is None}
    tables = [table for each in told for table in each["tables"] if table["name"] in asked]
    return sorted({dotted_name(table["schema"], table["name"]) for table in tables})


def line(told: Json) -> str:
    """A transaction in a few words."""
    return f"xid {told['xid']} at {told['time']}, {', '.join(map(deed, told['tables'])) or 'no table'}"


def deed(table: Json) -> str:
    """What was done to a table in a few words."""
    words = [f"{table[name]} {name}" for name in ("inserted", "updated", "deleted") if table[name]]
    words += [name for name in ("truncated", "dropped", "rewritten") if table[name]]
    name = dotted_name(table["schema"], table["name"])
    part = f" ({table['share']:.0%} of it)" if table["share"] >= 0.005 else ""
    return f"{name}: {', '.join(words) or 'created'}{part}"


def _told(transactions: Transactions, found: search.Found) -> Json:
    history = transactions.history()
    return {
        "transactions": [_as_json(each) for each in found.transactions],
        "total": found.total,
        "unknown": list(history.doubtful),
        "unseen": history.not_indexed(history.doubtful) or None,
        "left_out": transactions.tail().left_out if None in transactions.numbers else 0,
    }


def _as_json(told: Json) -> Json:
    shown = {key: value for key, value in told.items() if key != "time_us"}
    tables = [{**table, "share": round(table["share"], 6)} for table in told["tables"]]
    return {
        **shown, "time": format_time(told["time_us"] * 1000), "lsn": format_lsn(told["lsn"]),
        "share": round(told["share"], 6), "tables": tables, "statement": None,
    }  # fmt: skip


def lost_json(source: Source, point: RecoveryPoint) -> Json:
    """What going back to a point takes from production: {"transactions", "oldest", "newest", "tables"}."""

    def look() -> Json:
        transactions = source.transactions()
        rewinds = transactions.rewinds()
        here = branch_at(point.write, point.lsn, rewinds)
        lost = losses.count(transactions.on(beyond(current_branch(rewinds), here)))
        return {**lost, "oldest": side(lost["oldest"]), "newest": side(lost["newest"])}

    return source.again(look)


def mark_in(source: Source, write: int, interval: int | None) -> str | None:
    """The name of the mark that a write is, as the transaction index of its interval has it."""

    def look() -> str | None:
        known = source.transactions().everywhere()
        events = known.happened(interval) if interval in known.numbers else []
        return next((each["name"] for each in events if each["kind"] == "mark" and each["write"] == write), None)

    return source.again(look)


def wal_in(source: Source, write: int, interval: int | None) -> Json:
    """What WAL a write completed: {"wal": {"from_lsn", "to_lsn"}, "transactions": [...]}, empty when none."""

    def look() -> Json:
        history = source.transactions().everywhere().history()
        if interval not in history.numbers:
            return {}
        commits = history.commits(interval)
        wal = commits.wal()
        rows = wal[wal["write"] == write]
        if not len(rows):
            return {}
        ended = commits.ends[commits.ends["write"] - commits.ends["late"] == write]
        return {
            "wal": {"from_lsn": format_lsn(int(rows["from_lsn"][0])), "to_lsn": format_lsn(int(rows["to_lsn"][-1]))},
            "transactions": [{**end_json(end), "statement": None} for end in ended],
        }

    found = source.again(look)
    logged.add_statements(source, found.get("transactions", []))
    return found
