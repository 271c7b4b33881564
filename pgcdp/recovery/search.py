"""Looking for transactions: by table, operation, xid and time, or by what a statement does."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgcdp.errors import TargetError
from pgcdp.postgres.relations import WITHOUT_FILE
from pgcdp.postgres.statements import Deed
from pgcdp.records import ABORTED, COMMITTED, COMMITTED_PREPARED, PREPARED
from pgcdp.recovery import dropped
from pgcdp.recovery.commits import STATUS, pends
from pgcdp.recovery.dropped import HIDDEN_SCHEMAS, Lsns
from pgcdp.recovery.history import Transactions
from pgcdp.recovery.nearest import nearest
from pgcdp.store.parquet import Ranges
from pgcdp.store.transactions import CREATED, DROPPED, REWRITTEN, TRUNCATED

_KEYS = ("database_oid", "oid", "schema", "name", "database", "parent_oid")
_EVENT_KEYS = ("database", "oid", "schema", "name", "database_name")
_COUNTS = {"insert": "inserted", "update": "updated", "delete": "deleted"}
_FLAGS = {"create": CREATED, "truncate": TRUNCATED, "drop": DROPPED, "rewrite": REWRITTEN}

ANY = 1 << 62
FIRST_USER_OID = 16384
"""FirstNormalObjectId: what initdb made has lower ones."""

Table = tuple[int, int]
"""A relation over all time: OIDs of database and relation."""


@dataclass(frozen=True)
class Wanted:
    """Which transactions are meant. None: any. `tables` must be touched, by `operation` where one is given.

    `instead`: or by one of these operations. `behind_lsn`: only those that ended behind it; `lsns`: those that ended
    there. `done`: not those that were rolled back. `database`: only what was done
    in the database of this name.
    """

    tables: frozenset[Table] | None = None
    operation: str | None = None
    xid: int | None = None
    since_us: int | None = None
    until_us: int | None = None
    behind_lsn: int = 0
    lsns: Lsns | None = None
    instead: tuple[str, ...] = ()
    done: bool = False
    database: str | None = None

    @property
    def operations(self) -> tuple[str, ...]:
        """One of which must have been done; empty: any."""
        return () if self.operation is None else (self.operation, *self.instead)


@dataclass(frozen=True)
class Found:
    """Transactions as the JSON contract has them, and how many more there are."""

    transactions: list[dict[str, Any]]
    total: int


# --- tables by name


@dataclass
class Known:
    """Every table that a look or the index knows: (schema, name, database) to OIDs, and children by parent.

    `without_file`: those that have no file of their own, as a partitioned one.
    """

    names: dict[tuple[str, str, str], set[Table]] = field(default_factory=lambda: defaultdict(set))
    children: dict[Table, set[Table]] = field(default_factory=lambda: defaultdict(set))
    without_file: set[Table] = field(default_factory=set)

    @classmethod
    def of(cls, transactions: Transactions) -> Known:
        """What the newest look and the indexes of all intervals name."""
        known = cls()
        look = transactions.look()
        for each in look.relations if look else ():
            if each.kind in "rpmf":
                assert look is not None
                name = look.databases.get(each.database, "")
                known._take(each.database, each.oid, each.schema, each.name, name, each.parent)
                if each.kind in WITHOUT_FILE:
                    known.without_file.add((each.database, each.oid))
        for number in transactions.numbers:
            for row in transactions.tables(number):
                known._take(*(row[key] for key in _KEYS))
            for event in transactions.happened(number):
                if event["kind"] == "drop_table" and event["oid"]:
                    known._take(*(event[key] for key in _EVENT_KEYS))
        return known

    def _take(self, database_oid: int, oid: int, schema: str, name: str, database: str, parent: int = 0) -> None:
        self.names[schema, name, database].add((database_oid, oid))
        if parent:
            self.children[database_oid, parent].add((database_oid, oid))

    def family(self, tables: Iterable[Table]) -> frozenset[Table]:
        """The tables, their partitions and heirs."""
        found: set[Table] = set()
        waiting = list(tables)
        while waiting:
            table = waiting.pop()
            if table not in found:
                found.add(table)
                waiting += self.children.get(table, ())
        return frozenset(found)

    def tables(self, name: str, schema: str | None, database: str | None) -> frozenset[Table]:
        """The tables of a name, as `named`, with their partitions and heirs."""
        return self.family(self.named(name, schema, database))

    def named(self, name: str, schema: str | None, database: str | None) -> frozenset[Table]:
        """The tables of a name, without a schema those of all: whose search path was meant, nobody knows.

        Raises TargetError with the nearest names when there never was one.
        """
        found: set[Table] = set()
        for key, tables in self.names.items():
            if key[1] == name and schema in (None, key[0]) and database in (None, key[2]):
                found |= tables
        if not found:
            raise TargetError(f"no table {_dotted(schema, name)} is known{_where(database)}", self._nearest(name))
        return frozenset(found)

    def by_schema(self, database: str | None) -> Mapping[str, set[Table]]:
        """All tables, by the schemas that they were in."""
        found: defaultdict[str, set[Table]] = defaultdict(set)
        for (schema, _, place), tables in self.names.items():
            if database in (None, place):
                found[schema] |= tables
        return found

    def _nearest(self, name: str) -> str:
        near = nearest(name, {key[:2] for key in self.names if key[0] not in HIDDEN_SCHEMAS})
        return f"the nearest are: {', '.join(near)}" if near else "there is none"


def _dotted(schema: str | None, name: str) -> str:
    return name if schema is None else f"{schema}.{name}"


def _where(database: str | None) -> str:
    return "" if database is None else f" in database {database}"


def check_database(transactions: Transactions, name: str) -> None:
    """Raises TargetError when no database of that name was ever known."""
    now = transactions.look()
    looks = [*transactions.looks(), *([] if now is None else [now])]
    known = {each for look in looks for each in look.databases.values()}
    known |= {row["database"] for number in transactions.numbers for row in transactions.tables(number)}
    if name not in known:
        raise TargetError(f"no database {name} is known", f"there are: {', '.join(sorted(known - {''}))}")


# --- the listing


def listing(transactions: Transactions, wanted: Wanted, limit: int | None) -> Found:
    """What is wanted, newest first; `limit` None: all of it."""
    told: list[dict[str, Any]] = []
    total = 0
    for number in reversed(transactions.numbers):
        if not _may_hold(transactions, number, wanted):
            continue
        lsns = _matching(transactions, number, wanted)[0]
        total += len(lsns)
        rest = len(lsns) if limit is None else limit - len(told)
        if rest:
            told += tell(transactions, number, lsns[::-1][:rest], wanted.tables)
    return Found(told, total)


def by_share(transactions: Transactions, wanted: Wanted, limit: int) -> Found:
    """What is wanted, largest share of a table first; what was rolled back comes last."""
    found = _by_share(transactions, wanted, limit)
    if wanted.done or all(each["status"] != STATUS[ABORTED] for each in found.transactions):
        return found
    done = _by_share(transactions, replace(wanted, done=True), limit).transactions
    undone = [each for each in found.transactions if each["status"] == STATUS[ABORTED]]
    return Found([*done, *undone][:limit], found.total)


def _by_share(transactions: Transactions, wanted: Wanted, limit: int) -> Found:
    best: list[tuple[float, int, int, int | None]] = []
    total = 0
    for order, number in enumerate(transactions.numbers):
        if not _may_hold(transactions, number, wanted):
            continue
        lsns, shares = _matching(transactions, number, wanted)
        total += len(lsns)
        top = np.argsort(shares, kind="stable")[-limit:]
        rows = [(float(shares[row]), order, int(lsns[row]), number) for row in top.tolist()]
        best = heapq.nlargest(limit, [*best, *rows], key=lambda row: row[:3])
    told: dict[tuple[int | None, int], dict[str, Any]] = {}
    for number in {row[3] for row in best}:
        wanted_lsns = np.array([row[2] for row in best if row[3] == number], dtype=np.uint64)
        for each, lsn in zip(
            tell(transactions, number, np.sort(wanted_lsns)[::-1], wanted.tables),
            np.sort(wanted_lsns)[::-1],
            strict=True,
        ):
            told[number, int(lsn)] = each
    return Found([told[number, lsn] for _, _, lsn, number in best], total)


def _may_hold(transactions: Transactions, number: int | None, wanted: Wanted) -> bool:
    """Whether an interval can have something that is wanted, by what is said of it as a whole."""
    if not _in_time(transactions.summary(number), wanted):
        return False
    if wanted.lsns is not None:
        return number in wanted.lsns
    if wanted.tables is None:
        return True
    for row in transactions.tables(number):
        if (row["database_oid"], row["oid"]) not in wanted.tables:
            continue
        done = (row.get(_COUNTS.get(each, "")) or row["flags"] & _FLAGS.get(each, 0) for each in wanted.operations)
        if wanted.operation is None or any(done):
            return True
    return False


def _in_time(said: Mapping[str, Any] | None, wanted: Wanted) -> bool:
    if said is None:
        return True
    if not said["count"] or said["max_lsn"] <= wanted.behind_lsn:
        return False
    return not (
        (wanted.since_us is not None and said["max_time_us"] < wanted.since_us)
        or (wanted.until_us is not None and said["min_time_us"] > wanted.until_us)
    )


def _matching(
    transactions: Transactions, number: int | None, wanted: Wanted
) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """LSNs of the transactions of an interval that are wanted, rising, and the share of the table that each touched."""
    columns = ["lsn", "rows", "inserted", "updated", "deleted", "flags", "relation_oid", "database_oid"]
    columns += ["status"] if wanted.done else []
    columns += ["database"] if wanted.database is not None else []
    columns += ["xid", "subxids"] if wanted.xid is not None else []
    columns += ["time_us"] if (wanted.since_us, wanted.until_us) != (None, None) else []
    table = transactions.table(number, columns, _ranges(wanted, number))
    values = {name: table.column(name).to_numpy() for name in columns if name != "subxids"}
    kept = np.ones(len(table), dtype=np.bool_)
    if wanted.lsns is not None:
        kept &= np.isin(values["lsn"], wanted.lsns[number])
    if wanted.tables is not None:
        key = values["database_oid"].astype(np.uint64) << np.uint64(32) | values["relation_oid"]
        kept &= np.isin(key, np.array([d << 32 | r for d, r in wanted.tables], dtype=np.uint64))
    elif wanted.operations:  # nobody means what every DDL does to the catalogs
        kept &= (values["relation_oid"] >= FIRST_USER_OID) | (values["relation_oid"] == 0)
    if wanted.operations:
        kept &= np.logical_or.reduce([_did(values, each) for each in wanted.operations])
    if wanted.database is not None:
        kept &= values["database"] == wanted.database
    if wanted.done:
        kept &= np.isin(values["status"], (COMMITTED, COMMITTED_PREPARED, PREPARED))
    if wanted.behind_lsn:
        kept &= values["lsn"] > wanted.behind_lsn
    if wanted.xid is not None:
        kept &= _is_xid(table, values["xid"], wanted.xid)
    if wanted.since_us is not None:
        kept &= values["time_us"] >= wanted.since_us
    if wanted.until_us is not None:
        kept &= values["time_us"] <= wanted.until_us
    rows = np.flatnonzero(kept)
    lsns = values["lsn"][rows]
    shares = share(
        {name: column[rows] for name, column in values.items()}, None if wanted.instead else wanted.operation
    )
    if not len(rows):
        return lsns, shares
    starts = np.flatnonzero(np.append(True, lsns[1:] != lsns[:-1]))
    return lsns[starts], np.maximum.reduceat(shares, starts)


def _did(values: Mapping[str, NDArray[Any]], operation: str) -> NDArray[np.bool_]:
    done = values[_COUNTS[operation]] if operation in _COUNTS else values["flags"] & _FLAGS[operation]
    return np.asarray(done > 0)


def _ranges(wanted: Wanted, number: int | None) -> Ranges:
    """What rows that are wanted have in common, roughly."""
    found: dict[str, list[tuple[int, int]]] = {}
    if wanted.lsns is not None:
        found["lsn"] = [(lsn, lsn) for lsn in wanted.lsns[number].tolist()]
    if wanted.tables is not None:
        found["relation_oid"] = [(oid, oid) for _, oid in wanted.tables]
    if wanted.operation is not None and not wanted.instead:
        found[_COUNTS.get(wanted.operation, "flags")] = [(1, ANY)]
    if wanted.since_us is not None or wanted.until_us is not None:
        found["time_us"] = [(wanted.since_us or -ANY, ANY if wanted.until_us is None else wanted.until_us)]
    return found


def _is_xid(table: pa.Table, xids: NDArray[np.uint64], xid: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = xids == xid if xid >> 32 else (xids & np.uint64(0xFFFFFFFF)) == xid
    lists = table.column("subxids").combine_chunks()
    if not found.any() and len(lists.flatten()):
        inside = pc.list_parent_indices(lists).to_numpy()[lists.flatten().to_numpy() == xid & 0xFFFFFFFF]
        found |= np.isin(np.arange(len(table)), inside)
    return found


def share(values: Mapping[str, NDArray[Any]], operation: str | None) -> NDArray[np.float64]:
    """The part of a table's rows that was touched, 0 to 1: all of it when it was truncated, dropped or rewritten."""
    rows = values["rows"].astype(np.float64)
    counts = ("updated", "deleted") if operation is None else (_COUNTS.get(operation, "deleted"),)
    touched = np.sum([values[name] for name in counts], axis=0).astype(np.float64)
    inserted = values["inserted"].astype(np.float64) if operation == "insert" else 0.0
    whole = np.maximum(rows + inserted, touched)
    part = np.divide(touched, whole, out=np.zeros_like(rows), where=touched > 0)
    return np.where((values["flags"] & (TRUNCATED | DROPPED)) > 0, 1.0, part)


# --- telling


def tell(
    transactions: Transactions, number: int | None, lsns: NDArray[np.uint64], tables: frozenset[Table] | None = None
) -> list[dict[str, Any]]:
    """Transactions of an interval in the order of `lsns`, as the JSON contract has them (LSNs and times as numbers)."""
    table = transactions.table(number, within={"lsn": [(lsn, lsn) for lsn in lsns.tolist()]})
    mask = np.isin(table.column("lsn").to_numpy(), lsns)
    found: dict[int, dict[str, Any]] = {}
    parts: dict[int, dict[str, Any]] = {}
    for row in table.filter(pa.array(mask)).to_pylist():
        told = found.setdefault(
            row["lsn"],
            {
                "xid": row["xid"],
                "status": STATUS[row["status"]],
                "time_us": row["time_us"],
                "lsn": row["lsn"],
                "write": row["write"],
                "timeline": row["timeline"],
                "interval": number,
                "database": row["database"],
                "tables": [],
                "objects": [],
                "share": 0.0,
            },
        )
        if told["status"] == STATUS[COMMITTED]:
            parts.update(dict.fromkeys((row["xid"] & 0xFFFFFFFF, *row["subxids"]), told))
        if row["name"] is None:
            continue
        key = row["database_oid"], row["relation_oid"]
        if row["schema"] in HIDDEN_SCHEMAS and (tables is None or key not in tables):
            continue
        part = float(
            share({name: np.array([row[name]]) for name in ("rows", "inserted", "updated", "deleted", "flags")}, None)[
                0
            ]
        )
        told["share"] = max(told["share"], part)
        told["tables"].append(_told_table(row, part))
    for xid, gone in dropped.objects(transactions, number):
        if xid in parts:
            parts[xid]["objects"].append(gone)
    return [found[int(lsn)] for lsn in lsns]


def _told_table(row: Mapping[str, Any], part: float) -> dict[str, Any]:
    flags = row["flags"]
    return {
        "database": row["database"], "schema": row["schema"], "name": row["name"], "inserted": row["inserted"],
        "updated": row["updated"], "deleted": row["deleted"], "truncated": bool(flags & TRUNCATED),
        "dropped": bool(flags & DROPPED), "rewritten": bool(flags & REWRITTEN), "rows": row["rows"], "share": part,
    }  # fmt: skip


# --- statements


def find(
    transactions: Transactions, deeds: Sequence[Deed], limit: int, *, newest: bool,
    database: str | None = None, done: bool = False,
) -> Found:  # fmt: skip
    """The transactions that did all of `deeds`, largest share of a table first, or `newest` first.

    `done`: without those that were rolled back. One that was prepared and has ended since is there once, with its end.
    Raises TargetError when a table, a schema or `database` never existed.
    """
    if database is not None:
        check_database(transactions, database)
    known = Known.of(transactions)
    wanted = [replace(_wanted(transactions, known, deed, database), done=done) for deed in deeds]
    if len(wanted) == 1:
        found = (listing if newest else by_share)(transactions, wanted[0], limit)
    else:
        found = _all_of(transactions, wanted, limit, newest=newest)
    history = transactions.history()
    kept = [each for each in found.transactions if each["status"] != STATUS[PREPARED] or pends(each["xid"], history)]
    return Found(kept, found.total - len(found.transactions) + len(kept))


def _wanted(transactions: Transactions, known: Known, deed: Deed, database: str | None) -> Wanted:
    if deed.operation == "drop database":
        return Wanted(lsns=dropped.databases(transactions, deed.name))
    if deed.operation not in ("drop", "drop schema"):
        tables = known.tables(deed.name, deed.schema, database)
        return Wanted(tables, deed.operation, instead=tuple(deed.instead))

    def droppers(number: int | None, tables: frozenset[Table]) -> NDArray[np.uint64]:
        drop = Wanted(tables, "drop")
        none = np.empty(0, dtype=np.uint64)
        return _matching(transactions, number, drop)[0] if _may_hold(transactions, number, drop) else none

    if deed.operation == "drop":
        own = known.named(deed.name, deed.schema, database)
        parts = known.family(own & known.without_file)
        return Wanted(lsns=dropped.tables(transactions, own, parts, droppers))
    return Wanted(lsns=dropped.schemas(transactions, deed.name, database, known.by_schema(database), droppers))


def _all_of(transactions: Transactions, wanted: Sequence[Wanted], limit: int, *, newest: bool) -> Found:
    told = []
    for number in reversed(transactions.numbers):
        if not all(_may_hold(transactions, number, each) for each in wanted):
            continue
        common: NDArray[np.uint64] | None = None
        for each in wanted:
            lsns = _matching(transactions, number, each)[0]
            common = lsns if common is None else np.intersect1d(common, lsns)
        if common is not None and len(common):
            told += tell(transactions, number, common[::-1], frozenset().union(*(w.tables or () for w in wanted)))
    if not newest:
        told.sort(key=lambda each: -each["share"])
    return Found(told[:limit], len(told))
