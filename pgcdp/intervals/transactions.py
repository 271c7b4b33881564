"""The transaction index of an interval: what each transaction did to which table (FORMAT.md 3.5, 3.7).

It is made of the interval's own files and of what the interval before left, so it can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.intervals.events import durable_write, events_of, full_xid
from pgcdp.intervals.names import IN, DatabaseNames, Names, Naming, database_names, name_changes
from pgcdp.intervals.readout import Readout
from pgcdp.postgres.relations import FIRST_NORMAL, CatalogReader, Look, Relation
from pgcdp.postgres.wal import Note, timeline_of
from pgcdp.store.transactions import CREATED, DROPPED, END_COLUMNS, REWRITTEN, SCHEMA, TRUNCATED

POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01 UTC in microseconds since 1970."""
TABLE_KINDS = "rpmf"
"""Kinds of relations that are tables to users; indexes, sequences and TOAST tables are not listed."""

_FILE_CREATED, _FILE_DROPPED = 1, 2


@dataclass(frozen=True)
class Past:
    """What is known of the time before the writes that are read: a look, and records since the last redo point."""

    look: Look | None = None
    notes: Sequence[Note] = ()


class TransactionIndex:
    """The index of what was read. `later`: a later look than the past's; `next_xid` (64 bits) is near its xids.

    Each part is made when it is first asked for: who asks where transactions ended waits for no names of relations.
    """

    def __init__(self, readout: Readout, past: Past, later: Look | None, next_xid: int) -> None:
        self.next_xid = next_xid
        self._past = past
        self._later = later
        self._readout = replace(readout, ends=with_timelines(readout.ends, [*past.notes, *readout.notes]))

    @property
    def wal(self) -> NDArray[np.void]:
        """Array WAL_WRITE."""
        return self._readout.wal

    @property
    def left_out(self) -> int:
        """As in `Readout`."""
        return self._readout.left_out

    @cached_property
    def ends(self) -> pa.Table:
        """A row for each transaction, with the columns END_COLUMNS of the index."""
        ends = self._readout.ends
        durable = durable_write(self._readout, ends["lsn"], ends["write"])
        return _as_table({
            "lsn": ends["lsn"],
            "length": (ends["end_lsn"] - ends["lsn"]).astype(np.uint32),
            "write": durable,
            "late": (durable - ends["write"]).astype(np.uint16),
            "begin_at": ends["begin_at"],
            "end_at": ends["end_at"],
            "time_us": ends["time_us"] + POSTGRES_EPOCH_US,
            "xid": full_xid(ends["xid"], self.next_xid),
            "timeline": ends["timeline"],
            "status": ends["status"].astype(np.uint8),
            "back": np.where(ends["first_lsn"] > 0, ends["lsn"] - ends["first_lsn"], 0),
            "subxids": _subxids(self._readout),
        })  # fmt: skip

    @cached_property
    def table(self) -> pa.Table:
        """The index: SCHEMA."""
        names, rows = self._names, self._rows
        listed = names.relations or [Relation(0, 0, "", "", "", 0)]
        known = rows.relation >= 0
        at = np.where(known, rows.relation, 0)
        oid, of_database, parent = (
            np.array([getattr(each, name) for each in listed], dtype=np.int64)[at] * known
            for name in ("oid", "database", "parent")
        )
        of = self._readout.ends[rows.end]
        database = np.where(known & (of_database > 0), of_database, of["database"])
        ends = self.ends.take(pa.array(rows.end))
        return _as_table({
            **{name: ends.column(name) for name in END_COLUMNS},
            "database_oid": database.astype(np.uint32),
            "relation_oid": oid,
            "database": _database_names(database, of["lsn"], self._databases),
            "schema": _named([each.schema for each in listed], at, known),
            "name": _named([each.name for each in listed], at, known),
            "kind": _named([each.kind for each in listed], at, known),
            "parent_oid": parent.astype(np.uint32),
            "rows": self._sizes[0],
            "inserted": rows.inserted,
            "updated": rows.updated,
            "deleted": rows.deleted,
            "flags": rows.flags,
        })  # fmt: skip

    @cached_property
    def tables(self) -> list[dict[str, Any]]:
        """The tables that are in the index, and by what they were touched (FORMAT.md 3.7)."""
        return _tables(self._rows, self._names, self._databases.now())

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened besides (FORMAT.md 3.7)."""
        return self._events[0]

    @property
    def pending(self) -> list[Note]:
        """Records that the events of the next interval may follow from."""
        return self._events[1]

    @cached_property
    def look(self) -> Look | None:
        """The catalogs at the end."""
        return with_sizes(self._names.look, self._sizes[1])

    @cached_property
    def _reader(self) -> CatalogReader:
        reader = CatalogReader()
        for known in (self._past.look, self._later):
            if known is not None:
                reader.know(known)
        for note in (*self._past.notes, *self._readout.notes):
            reader.take(note)
        return reader

    @cached_property
    def _naming(self) -> Naming:
        return Naming.of(self._readout, self._reader)

    @cached_property
    def _databases(self) -> DatabaseNames:
        return database_names(self._reader, self._naming, self._past.look, self._later)

    @cached_property
    def _names(self) -> Names:
        return name_changes(self._readout, self._reader, self._naming, self._databases, self._past.look, self._later)

    @cached_property
    def _rows(self) -> _Rows:
        return _rows(self._readout, self._names)

    @cached_property
    def _sizes(self) -> tuple[NDArray[np.int64], dict[tuple[int, int], int]]:
        return table_sizes(self._readout, self._rows, self._names, self._past.look, self._later)

    @cached_property
    def _events(self) -> tuple[list[dict[str, Any]], list[Note]]:
        return events_of(self._readout, self._reader, self._databases.at, self._past.look, self._later, self.next_xid)


def with_timelines(ends: NDArray[np.void], notes: Sequence[Note]) -> NDArray[np.void]:
    """Ends with the timeline that was the newest one when they were written.

    The page that a new timeline begins in keeps the old one's number in its header.
    """
    said = [(note.lsn, timeline) for note in notes if (timeline := timeline_of(note)) is not None]
    if not said:
        return ends
    lsns, timelines = (np.array(column) for column in zip(*said, strict=True))
    at = np.searchsorted(lsns, ends["lsn"], side="right") - 1
    told = ends.copy()
    told["timeline"] = np.where(at >= 0, np.maximum(timelines[at], ends["timeline"]), ends["timeline"])
    return told


# --- rows


@dataclass
class _Rows:
    """Rows of the index before they are a table: for each the end it belongs to, a relation's number or -1, counts.

    `moved`: how many of the updated ones went to another partition.
    """

    end: NDArray[np.int64]
    relation: NDArray[np.int64]
    inserted: NDArray[np.uint64]
    updated: NDArray[np.uint64]
    deleted: NDArray[np.uint64]
    moved: NDArray[np.uint64]
    flags: NDArray[np.uint8]


def table_sizes(
    readout: Readout, rows: _Rows, names: Names, before: Look | None, after: Look | None
) -> tuple[NDArray[np.int64], dict[tuple[int, int], int]]:
    """How many rows the table of each row had just before the transaction, and what each table has at the end.

    Counted from what the look before says, from nothing when the table was made here, else from the later look.
    """
    ends = readout.ends
    oids = np.array([each.database << 32 | each.oid for each in names.relations] or [0], dtype=np.int64)[rows.relation]
    oids = np.where(rows.relation >= 0, oids, -1)
    known = {(each.database, each.oid): each.rows for each in (before.relations if before else ())}
    later = {(each.database, each.oid): each.rows for each in (after.relations if after else ())}
    committed = np.isin(ends["status"], IN)[rows.end]
    gone = rows.deleted + rows.moved
    net = np.where(committed, rows.inserted.astype(np.int64) - gone.astype(np.int64), 0)
    emptied = (rows.flags & (CREATED | DROPPED | TRUNCATED)) > 0
    sizes = np.zeros(len(oids), dtype=np.int64)
    now: dict[tuple[int, int], int] = {}
    order = np.argsort(oids, kind="stable")
    changed = np.flatnonzero(oids[order][1:] != oids[order][:-1]) + 1
    for here in np.split(order, changed) if len(order) else []:
        if oids[here[0]] < 0:
            continue
        table = int(oids[here[0]]) >> 32, int(oids[here[0]]) & 0xFFFFFFFF
        base = known.get(table)
        if base is None:
            base = 0 if rows.flags[here[0]] & CREATED else later.get(table, 0)
            seen = ends["lsn"][rows.end[here]] < (after.lsn if after else 0)
            base = max(0, base - int(net[here][seen].sum())) if not rows.flags[here[0]] & CREATED else base
        for piece in np.split(here, np.flatnonzero(emptied[here])):
            if len(piece) and emptied[piece[0]]:
                sizes[piece[0]], base = base, int(net[piece[0]]) if net[piece[0]] > 0 else 0
                piece = piece[1:]
            if len(piece):
                after_each = base + np.cumsum(net[piece])
                sizes[piece] = after_each - net[piece]
                base = int(after_each[-1])
        now[table] = max(0, base)
    return np.maximum(sizes, 0), now


def with_sizes(look: Look | None, sizes: dict[tuple[int, int], int]) -> Look | None:
    """A look with the numbers of rows that are known now."""
    if look is None:
        return None
    relations = [
        replace(each, rows=sizes[each.database, each.oid]) if (each.database, each.oid) in sizes else each
        for each in look.relations
    ]
    return replace(look, relations=tuple(relations))


def _tables(rows: _Rows, names: Names, databases: Mapping[int, str]) -> list[dict[str, Any]]:
    """Each table that was touched, and by what: so that who looks for one knows whether to look here."""
    found = []
    for number in np.unique(rows.relation[rows.relation >= 0]).tolist():
        relation, here = names.relations[number], rows.relation == number
        found.append(
            {
                "database_oid": relation.database,
                "oid": relation.oid,
                "database": databases.get(relation.database, f"database {relation.database}"),
                "schema": relation.schema,
                "name": relation.name,
                "parent_oid": relation.parent,
                **{name: int(getattr(rows, name)[here].sum()) for name in ("inserted", "updated", "deleted")},
                "flags": int(np.bitwise_or.reduce(rows.flags[here])),
            }
        )
    return found


def _rows(readout: Readout, names: Names) -> _Rows:
    """One row for each transaction and table, or for a transaction alone that touched none."""
    ends, changes = readout.ends, readout.changes
    end = np.repeat(np.arange(len(ends)), ends["changes"])
    counted = (changes["inserted"] | changes["updated"] | changes["deleted"]) > 0
    code = names.code.copy()
    for row in np.flatnonzero((code < 0) & counted).tolist():
        code[row] = _unknown(names, changes[row])
    listed = np.array([each.kind in TABLE_KINDS or each.kind == "?" for each in names.relations] or [False])
    kept = np.flatnonzero((code >= 0) & listed[np.maximum(code, 0)])
    groups: dict[tuple[int, int, str], int] = {}  # a table under another name is the same table
    group_of = [groups.setdefault((each.database, each.oid, "" if each.oid else each.name), len(groups))
                for each in names.relations] or [0]  # fmt: skip
    group = np.array(group_of)[np.maximum(code, 0)]
    order = kept[np.lexsort((code[kept], group[kept], end[kept]))]
    group = group[order]
    end, code, changes, transient = end[order], code[order], changes[order], names.transient[order]
    if len(order):
        starts = np.flatnonzero(np.append(True, (end[1:] != end[:-1]) | (group[1:] != group[:-1])))
        last = np.append(starts[1:], len(order)) - 1
        sums = {name: np.add.reduceat(changes[name], starts) for name in ("updated", "deleted", "moved")}
        updated, deleted = sums["updated"] + sums["moved"], sums["deleted"] - sums["moved"]
        made = (changes["flags"] & _FILE_CREATED) > 0
        inserted = np.add.reduceat(np.where(transient & made, np.uint64(0), changes["inserted"]), starts)
        committed = np.isin(ends["status"][end[starts]], IN)
        flags = np.where(committed, _flags(changes, transient, starts), 0).astype(np.uint8)
        own = np.array([0 < each.oid < FIRST_NORMAL for each in names.relations])[code[last]]
        flags[own] &= ~np.uint8(CREATED)  # a new database has the catalogs of its template
        touched = _Rows(end[starts], code[last], inserted, updated, deleted, sums["moved"], flags)
        seen = (touched.inserted | touched.updated | touched.deleted | touched.flags) > 0
    else:
        none = np.empty(0, dtype=np.uint64)
        touched = _Rows(end, code, none, none, none, none, none.astype(np.uint8))
        seen = np.empty(0, dtype=np.bool_)
    bare = np.setdiff1d(np.arange(len(ends)), touched.end[seen])
    zeros = np.zeros(len(bare), dtype=np.uint64)
    alone = _Rows(bare, np.full(len(bare), -1), zeros, zeros, zeros, zeros, zeros.astype(np.uint8))
    joined = _Rows(
        *(np.concatenate([getattr(touched, name)[seen], getattr(alone, name)]) for name in _Rows.__dataclass_fields__)
    )
    order = np.argsort(joined.end, kind="stable")
    return _Rows(*(getattr(joined, name)[order] for name in _Rows.__dataclass_fields__))


def _unknown(names: Names, change: np.void) -> int:
    """A file that no look and no record named."""
    place = "/".join(str(int(change[name])) for name in ("tablespace", "database", "file"))
    relation = Relation(int(change["database"]), 0, "", place, "?", 0)
    if relation not in names.relations[-64:]:
        names.relations.append(relation)
    return len(names.relations) - 1 - names.relations[::-1].index(relation)


def _flags(changes: NDArray[np.void], transient: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """What became of a table, by its files: a new one beside the old one is TRUNCATE, or a rewrite.

    In another tablespace it is a copy of the old one. A file that was cut is nothing: VACUUM does that to its free end,
    and TRUNCATE only to a table that the same transaction has made.
    """
    files = changes["flags"]

    def any_of(rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.logical_or.reduceat(rows, starts)

    both = (files & (_FILE_CREATED | _FILE_DROPPED)) == (_FILE_CREATED | _FILE_DROPPED)
    made = any_of(((files & _FILE_CREATED) > 0) & ~both)
    gone = any_of(((files & _FILE_DROPPED) > 0) & ~both)
    into, out_of = (
        np.maximum.reduceat(np.where(((files & flag) > 0) & ~both, changes["tablespace"], 0), starts)
        for flag in (_FILE_CREATED, _FILE_DROPPED)
    )
    rewritten = any_of(transient) | (made & gone & (into != out_of))
    found: NDArray[np.int64] = (
        REWRITTEN * rewritten
        + TRUNCATED * (~rewritten & made & gone)
        + DROPPED * (~rewritten & gone & ~made)
        + CREATED * (~rewritten & made & ~gone)
    )
    return found


def _as_table(columns: dict[str, Any]) -> pa.Table:
    """A table of some columns of SCHEMA, with their types."""
    return pa.table(columns, schema=pa.schema([SCHEMA.field(name) for name in columns]))


def _named(
    names: Sequence[str | None], at: NDArray[np.int64], known: NDArray[np.bool_] | None = None
) -> pa.DictionaryArray:
    """Strings by number; equal names become one."""
    unique: dict[str, int] = {}
    codes = np.array([-1 if name is None else unique.setdefault(name, len(unique)) for name in names], dtype=np.int32)
    indices = codes[at]
    wrong = indices < 0 if known is None else (indices < 0) | ~known
    return pa.DictionaryArray.from_arrays(pa.array(indices, mask=wrong), pa.array(list(unique), pa.string()))


def _database_names(oids: NDArray[np.int64], lsns: NDArray[np.uint64], databases: DatabaseNames) -> pa.DictionaryArray:
    names: list[str | None] = []
    code = np.zeros(len(oids), dtype=np.int64)
    for oid in np.unique(oids).tolist():
        here = oids == oid
        commits, called = databases.called(oid)
        code[here] = len(names) + np.searchsorted(np.array(commits, dtype=np.uint64), lsns[here])
        names += [name or f"database {oid}" if oid else None for name in called]
    return _named(names, code)


def _subxids(readout: Readout) -> pa.ListArray:
    """The list of each end."""
    offsets = np.concatenate([[0], np.cumsum(readout.ends["subxids"])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(readout.subxids))
