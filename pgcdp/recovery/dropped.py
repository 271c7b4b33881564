"""Which transactions dropped a table, a schema or a database, by the events of the intervals (FORMAT.md 3.7)."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import TargetError
from pgcdp.postgres.relations import PG_NAMESPACE
from pgcdp.records import PREPARED
from pgcdp.recovery.history import Transactions
from pgcdp.recovery.nearest import NEAREST

Lsns = Mapping[int | None, NDArray[np.uint64]]
"""Of intervals: where the transactions ended that are meant, rising."""
HIDDEN_SCHEMAS = ("pg_catalog", "information_schema", "pg_toast")

_WHAT = {"drop_database": "database", "drop_tablespace": "tablespace", "drop_schema": "schema", "drop_table": "table"}

Droppers = Callable[[int | None, frozenset[tuple[int, int]]], NDArray[np.uint64]]
"""(interval, tables): where the transactions ended there that dropped a file of one of these."""


def tables(
    transactions: Transactions,
    own: frozenset[tuple[int, int]],
    parts: frozenset[tuple[int, int]],
    droppers: Droppers,
) -> Lsns:
    """Those that dropped one of the tables `own`: its file, or its row in pg_class where it has none.

    What only dropped partitions or heirs is not among them. Where the row was not known when it was deleted, it is
    taken from `parts`: those of the tables among `own` that have no file.
    """
    ends = {(number, lsn) for number in transactions.numbers for lsn in droppers(number, own).tolist()}
    for at, event in _events(transactions, "drop_table"):
        if (event["database"], event["oid"]) in own:
            ends |= _end(transactions, at, event["xid"])
        elif not event["oid"]:
            inside = frozenset(table for table in parts if table[0] == event["database"])
            if inside:
                ends |= {(n, lsn) for n, lsn in _end(transactions, at, event["xid"]) if lsn in droppers(n, inside)}
    return _by_interval(ends)


def databases(transactions: Transactions, name: str) -> Lsns:
    """Those that dropped a database of a name. Raises TargetError when none of that name was ever known."""
    known = {known for look in transactions.looks() for known in look.databases.values()}
    ends: set[tuple[int | None, int]] = set()
    for at, event in _events(transactions, "drop_database"):
        known.add(event["name"])
        if event["name"] == name:
            ends |= _end(transactions, at, event["xid"])
    if name not in known:
        raise TargetError(f"no database {name} is known", f"there are: {', '.join(sorted(known - {''}))}")
    return _by_interval(ends)


def schemas(
    transactions: Transactions,
    name: str,
    database: str | None,
    tables: Mapping[str, set[tuple[int, int]]],
    droppers: Droppers,
) -> Lsns:
    """Those that dropped a schema of a name, in `database` or any. Raises TargetError when there never was one.

    `tables`: by the schemas that they were in. What no event can tell is taken from what dropped these: where the row
    of a schema was not known when it was deleted, and in databases whose pg_namespace was rewritten, in which WAL is
    not followed.
    """
    known = set(tables)
    own = frozenset(tables.get(name, ()))
    ends: set[tuple[int | None, int]] = set()
    for at, event in _events(transactions, "drop_schema"):
        if database not in (None, event["database_name"]):
            continue
        known.add(event["name"])
        if event["name"] == name:
            ends |= _end(transactions, at, event["xid"])
        elif not event["name"]:
            inside = frozenset(table for table in own if table[0] == event["database"])
            ends |= {(n, lsn) for n, lsn in _end(transactions, at, event["xid"]) if lsn in droppers(n, inside)}
    moved = _moved(transactions)
    unseen = frozenset(table for table in own if table[0] in moved)
    if unseen:
        ends |= {(number, lsn) for number in transactions.numbers for lsn in droppers(number, unseen).tolist()}
    if name not in known and name not in _looked_at(transactions, database):
        raise TargetError(
            f"no schema {name} is known{'' if database is None else f' in database {database}'}",
            _nearest(name, known | _looked_at(transactions, database)),
        )
    return _by_interval(ends)


def objects(transactions: Transactions, number: int | None) -> Iterator[tuple[int, dict[str, str | None]]]:
    """What was dropped in an interval that has no file: (32-bit id of a transaction or subtransaction, what it is)."""
    for event in transactions.happened(number):
        what = _WHAT.get(event["kind"])
        if what is not None and event["name"]:
            name = f"{event['schema']}.{event['name']}" if what == "table" else event["name"]
            yield event["xid"] & 0xFFFFFFFF, {"what": what, "database": event.get("database_name"), "name": name}


def _nearest(name: str, known: set[str]) -> str:
    shown = sorted(each for each in known - set(HIDDEN_SCHEMAS) if each and not each.startswith("pg_"))
    near = difflib.get_close_matches(name, shown, n=NEAREST, cutoff=0.4) or shown[:NEAREST]
    return f"the nearest are: {', '.join(near)}" if near else "there is none"


def _looked_at(transactions: Transactions, database: str | None) -> set[str]:
    look = transactions.look()
    if look is None:
        return set()
    return {name for (oid, _), name in look.schemas.items() if database in (None, look.databases.get(oid))}


def _moved(transactions: Transactions) -> set[int]:
    """Databases whose pg_namespace lies in another file than at first."""
    look = transactions.look()
    relations = look.relations if look is not None else ()
    return {each.database for each in relations if each.oid == PG_NAMESPACE and each.file not in (0, PG_NAMESPACE)}


def _events(transactions: Transactions, kind: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Events of a kind, each with the place of its interval in `transactions.numbers`."""
    for at, number in enumerate(transactions.numbers):
        for event in transactions.happened(number):
            if event["kind"] == kind:
                yield at, event


def _end(transactions: Transactions, at: int, xid: int) -> set[tuple[int | None, int]]:
    """(interval, LSN) where a transaction of 64-bit id `xid`, or the one that it was a part of, ended; empty: nowhere.

    It may have gone on in intervals behind that of its event, the one at place `at`.
    """
    prepared: set[tuple[int | None, int]] = set()
    for number in transactions.numbers[at:]:
        said = transactions.summary(number)
        if said is not None and not (said["count"] and said["min_xid"] <= xid <= said["max_xid"]):
            continue
        commits = transactions.commits(number)
        top = commits.tops().get(xid & 0xFFFFFFFF, xid)
        rows = np.flatnonzero(commits.ends["xid"] == (top if abs(top - xid) < 1 << 31 else xid))
        if len(rows):
            end = commits.ends[rows[-1]]
            if end["status"] != PREPARED:
                return {(number, int(end["lsn"]))}
            prepared = {(number, int(end["lsn"]))}
    return prepared


def _by_interval(ends: set[tuple[int | None, int]]) -> Lsns:
    found: defaultdict[int | None, list[int]] = defaultdict(list)
    for number, lsn in ends:
        found[number].append(lsn)
    return {number: np.array(sorted(lsns), dtype=np.uint64) for number, lsns in found.items()}
