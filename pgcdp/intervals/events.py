"""What else WAL says in an interval (FORMAT.md 3.7): restore points, marks, what was dropped, what was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.intervals.readout import Readout
from pgcdp.log import get
from pgcdp.postgres import wal
from pgcdp.postgres.relations import CatalogReader, Look, SchemaDrop
from pgcdp.postgres.wal import PAGE, Manager, Note

log = get(__name__)

DatabaseAt = Callable[[int, int], str | None]

NAMELESS = {"oid": 0, "schema": "", "name": ""}
PENDING = 10_000
"""Records of transactions that have not ended which are kept for the next interval."""


def durable_write(readout: Readout, lsn: NDArray[np.uint64], write: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """With which write recovery finds the records that begin at `lsn` and became whole with these writes."""
    wal = readout.wal
    if not len(wal):
        return write
    at = np.minimum(np.searchsorted(wal["to_lsn"], lsn, side="right"), len(wal) - 1)
    return np.where(wal["write"][at] == write, wal["durable"][at], write)


def full_xid(xid: NDArray[np.uint32], next_xid: int) -> NDArray[np.uint64]:
    """64-bit transaction ids of 32-bit ones that lie less than 2^31 away from `next_xid`."""
    away = (xid.astype(np.uint32) - np.uint32(next_xid & 0xFFFFFFFF)).view(np.int32)
    return (np.int64(next_xid) + away).astype(np.uint64)


def events_of(
    readout: Readout,
    reader: CatalogReader,
    database_at: DatabaseAt,
    before: Look | None,
    after: Look | None,
    next_xid: int,
) -> tuple[list[dict[str, Any]], list[Note]]:
    """The events of what was read, and the records that those of the next interval may follow from.

    `reader` has taken the readout's records, and those of the time before. `database_at`: the name of a database by OID
    and LSN. `before`, `after`: looks at the catalogs.
    """
    drops = name_drops(reader.schema_drops, {note.lsn for note in readout.notes}, before, after)
    events = _Events(readout, reader, database_at, next_xid, drops)
    found = [event for note in readout.notes for event in events.of(note)]
    return found, events.pending()


def name_drops(
    drops: dict[int, SchemaDrop], lsns: set[int], before: Look | None, after: Look | None
) -> dict[int, SchemaDrop]:
    """The drops of schemas at `lsns`. A row that was not known is that of the one schema that a later look lacks."""
    found = {lsn: drop for lsn, drop in drops.items() if lsn in lsns}
    if before is None or after is None:
        return found
    for database in {drop.database for drop in found.values()}:
        missing = {key: name for key, name in before.schemas.items() if key[0] == database and key not in after.schemas}
        known = {(database, drop.schema) for drop in drops.values() if drop.database == database}
        candidates = [(key, name) for key, name in missing.items() if key not in known]
        nameless = [lsn for lsn, drop in found.items() if drop.database == database and not drop.name]
        if len(candidates) == len(nameless) == 1:
            (_, schema), name = candidates[0]
            found[nameless[0]] = replace(found[nameless[0]], schema=schema, name=name)
    return found


class _Events:
    """Makes events of records. What a database or tablespace loses first may lie in records of an earlier interval."""

    def __init__(
        self,
        readout: Readout,
        reader: CatalogReader,
        database_at: DatabaseAt,
        next_xid: int,
        drops: dict[int, SchemaDrop],
    ) -> None:
        self.readout = readout
        self.reader = reader
        self.database_at = database_at
        self.next_xid = next_xid
        self.drops = drops
        self.invalidated: dict[int, Note] = {}
        for note, database in reader.inplace:
            self.invalidated.setdefault(database, note)

    def of(self, note: Note) -> Iterator[dict[str, Any]]:
        """The events of one record."""
        if note.rmid == Manager.MARK:
            yield {"kind": "mark", "name": note.body.decode("utf-8", "replace"), "write": note.write, "lsn": None}
        if note.rmid == Manager.LOST and note.lsn >= note.end_lsn:
            # WAL went back, on a later timeline: its first records may be in the page in front of where reading goes
            # on, whose header still says the old one.
            note = replace(note, lsn=note.end_lsn - PAGE)
        for said in self._said(note):
            yield {
                **said,
                **self._place(note),
                "end_lsn": note.end_lsn,
                "end_at": note.end_at,
                "timeline": note.timeline,
            }

    def pending(self) -> list[Note]:
        """Of databases that are invalid, and of transactions that delete such a row, or name relations, and run on."""
        running = set(self.readout.running.tolist())
        begun = [*self.reader.dropping.values(), *self.reader.emptying.values()]
        kept = {note.lsn: note for note in begun if note.xid in running}
        for xid in running & self.reader.naming.keys():
            kept.update((note.lsn, note) for page in self.reader.naming[xid].values() for note in page)
        if len(kept) > PENDING:
            log.warning(
                "transactions that have not ended changed the catalogs in %d records: names may be lost", len(kept)
            )
        newest = sorted(kept.values(), key=lambda note: note.lsn)[-PENDING:]
        return [*self.invalidated.values(), *newest]

    def _said(self, note: Note) -> Iterator[dict[str, Any]]:
        reader = self.reader
        if note.rmid == Manager.LOST:
            yield {"kind": "lost"}
        if (name := wal.restore_point(note)) is not None:
            yield {"kind": "restore_point", "name": name}
        if (message := wal.message(note)) is not None:
            yield {"kind": "mark", "name": message[1], "xid": self._xid(note) if message[0] else 0}
        if (drop := self.drops.get(note.lsn)) is not None:
            told = {"database": drop.database, "database_name": self.database_at(drop.database, note.lsn) or ""}
            yield {"kind": "drop_schema", "schema": drop.schema, "name": drop.name, **told, "xid": self._xid(note)}
        if (table := reader.table_drops.get(note.lsn)) is not None:
            told = {"database": table.database, "database_name": self.database_at(table.database, note.lsn) or ""}
            row = table.relation
            named = {"oid": row.oid, "schema": row.schema, "name": row.name} if row else NAMELESS
            yield {"kind": "drop_table", **named, **told, "xid": self._xid(note)}
        database = wal.dropped_database(note)
        if database is not None and note.xid in reader.dropping:  # else it was moved to another tablespace
            first = self._place(self.invalidated.pop(database, note))
            name = self.database_at(database, note.lsn) or ""
            yield {"kind": "drop_database", "database": database, "name": name, "xid": self._xid(note), "first": first}
        if (space := wal.dropped_tablespace(note)) is not None:
            first = self._place(reader.emptying.get(note.xid, note))
            name = reader.tablespaces.get(space, "")
            yield {"kind": "drop_tablespace", "tablespace": space, "name": name, "xid": self._xid(note), "first": first}

    def _xid(self, note: Note) -> int:
        return int(full_xid(np.array([note.xid], dtype=np.uint32), self.next_xid)[0]) if note.xid else 0

    def _place(self, note: Note) -> dict[str, Any]:
        lsn, write = (np.array([value], dtype=np.uint64) for value in (note.lsn, note.write))
        durable = int(durable_write(self.readout, lsn, write)[0])
        return {"lsn": note.lsn, "write": durable, "late": durable - note.write, "begin_at": note.begin_at}
