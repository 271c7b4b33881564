"""The transaction index of an interval in its bundle: Parquet, one row for each transaction and table touched.

Written and read as a whole or by columns; what is in the columns, and how they are made, is said in FORMAT.md 3.5.
Names of relations as a look at the catalogs showed them lie beside it in the same way (FORMAT.md 3.6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.errors import DamageError
from pgcdp.postgres.relations import CATALOGS, Look, Relation, catalogs_among
from pgcdp.records import WAL_WRITE
from pgcdp.store.frames import FileSummary
from pgcdp.store.parquet import Ranges, read_table, write_table

TRANSACTIONS = "transactions.parquet"
WAL = "wal.parquet"
RELATIONS = "relations.parquet"

_NAMES = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        ("lsn", pa.uint64()),
        ("length", pa.uint32()),
        ("write", pa.uint64()),
        ("late", pa.uint16()),
        ("begin_at", pa.uint32()),
        ("end_at", pa.uint32()),
        ("time_us", pa.int64()),
        ("xid", pa.uint64()),
        ("timeline", pa.uint32()),
        ("status", pa.uint8()),
        ("back", pa.uint64()),
        ("subxids", pa.list_(pa.uint32())),
        ("database_oid", pa.uint32()),
        ("relation_oid", pa.uint32()),
        ("database", _NAMES),
        ("schema", _NAMES),
        ("name", _NAMES),
        ("kind", _NAMES),
        ("parent_oid", pa.uint32()),
        ("rows", pa.int64()),
        ("inserted", pa.uint64()),
        ("updated", pa.uint64()),
        ("deleted", pa.uint64()),
        ("flags", pa.uint8()),
    ]
)
"""Columns of the transaction index."""

END_COLUMNS = tuple(SCHEMA.names[: SCHEMA.names.index("database_oid")])
"""Those that say of a transaction when and how it ended, not what it did."""

CREATED, DROPPED, TRUNCATED, REWRITTEN = 1, 2, 4, 8
"""Bits of `flags`: what became of the table."""

STILL = "every boundary and write can still be restored; transactions of this interval cannot be listed"

_DELTA = ("lsn", "write", "time_us", "xid", "from_lsn", "to_lsn", "durable", "rows", "begin_at", "end_at")
"""Columns that rise steadily: stored as differences."""
_DICTIONARY = [name for name in SCHEMA.names if name not in (*_DELTA, "subxids")]

_LOOK_SCHEMA = pa.schema(
    [
        ("database", pa.uint32()),
        ("oid", pa.uint32()),
        ("schema", pa.string()),
        ("name", pa.string()),
        ("kind", pa.string()),
        ("file", pa.uint32()),
        ("rows", pa.int64()),
        ("parent", pa.uint32()),
        ("owner", pa.uint32()),
    ]
)


def write_transactions(place: Path, table: pa.Table) -> FileSummary:
    """Write the index of an interval beside its writes, synced. `table` has SCHEMA, in order of LSN."""
    return _write(place / TRANSACTIONS, table.cast(SCHEMA), _DICTIONARY)


def read_transactions(place: Path, columns: Sequence[str] | None = None, within: Ranges | None = None) -> pa.Table:
    """Some columns of an interval's index; with `within`, only the parts of it that can hold what is looked for.

    Raises DamageError with the file, also when it is missing.
    """
    return _needed(place / TRANSACTIONS, columns, within)


def write_wal(place: Path, wal: NDArray[np.void]) -> FileSummary:
    """Write which WAL each write completed (array WAL_WRITE), synced."""
    return _write(place / WAL, pa.table({name: wal[name] for name in WAL_WRITE.names or ()}), ())


def read_wal(place: Path) -> NDArray[np.void]:
    """Array WAL_WRITE of an interval. Raises DamageError with the file, also when it is missing."""
    table = _needed(place / WAL)
    found = np.empty(len(table), dtype=WAL_WRITE)
    for name in WAL_WRITE.names or ():
        found[name] = table.column(name).to_numpy()
    return found


def write_look(place: Path, look: Look) -> FileSummary:
    """Write what a look at the catalogs showed, synced; one that is there is replaced."""
    columns = {name: [getattr(each, name) for each in look.relations] for name in _LOOK_SCHEMA.names}
    facts = {b"lsn": str(look.lsn).encode(), b"databases": _pairs(look.databases), b"schemas": _pairs(look.schemas)}
    table = pa.table(columns, schema=_LOOK_SCHEMA).replace_schema_metadata(facts)
    return _write(place / RELATIONS, table, _LOOK_SCHEMA.names)


def read_look(place: Path) -> Look | None:
    """The look that lies in a bundle or an open interval; None when there is none. Raises DamageError."""
    try:
        table = read_table(place / RELATIONS, STILL)
    except FileNotFoundError:
        return None
    facts = table.schema.metadata
    databases = {int(oid): name for oid, name in _unpaired(facts[b"databases"])}
    schemas = {}
    for key, name in _unpaired(facts[b"schemas"]):
        database, _, oid = key.partition("/")
        schemas[int(database), int(oid)] = name
    relations = _Relations(table)
    own = np.flatnonzero(np.isin(table.column("oid").to_numpy(), CATALOGS))
    return Look(int(facts[b"lsn"]), databases, schemas, catalogs_among(relations.at(own)), relations)


class _Relations(Sequence[Relation]):
    """Those of a file, made when they are asked for: there can be tens of thousands, and many a question needs none."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def at(self, rows: NDArray[np.int64]) -> list[Relation]:
        """Some of them. Not by `filter` or `take`: these load all of Arrow's functions, which takes 0.1 s."""
        columns = [self._table.column(name) for name in _LOOK_SCHEMA.names]
        return [Relation(*(column[row].as_py() for column in columns)) for row in rows.tolist()]

    @cached_property
    def _made(self) -> tuple[Relation, ...]:
        columns = [self._table.column(name).to_pylist() for name in _LOOK_SCHEMA.names]
        return tuple(Relation(*row) for row in zip(*columns, strict=True))

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, key: int) -> Relation: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Relation]: ...
    def __getitem__(self, key: int | slice) -> Relation | Sequence[Relation]:
        return self._made[key]

    def __iter__(self) -> Iterator[Relation]:
        return iter(self._made)


def _pairs(names: Mapping[int, str] | Mapping[tuple[int, int], str]) -> bytes:
    def text(key: int | tuple[int, int]) -> str:
        return str(key) if isinstance(key, int) else f"{key[0]}/{key[1]}"

    return "\0".join(f"{text(key)}={name}" for key, name in names.items()).encode()


def _unpaired(raw: bytes) -> list[tuple[str, str]]:
    found = []
    for entry in raw.decode().split("\0"):
        key, equals, name = entry.partition("=")
        if equals:
            found.append((key, name))
    return found


def _write(path: Path, table: pa.Table, repeated: Sequence[str]) -> FileSummary:
    return write_table(path, table, rising=_DELTA, repeated=repeated)


def _needed(path: Path, columns: Sequence[str] | None = None, within: Ranges | None = None) -> pa.Table:
    try:
        return read_table(path, STILL, columns, within)
    except FileNotFoundError:
        raise DamageError(f"{path} is missing (offset 0)", STILL) from None
