"""What a captured write holds beside WAL and pg_control: blocks of relations, other files, the filesystem itself.

Which file a block belongs to is what the filesystem said at the boundary where the write's interval ends, and where
that was another at the boundary before, what it said there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgcdp.capture.filemap import FileMap
from pgcdp.intervals.extents import forward_map
from pgcdp.intervals.files import changed_files
from pgcdp.postgres.relations import Look, Relation
from pgcdp.postgres.wal import PAGE
from pgcdp.records import BLOCK, INDEX
from pgcdp.store.base import places_back
from pgcdp.store.files import read_files
from pgcdp.store.layout import Store
from pgcdp.store.transactions import read_look

Json = dict[str, Any]

SEGMENT_PAGES = (1 << 30) // PAGE
"""Pages of a file of a relation: RELSEG_SIZE, unless Postgres was built with another."""
_RELATION = re.compile(r"(?:base/(\d+)|global|pg_tblspc/\d+/[^/]+/(\d+))/(\d+)(?:_(fsm|vm|init))?(?:\.(\d+))?")


def owners_in(store: Store, interval: int, record: np.void) -> list[Json]:
    """Whose the blocks of a write in a published interval are, in its order; [] when that is not known.

    Each {"file", "offset", "length", "relation", "earlier"}: `file` null is the filesystem's own, `offset` and `length`
    are bytes in the file, `earlier`: so it was at the boundary before. Raises DamageError.
    """
    table = read_files(store.interval(interval))
    return [] if table is None else list(_told(table, record, list(islice(places_back(store, interval), 2))))


def owners_now(store: Store, files: FileMap, interval: int, record: np.void) -> list[Json]:
    """The same for a write of the open interval `interval`, by what the mounted filesystem says now."""
    index = np.zeros(1, dtype=INDEX)
    for name in record.dtype.names or ():
        index[name] = record[name]
    table = changed_files(forward_map(index), None, files)
    return list(_told(table, record, [store.incoming(interval), *islice(places_back(store, interval - 1), 1)]))


def _told(table: pa.Table, record: np.void, places: list[Any]) -> Iterator[Json]:
    first = int(record["offset"]) // BLOCK
    behind = first + int(record["length"]) // BLOCK
    mask = pc.and_(
        pc.equal(table["volume"], pa.scalar(int(record["volume"]), pa.uint16())),
        pc.and_(
            pc.less(table["block"], pa.scalar(behind, pa.uint64())),
            pc.greater(pc.add(table["block"], table["count"].cast(pa.uint64())), pa.scalar(first, pa.uint64())),
        ),
    )
    looks: list[Look] | None = None
    for row in table.filter(mask).to_pylist():
        begin, end = max(first, row["block"]), min(behind, row["block"] + row["count"])
        offset = (row["at"] + begin - row["block"]) * BLOCK
        told: Json = {"file": row["path"], "offset": offset, "length": (end - begin) * BLOCK, "relation": None}
        if row["path"] is None:
            told["offset"] = None
        elif (named := _RELATION.fullmatch(row["path"])) is not None:
            if looks is None:
                looks = [look for look in map(read_look, places) if look is not None]
            told["relation"] = _relation(named, offset, end - begin, looks)
        yield {**told, "earlier": row["earlier"]}


def _relation(named: re.Match[str], offset: int, blocks: int, looks: list[Look]) -> Json:
    """Which pages of which relation; its names are null when no look knows the file."""
    database, file = int(named[1] or named[2] or 0), int(named[3])
    found, where = _find(database, file, looks)
    page = int(named[5] or 0) * SEGMENT_PAGES + offset // PAGE
    return {
        "database": where,
        "schema": found.schema if found else None,
        "name": found.name if found else None,
        "kind": found.kind if found else None,
        "fork": named[4] or "main",
        "page": page,
        "pages": max(1, blocks * BLOCK // PAGE),
    }


def _find(database: int, file: int, looks: list[Look]) -> tuple[Relation | None, str | None]:
    for look in looks:
        for relation in look.relations:
            if relation.file == file and relation.database == database:
                return relation, look.databases.get(database)
    return None, looks[0].databases.get(database) if looks else None


def kind_of(holds: Json) -> str:
    """In a word: "wal", "pg_control", "mark", "rewind", "gap", "relation", "file", "filesystem" or "unknown"."""
    for word in ("mark", "rewind", "gap", "pg_control", "wal"):
        if word in holds:
            return word
    owners = holds.get("files", [])
    if any((each["file"] or "").startswith("pg_wal/") for each in owners):
        return "wal"
    if any(each["relation"] for each in owners):
        return "relation"
    if any(each["file"] for each in owners):
        return "file"
    return "filesystem" if owners else "unknown"
