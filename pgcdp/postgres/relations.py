"""Which relation a file belonged to, over time: from looks at the catalogs by SQL, and from their own changes in WAL.

A look says what was so when it was taken. What happened between two looks (tables made and dropped, rewritten,
renamed) is in the WAL of pg_class: the first record about a page behind a checkpoint bears the whole page (full page
writes), so the tuples that later records name only by their place are known. Tuples: src/include/catalog/pg_class.h
and pg_namespace.h, access/htup_details.h, storage/bufpage.h of PostgreSQL 13 to 18.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pgcdp.errors import DamageError
from pgcdp.postgres.wal import MAGIC_15, MAGIC_18, Block, Manager, Note, Parts, parse

PG_CLASS = 1259
PG_TABLESPACE = 1213
PG_DATABASE = 1262
PG_INHERITS = 2611
PG_NAMESPACE = 2615
NAMING = (PG_CLASS, PG_INHERITS, PG_NAMESPACE)
CATALOGS = (PG_CLASS, PG_TABLESPACE, PG_DATABASE, PG_INHERITS, PG_NAMESPACE)

_SCHEMAS = {11: "pg_catalog", 99: "pg_toast", 2200: "public"}
"""As initdb makes them. `public` may be called otherwise by now: until the first look at the catalogs, a moment behind
`protect`, nothing says so."""
FIRST_NORMAL = 16384
"""The first OID that is not one of the catalogs' own (FirstNormalObjectId)."""

INSERT, DELETE, UPDATE, HOT_UPDATE, INPLACE = 0x00, 0x10, 0x20, 0x40, 0x70
MULTI_INSERT = 0x50
PREFIX_FROM_OLD, SUFFIX_FROM_OLD = 1 << 5, 1 << 6
INIT_PAGE = 0x80
INVALID_DATABASE = -2
"""pg_database.datconnlimit of a database that is being dropped (DATCONNLIMIT_INVALID_DB): nobody can connect to it."""
TUPLE_HEADER = 23
"""Bytes of a heap tuple before its null bitmap (SizeofHeapTupleHeader)."""

WITHOUT_FILE = "pf"
"""Kinds of tables that have no file: partitioned and foreign ones. That they were dropped, no file says."""

REWRITE = "pg_temp_"
"""How the new files of a table are called while it is rewritten: with its OID behind it."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A row of pg_class as it was: `database` and `oid` make it one; `schema` is a name, `parent` and `owner` are OIDs.

    `rows`: how many it had, as far as statistics told (0: not known). `parent`: of a partition or an heir, 0 for none.
    `owner`: of a TOAST table, the table that it belongs to. `file` 0: it has none, or pg_class does not say.
    """

    database: int
    oid: int
    schema: str
    name: str
    kind: str
    file: int
    rows: int = 0
    parent: int = 0
    owner: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """The catalogs of all databases as SQL showed them, not before `lsn`.

    `databases`: names by OID; `schemas`: names by (database, OID); `catalogs`: as `catalogs_among` the relations.
    """

    lsn: int
    databases: Mapping[int, str]
    schemas: Mapping[tuple[int, int], str]
    catalogs: Mapping[tuple[int, int], int]
    relations: Sequence[Relation]


def catalogs_among(relations: Iterable[Relation]) -> dict[tuple[int, int], int]:
    """The OIDs of CATALOGS, by (database, file)."""
    return {(each.database, each.file): each.oid for each in relations if each.oid in CATALOGS and each.file}


@dataclass(frozen=True, slots=True)
class Said:
    """What a record in WAL said: from `lsn` on, for transaction `xid` and, when that commits, for all."""

    lsn: int
    xid: int
    relation: Relation


@dataclass(frozen=True, slots=True)
class SchemaDrop:
    """A row of pg_namespace that transaction `xid` deleted; OID 0 and no name when the row was not known."""

    xid: int
    database: int
    schema: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class TableDrop:
    """A row of pg_class that transaction `xid` deleted, of a table without a file of its own (WITHOUT_FILE).

    None when the row was not known: then it may have been of anything.
    """

    xid: int
    database: int
    relation: Relation | None = None


@dataclass
class CatalogReader:
    """Follows the pages of the catalogs that name things through their records, in order of LSN.

    `files` holds what was said of each (database, file); `inplace` the in-place changes that made a database invalid
    (record, OID); `dropping` and `emptying` the records that deleted a row there or in pg_tablespace, by transaction;
    `schema_drops` those that deleted a row of pg_namespace, `table_drops` one of pg_class, by LSN. `database_names`:
    what transactions called databases (LSN, xid, name); `databases`: the last of them, whatever became of its
    transaction. `naming`: the records with which a transaction changed names of relations, together with those that the
    pages are known from. What cannot be understood is passed over: looks make up for it.
    """

    catalogs: dict[tuple[int, int], int] = field(default_factory=dict)
    files: dict[tuple[int, int], list[Said]] = field(default_factory=lambda: defaultdict(list))
    oids: dict[tuple[int, int], list[Said]] = field(default_factory=lambda: defaultdict(list))
    schemas: dict[tuple[int, int], str] = field(default_factory=dict)
    parents: dict[tuple[int, int], int] = field(default_factory=dict)
    databases: dict[int, str] = field(default_factory=dict)
    database_names: dict[int, list[tuple[int, int, str]]] = field(default_factory=lambda: defaultdict(list))
    inplace: list[tuple[Note, int]] = field(default_factory=list)
    dropping: dict[int, Note] = field(default_factory=dict)
    emptying: dict[int, Note] = field(default_factory=dict)
    tablespaces: dict[int, str] = field(default_factory=dict)
    schema_drops: dict[int, SchemaDrop] = field(default_factory=dict)
    table_drops: dict[int, TableDrop] = field(default_factory=dict)
    naming: dict[int, dict[int, list[Note]]] = field(default_factory=lambda: defaultdict(dict))
    _told: int = 0
    _unknown_drops: set[tuple[int, int]] = field(default_factory=set)
    _pages: dict[tuple[int, int, int], list[Note]] = field(default_factory=dict)
    _tuples: dict[tuple[int, int, int], dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))

    def know(self, look: Look) -> None:
        """Names of schemas, and where the catalogs lie, from a look."""
        self._told = self._told or look.lsn
        self.schemas.update(look.schemas)
        self.databases.update(look.databases)
        self.catalogs.update(look.catalogs)

    def take(self, note: Note) -> None:
        """The next record."""
        if note.rmid not in (Manager.HEAP, Manager.HEAP2, Manager.XLOG, Manager.RELMAP):
            return
        try:
            parts = parse(note)
            if note.rmid == Manager.RELMAP:
                self._take_map(parts.main)
                return
            for block in parts.blocks:
                if self._catalog(block) is not None:
                    self._remember(note, block)
                    self._take_image(note, block)
            if parts.blocks and note.rmid != Manager.XLOG and self._catalog(parts.blocks[0]) is not None:
                self._take_heap(note, parts)
        except (DamageError, struct.error, IndexError, KeyError):
            return

    def _catalog(self, block: Block) -> int | None:
        if block.fork:
            return None
        known = self.catalogs.get((block.database, block.file))
        if known is None and block.file in CATALOGS:
            return block.file
        return known

    def _take_map(self, main: bytes) -> None:
        database, count = struct.unpack_from("<I", main)[0], struct.unpack_from("<I", main, 16)[0]
        for number in range(count):
            oid, file = struct.unpack_from("<II", main, 20 + 8 * number)
            if oid in (PG_CLASS, PG_TABLESPACE, PG_DATABASE):
                self.catalogs[database, file] = oid

    def _remember(self, note: Note, block: Block) -> None:
        if self._catalog(block) not in NAMING:
            return
        page = block.database, block.file, block.number
        if block.has_image or page not in self._pages:
            self._pages[page] = []
        history = self._pages[page]
        history.append(note)
        if note.xid:
            self.naming[note.xid][id(history)] = history

    def _take_image(self, note: Note, block: Block) -> None:
        if not block.has_image:
            return
        place = self._tuples[block.database, block.file, block.number]
        place.clear()
        if block.image is not None:
            place.update(page_tuples(block.image))
            if note.rmid == Manager.XLOG:  # a page written as a whole: by a rewrite, or in a new database
                for tuple_ in place.values():
                    self._say(note, block, tuple_)

    def _take_heap(self, note: Note, parts: Parts) -> None:
        block, operation = parts.blocks[0], note.info & 0x70
        place = self._tuples[block.database, block.file, block.number]
        if note.rmid == Manager.HEAP2:
            if operation == MULTI_INSERT:
                self._take_multi(note, parts, block, place)
            return
        if operation == DELETE and self._catalog(block) == PG_DATABASE:
            self.dropping[note.xid] = note
        elif operation == DELETE and self._catalog(block) == PG_TABLESPACE:
            self.emptying[note.xid] = note
            known = place.get(struct.unpack_from("<H", parts.main, 4)[0])
            if known is not None:
                self._say(note, block, known)
        elif operation == DELETE and self._catalog(block) == PG_NAMESPACE:
            offset = struct.unpack_from("<H", parts.main, 4)[0]  # behind xmax
            content = _content(place[offset]) if offset in place else b""
            row = (struct.unpack_from("<I", content)[0], _name(content, 4)) if len(content) >= 68 else ()
            self.schema_drops[note.lsn] = SchemaDrop(note.xid, block.database, *row)
        elif operation == DELETE and self._catalog(block) == PG_CLASS:
            self._take_drop(note, block, place.get(struct.unpack_from("<H", parts.main, 4)[0]))
        elif operation == INSERT:
            offset = struct.unpack_from("<H", parts.main)[0]
            if not block.has_image:
                place[offset] = _tuple(block.data, 0)
            self._say(note, block, place[offset])
        elif operation in (UPDATE, HOT_UPDATE):
            old_offset, flags = struct.unpack_from("<HxB", parts.main, 4)
            offset = struct.unpack_from("<H", parts.main, 12)[0]
            if not block.has_image:
                old_block = parts.blocks[1] if len(parts.blocks) > 1 else block
                old = self._tuples[old_block.database, old_block.file, old_block.number].get(old_offset)
                place[offset] = _updated(block.data, flags, old)
            self._say(note, block, place[offset])
        elif operation == INPLACE and self._catalog(block) == PG_DATABASE:
            offset = struct.unpack_from("<H", parts.main)[0]
            content = block.data if not block.has_image else _content(place[offset])
            limit_at = 80 if note.magic >= MAGIC_15 else 208  # datconnlimit; collations were names before 15
            if struct.unpack_from("<i", content, limit_at)[0] == INVALID_DATABASE:
                self.inplace.append((note, struct.unpack_from("<I", content)[0]))

    def _take_drop(self, note: Note, block: Block, known: bytes | None) -> None:
        relation = self._relation(note, block, _content(known)) if known is not None else None
        if relation is not None and relation.kind in WITHOUT_FILE:
            self.table_drops[note.lsn] = TableDrop(note.xid, block.database, relation)
        elif relation is None and (note.xid, block.database) not in self._unknown_drops:
            self._unknown_drops.add((note.xid, block.database))
            self.table_drops[note.lsn] = TableDrop(note.xid, block.database)

    def _take_multi(self, note: Note, parts: Parts, block: Block, place: dict[int, bytes]) -> None:
        """xl_heap_multi_insert: flags, ntuples, offsets (none on a new page); xl_multi_insert_tuple, aligned to 2."""
        count = struct.unpack_from("<H", parts.main, 2)[0]
        new_page = bool(note.info & INIT_PAGE)
        at = 0
        for number in range(count):
            offset = number + 1 if new_page else struct.unpack_from("<H", parts.main, 4 + 2 * number)[0]
            if not block.has_image:
                at += at % 2
                length, infomask2, infomask, hoff = struct.unpack_from("<HHHB", block.data, at)
                place[offset] = _made(infomask2, infomask, hoff, block.data[at + 7 : at + 7 + length])
                at += 7 + length
            self._say(note, block, place[offset])

    def _say(self, note: Note, block: Block, tuple_: bytes) -> None:
        catalog = self._catalog(block)
        content = _content(tuple_)
        if catalog == PG_NAMESPACE and len(content) >= 68:
            schema = block.database, struct.unpack_from("<I", content)[0]
            if note.lsn >= self._told or schema not in self.schemas:  # what is older than the look is known to it
                self.schemas[schema] = _name(content, 4)
        if catalog == PG_DATABASE and len(content) >= 68:
            oid, name = struct.unpack_from("<I", content)[0], _name(content, 4)
            self.databases[oid] = name
            if note.rmid != Manager.XLOG:
                self.database_names[oid].append((note.lsn, note.xid, name))
        if catalog == PG_TABLESPACE and len(content) >= 68:
            self.tablespaces[struct.unpack_from("<I", content)[0]] = _name(content, 4)
        if catalog == PG_INHERITS and len(content) >= 8:
            child, parent = struct.unpack_from("<II", content)
            self.parents[block.database, child] = parent
        relation = self._relation(note, block, content) if catalog == PG_CLASS else None
        if relation is None:
            return
        said = Said(note.lsn, note.xid, relation)
        self.oids[block.database, relation.oid].append(said)
        if relation.file:
            self.files[block.database, relation.file].append(said)

    def _relation(self, note: Note, block: Block, content: bytes) -> Relation | None:
        """What a row of pg_class says; None when it is too short."""
        if len(content) < 120:
            return None
        oid, schema, file = (struct.unpack_from("<I", content, at)[0] for at in (0, 68, 88))
        toast_at = 112 if note.magic >= MAGIC_18 else 108  # relallfrozen came with 18
        kind = chr(content[toast_at + 4 + 3])  # behind reltoastrelid, relhasindex, relisshared, relpersistence
        called = self.schemas.get((block.database, schema)) or _SCHEMAS.get(schema, f"schema {schema}")
        return Relation(block.database, oid, called, _name(content, 4), kind, file, 0, 0, 0)


def page_tuples(page: bytes) -> Iterable[tuple[int, bytes]]:
    """(line pointer number, tuple) of each tuple that has storage on a heap page."""
    lower = struct.unpack_from("<H", page, 12)[0]
    for number in range(1, (min(lower, len(page)) - 24) // 4 + 1):
        pointer = struct.unpack_from("<I", page, 20 + 4 * number)[0]
        offset, flags, length = pointer & 0x7FFF, pointer >> 15 & 3, pointer >> 17
        if flags == 1 and length >= TUPLE_HEADER:
            yield number, page[offset : offset + length]


def _made(infomask2: int, infomask: int, hoff: int, behind: bytes) -> bytes:
    """A tuple of which WAL has no transaction ids: zeros in their place."""
    return bytes(18) + struct.pack("<HHB", infomask2, infomask, hoff) + behind


def _tuple(data: bytes, at: int) -> bytes:
    infomask2, infomask, hoff = struct.unpack_from("<HHB", data, at)
    return _made(infomask2, infomask, hoff, data[at + 5 :])


def _updated(data: bytes, flags: int, old: bytes | None) -> bytes:
    """The new tuple of an update whose beginning or end may be that of the old one."""
    at = prefix = suffix = 0
    if flags & PREFIX_FROM_OLD:
        prefix = struct.unpack_from("<H", data, at)[0]
        at += 2
    if flags & SUFFIX_FROM_OLD:
        suffix = struct.unpack_from("<H", data, at)[0]
        at += 2
    infomask2, infomask, hoff = struct.unpack_from("<HHB", data, at)
    behind = data[at + 5 :]
    if prefix or suffix:
        if old is None:
            raise KeyError
        bitmap = hoff - TUPLE_HEADER
        begin = old[22]
        behind = behind[:bitmap] + old[begin : begin + prefix] + behind[bitmap:] + old[len(old) - suffix :]
    return _made(infomask2, infomask, hoff, behind)


def _content(tuple_: bytes) -> bytes:
    return tuple_[tuple_[22] :]


def _name(content: bytes, at: int) -> str:
    return content[at : at + 64].split(b"\0")[0].decode("utf-8", "replace")
