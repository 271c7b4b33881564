"""Which relation each change of a file belongs to: looks at the catalogs before and after, and what WAL said."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pgcdp.intervals.readout import Readout
from pgcdp.postgres.relations import FIRST_NORMAL, REWRITE, CatalogReader, Look, Relation, Said, catalogs_among
from pgcdp.records import CHANGE, COMMITTED, COMMITTED_PREPARED

_TRANSIENT = re.compile(re.escape(REWRITE) + r"(\d+)$")
IN = (COMMITTED, COMMITTED_PREPARED)
"""Values of `status` of what counts for others."""


@dataclass(frozen=True)
class DatabaseNames:
    """What databases were called, and from which commits on they were called otherwise."""

    before: Mapping[int, str]
    after: Mapping[int, str]
    after_lsn: int
    otherwise: Mapping[int, str]
    renamed: Mapping[int, Sequence[tuple[int, str]]]

    def called(self, oid: int) -> tuple[list[int], list[str | None]]:
        """LSNs of commits, and the names that hold up to each of them and behind the last; None: not known."""
        steps = self.renamed.get(oid, ())
        first = self.before.get(oid) or next((name for _, name in steps), None) or self.after.get(oid)
        return [lsn for lsn, _ in steps], [first or self.otherwise.get(oid), *(name for _, name in steps)]

    def at(self, oid: int, lsn: int) -> str | None:
        """The name for what is at `lsn`."""
        lsns, names = self.called(oid)
        return names[bisect_left(lsns, lsn)]

    def now(self) -> dict[int, str]:
        """All names at the end; a later look knows what was so then."""
        said = {oid: steps[-1] for oid, steps in self.renamed.items() if steps}
        return {
            **self.otherwise, **self.before, **{oid: name for oid, (_, name) in said.items()}, **self.after,
            **{oid: name for oid, (lsn, name) in said.items() if lsn >= self.after_lsn},
        }  # fmt: skip


@dataclass
class Names:
    """Relations by number: `code` of each change (-1: not known), and whether it belongs to a rewrite of the table.

    `look` is what the catalogs are at the end.
    """

    relations: list[Relation]
    code: NDArray[np.int64]
    transient: NDArray[np.bool_]
    look: Look | None


@dataclass(frozen=True)
class Naming:
    """Of those transactions that changed catalogs: where they committed, and which top transaction a subxid has."""

    committed: Mapping[int, int]
    top: Mapping[int, int]

    @classmethod
    def of(cls, readout: Readout, reader: CatalogReader) -> Naming:
        """`reader` has taken the readout's records, and those of the time before."""
        wanted = {said.xid for each in reader.oids.values() for said in each}
        wanted |= {drop.xid for drop in reader.schema_drops.values()}
        wanted |= {xid for each in reader.database_names.values() for _, xid, _ in each}
        ends = readout.ends
        owner = np.repeat(np.arange(len(ends)), ends["subxids"])
        top = {}
        for at in np.flatnonzero(np.isin(readout.subxids, list(wanted))).tolist():
            top[int(readout.subxids[at])] = int(ends["xid"][owner[at]])
        tops = np.isin(ends["xid"], [*wanted, *top.values()]) & np.isin(ends["status"], IN)
        return cls({int(end["xid"]): int(end["lsn"]) for end in ends[tops]}, top)

    def committed_at(self, xid: int) -> int:
        """Where the transaction of an xid or subxid committed; -1 if it did not."""
        return self.committed.get(self.top_of(xid), -1)

    def top_of(self, xid: int) -> int:
        """The top transaction's xid."""
        return self.top.get(xid, xid)


@dataclass
class _Namer:
    before: dict[tuple[int, int], Relation]
    after: dict[tuple[int, int], Relation]
    by_oid: dict[tuple[int, int], Relation]
    reader: CatalogReader
    naming: Naming
    relations: list[Relation] = field(default_factory=list)
    codes: dict[Relation, int] = field(default_factory=dict)

    def intern(self, relation: Relation | None) -> int:
        if relation is None:
            return -1
        relation = replace(relation, file=0, rows=0)
        if relation not in self.codes:
            self.codes[relation] = len(self.relations)
            self.relations.append(relation)
        return self.codes[relation]

    def settled(self, said: Said) -> Relation:
        """What is said of a file, and what only looks know; a rewrite's own name gives way to the table's."""
        relation = said.relation
        transient = _TRANSIENT.match(relation.name)
        oid = int(transient[1]) if transient else relation.oid
        known = self.by_oid.get((relation.database, oid))
        if transient:
            earlier = [each for each in self.reader.oids.get((relation.database, oid), []) if each.lsn <= said.lsn]
            relation = earlier[-1].relation if earlier else known or relation
        parent = self.reader.parents.get((relation.database, relation.oid), known.parent if known else 0)
        if known is None or relation is known:
            return replace(relation, file=0, parent=parent)
        return replace(
            relation, file=0, parent=parent, owner=known.owner,
            schema=known.schema if relation.schema.startswith("schema ") else relation.schema,
        )  # fmt: skip

    def name_file(
        self, database: int, file: int, lsns: NDArray[np.uint64], xids: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """For changes of one file by transactions `xids` that ended at `lsns`: relation codes, and rewrites."""
        said = self.reader.files.get((database, file), [])
        known = self.before.get((database, file))
        if known is None:
            known = self.settled(said[0]) if said else self.after.get((database, file))
        if known is None and file < FIRST_NORMAL:  # a mapped catalog: pg_class does not say its file
            named = self.reader.oids.get((database, file))
            known = self.settled(named[0]) if named else self.by_oid.get((database, file))
        codes = np.full(len(lsns), self.intern(known), dtype=np.int64)
        transient = np.zeros(len(lsns), dtype=np.bool_)
        ended = [(lsn, each) for each in said if (lsn := self.naming.committed_at(each.xid)) >= 0]
        for lsn, each in sorted(ended, key=lambda pair: (pair[0], pair[1].lsn)):
            codes[lsns > lsn] = self.intern(self.settled(each))
        for each in said:
            own = xids == self.naming.top_of(each.xid)
            if own.any():
                codes[own] = self.intern(self.settled(each))
                transient[own] |= bool(_TRANSIENT.match(each.relation.name))
        return codes, transient


def name_changes(
    readout: Readout,
    reader: CatalogReader,
    naming: Naming,
    databases: DatabaseNames,
    before: Look | None,
    after: Look | None,
) -> Names:
    """Name the relations of all changes. `reader` has taken the readout's records, and those of the time before."""
    ends, changes = readout.ends, readout.changes
    namer = _Namer(_by_file(before), _by_file(after), _by_oid(before, after), reader, naming)
    owner = np.repeat(np.arange(len(ends)), ends["changes"])
    code = np.full(len(changes), -1, dtype=np.int64)
    transient = np.zeros(len(changes), dtype=np.bool_)
    for database, file, rows in _files(changes):
        of = ends[owner[rows]]
        code[rows], transient[rows] = namer.name_file(database, file, of["lsn"], of["xid"])
    return Names(namer.relations, code, transient, _look_now(namer, before, after, databases.now()))


def database_names(reader: CatalogReader, naming: Naming, before: Look | None, after: Look | None) -> DatabaseNames:
    """What the databases were called. `reader` has taken the readout's records, and those of the time before."""
    renamed = {
        oid: sorted((at, lsn, name) for lsn, xid, name in said if (at := naming.committed_at(xid)) >= 0)
        for oid, said in reader.database_names.items()
    }
    return DatabaseNames(
        before.databases if before else {},
        after.databases if after else {},
        after.lsn if after else 0,
        reader.databases,
        {oid: [(committed, name) for committed, _, name in steps] for oid, steps in renamed.items()},
    )


def _look_now(namer: _Namer, before: Look | None, after: Look | None, databases: dict[int, str]) -> Look | None:
    """The newest look, with what WAL said since, as far as it was committed."""
    base = after or before
    since = base.lsn if base else 0
    said = [
        each for of_oid in namer.reader.oids.values() for each in of_oid if namer.naming.committed_at(each.xid) >= since
    ]
    schemas = _schemas_now(namer)
    if not said and base is not None:
        return replace(base, databases=databases, schemas=schemas)
    relations = {(each.database, each.oid): each for each in (base.relations if base else ())}
    for each in sorted(said, key=lambda each: each.lsn):
        if not _TRANSIENT.match(each.relation.name):
            relations[each.relation.database, each.relation.oid] = replace(namer.settled(each), file=each.relation.file)
    now = tuple(relations.values())
    return Look(since, databases, schemas, catalogs_among(now), now)


def _schemas_now(namer: _Namer) -> dict[tuple[int, int], str]:
    """All that were known but those whose row was deleted by what committed."""
    gone = {
        (drop.database, drop.schema)
        for drop in namer.reader.schema_drops.values()
        if namer.naming.committed_at(drop.xid) >= 0
    }
    return {key: name for key, name in namer.reader.schemas.items() if key not in gone}


def _files(changes: NDArray[np.void]) -> list[tuple[int, int, NDArray[np.int64]]]:
    """Each file with the rows of its changes."""
    assert changes.dtype == CHANGE
    key = changes["database"].astype(np.uint64) << np.uint64(32) | changes["file"]
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    starts = np.flatnonzero(np.append(True, sorted_key[1:] != sorted_key[:-1])) if len(key) else np.empty(0, int)
    pieces = np.split(order, starts[1:]) if len(key) else []
    return [(int(key[rows[0]]) >> 32, int(key[rows[0]]) & 0xFFFFFFFF, rows) for rows in pieces]


def _by_file(look: Look | None) -> dict[tuple[int, int], Relation]:
    return {(each.database, each.file): each for each in look.relations if each.file} if look else {}


def _by_oid(before: Look | None, after: Look | None) -> dict[tuple[int, int], Relation]:
    """By OID; the earlier look counts."""
    looks = [look for look in (after, before) if look is not None]
    return {(each.database, each.oid): each for look in looks for each in look.relations}
