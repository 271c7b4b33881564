"""The catalog: SQLite, a cache of the manifests and of the history files. `rebuild` makes it anew from the store.

Nothing is only here. It is written after the files that it mirrors, so a kill can leave it behind them, never ahead.
It lies below PGCDP_ROOT (`store.notes`), not in the store.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import xxhash

from pgcdp.errors import DamageError, PgcdpError
from pgcdp.records import Boundary, Gap, Interval, Rewind
from pgcdp.store.bundle import Bundle
from pgcdp.store.history import HistoryKind, add_history
from pgcdp.store.layout import Store
from pgcdp.store.notes import make_notes, notes_of

if TYPE_CHECKING:
    import sqlite_utils

FILE_NAME = "catalog.db"
BUSY_SECONDS = 30.0
"""How long it is waited for others who write to it."""
SCHEMA_VERSION = 6
"""Another one for each change of what `Interval` has and in which order: a row has the values without the names."""


_HISTORY = "name, kind, time_ns, interval, content, checksum"


def catalog_file(store: Store) -> Path:
    """Where the catalog of a store is, if there is one."""
    return notes_of(store) / FILE_NAME


class Mirrored(NamedTuple):
    """What the catalog has of an interval. `said`: as `said_of`; `seen`: as `seen_of`, when it was written."""

    interval: Interval
    said: str | None
    seen: str


class Catalog:
    """The catalog of a store. Raises DamageError when SQLite cannot read it; the hint says how to make it anew."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store = store
        self.path = path
        read_only = not os.access(path.parent, os.W_OK)  # somebody who may look, and no more
        frozen = os.access(path, os.R_OK) and read_only
        name = ":memory:" if read_only else os.fspath(path)
        if frozen:
            name = path.absolute().as_uri() + "?immutable=1"
        if not read_only and not path.exists():  # SQLite would make it as the umask says
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            self._connection = sqlite3.connect(name, timeout=BUSY_SECONDS, check_same_thread=False, uri=frozen)
        except sqlite3.DatabaseError as error:
            raise _damaged(path, error) from None
        try:
            if not read_only:
                self._write_ahead()
            if not frozen:
                self._prepare()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise _damaged(path, error) from None

    def _write_ahead(self) -> None:
        """SQLite's timeout does not hold for this: who makes the same catalog just now would be an error at once."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(0.02)

    @cached_property
    def _db(self) -> sqlite_utils.Database:
        """To write with. A command that only reads does not wait for the library: it takes longer than the reading."""
        import sqlite_utils

        return sqlite_utils.Database(self._connection)

    @classmethod
    def open(cls, store: Store) -> Catalog:
        """Open the catalog of a store; where there is none it is made, in memory by whoever may not write it."""
        make_notes(store)
        return cls(store, catalog_file(store))

    def _prepare(self) -> None:
        """Have the tables of this version. Several may be at it at once: each looks again when it has it to itself."""
        if self._version() == SCHEMA_VERSION:
            return
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:
            self._make_tables(self._version())

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _make_tables(self, version: int) -> None:
        if version and version < SCHEMA_VERSION:  # the agent, or a rebuild, fills it again
            self._db.table("intervals").drop(ignore=True)
            self._db.table("history").drop(ignore=True)
        self._db.table("boundaries").create(
            {"number": int, "write": int, "time_ns": int, "content": str}, pk="number", if_not_exists=True
        )
        self._db.table("intervals").create(
            {"number": int, "to_time_ns": int, "content": str, "transactions": str, "seen": str, "checksum": str},
            pk="number",
            if_not_exists=True,
        )
        self._db.table("history").create(
            {"name": str, "kind": str, "time_ns": int, "interval": int, "content": str, "checksum": str},
            pk="name",
            if_not_exists=True,
        )
        self._db.table("history").create_index(["kind", "time_ns"], if_not_exists=True)
        if version < SCHEMA_VERSION:
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _rows(self, sql: str, values: tuple[object, ...] = ()) -> list[dict[str, Any]]:
        names, rows = self._select(sql, values)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _select(self, sql: str, values: tuple[object, ...] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Names of columns, and the rows."""
        try:
            cursor = self._connection.execute(sql, values)
            return [column[0] for column in cursor.description], cursor.fetchall()
        except sqlite3.DatabaseError as error:
            raise _damaged(self.path, error) from None

    def _put(self, table: str, row: dict[str, Any]) -> None:
        try:
            with self._connection:
                self._db.table(table).upsert(row)
        except sqlite3.DatabaseError as error:
            raise _damaged(self.path, error) from None

    def put_baseline(self, boundary: Boundary) -> None:
        """Mirror boundary 0 (its truth is store.json)."""
        row = {"number": boundary.number, "write": boundary.write, "time_ns": boundary.time_ns}
        self._put("boundaries", {**row, "content": json.dumps(boundary._asdict())})

    def baseline(self) -> Boundary | None:
        """Boundary 0, if the first copy is over."""
        rows = self._rows("select content from boundaries where number = 0")
        return Boundary(**json.loads(rows[0]["content"])) if rows else None

    def put_interval(self, bundle: Bundle) -> None:
        """Mirror a published interval and its boundary; harmless when done twice."""
        interval = bundle.interval
        content = _content(interval)
        transactions = said_of(bundle)
        row = {"number": interval.number, "to_time_ns": interval.to_time_ns, "content": content}
        self.put_baseline(interval.boundary)
        seen = seen_of(bundle.path)
        checksum = _checksum(content, transactions, seen)
        self._put("intervals", {**row, "transactions": transactions, "seen": seen, "checksum": checksum})

    def remove_interval(self, number: int) -> None:
        """Forget an interval that was expired. Its boundary stays known."""
        try:
            with self._connection:
                self._db.table("intervals").delete_where("number = ?", [number])
        except sqlite3.DatabaseError as error:
            raise _damaged(self.path, error) from None

    def intervals(self) -> dict[int, Mirrored]:
        """By number, in order: what each manifest says that is still the one which was `seen`.

        A row that is not as it was written is left out, and all of another version are: of an older one where it cannot
        be written, of a newer one anywhere.
        """
        if self._select("PRAGMA user_version")[1] != [(SCHEMA_VERSION,)]:
            return {}
        rows = self._select("select content, transactions, seen, checksum from intervals order by number")[1]
        whole = [(content, said, seen) for content, said, seen, sum_ in rows if _checksum(content, said, seen) == sum_]
        # Parsed as one text: there can be ten thousand, and each call of a parser costs.
        found = map(_interval, json.loads(f"[{','.join(content for content, _, _ in whole)}]"))
        return {
            interval.number: Mirrored(interval, said, seen)
            for interval, (_, said, seen) in zip(found, whole, strict=True)
        }

    def remember(self, kind: HistoryKind, time_ns: int, content: dict[str, Any]) -> None:
        """Add to the history: its file first, durably, then the row. Content may name an "interval"."""
        self.put_history(add_history(self.store, kind, time_ns, content), kind, time_ns, content)

    def put_history(self, name: str, kind: str, time_ns: int, content: dict[str, Any]) -> None:
        """Mirror a history file."""
        interval, text = content.get("interval"), json.dumps(content)
        row = {"name": name, "kind": kind, "time_ns": time_ns, "interval": interval, "content": text}
        self._put("history", {**row, "checksum": _sum_of(row)})

    def history(self, kind: HistoryKind, limit: int = 100) -> list[dict[str, Any]]:
        """Contents of the newest entries of a kind, newest first, each with its `time_ns`."""
        sql = f"select {_HISTORY} from history where kind = ? order by name desc limit ?"
        return [_entry(row) for row in self._rows(sql, (kind, limit)) if _sum_of(row) == row["checksum"]]

    def history_names(self) -> set[str]:
        """The entries that are mirrored, by the names of their files."""
        return set(self.history_told())

    def history_told(self) -> dict[str, tuple[str, int, Any]]:
        """Of each entry, by the name of its file: kind, time and content as they are mirrored; None for no JSON."""
        return {
            str(row["name"]): (str(row["kind"]), int(row["time_ns"]), _parsed(row["content"]))
            for row in self._rows(f"select {_HISTORY} from history")
            if _sum_of(row) == row["checksum"]
        }

    def check(self) -> None:
        """Have SQLite look at every page, and compare each row with its checksum. Raises DamageError."""
        said = [str(row[0]) for row in self._select("pragma integrity_check")[1]]
        if said != ["ok"]:
            raise _damaged(self.path, sqlite3.DatabaseError("; ".join(said[:3])))
        rows = self._select("select number, content, transactions, seen, checksum from intervals")[1]
        wrong = [row[0] for row in rows if _checksum(*row[1:4]) != row[4]]
        wrong += [
            row["name"] for row in self._rows(f"select {_HISTORY} from history") if _sum_of(row) != row["checksum"]
        ]
        if wrong:
            raise _damaged(self.path, sqlite3.DatabaseError(f"what it says of {wrong[0]} is not as it was written"))

    def last_verification(self, interval: int) -> dict[str, Any] | None:
        """The newest verification of a point in this interval, or None."""
        sql = f"select {_HISTORY} from history where kind = 'verification' and interval = ? order by name desc limit 1"
        rows = self._rows(sql, (interval,))
        return _entry(rows[0]) if rows and _sum_of(rows[0]) == rows[0]["checksum"] else None

    def close(self) -> None:
        """Close the database. Harmless when done twice."""
        self._connection.close()


def said_of(bundle: Bundle) -> str | None:
    """JSON of what `Bundle.transactions` says; None when it was not indexed."""
    return None if bundle.transactions is None else json.dumps(bundle.transactions)


def seen_of(place: Path | str) -> str | None:
    """Which file the manifest in a directory is, and of when; None when there is none.

    A manifest that was replaced, by retention or with the store, is another one.
    """
    try:
        status = os.stat(f"{place}/manifest.json")
    except OSError:
        return None
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _sum_of(row: dict[str, Any]) -> str:
    """The checksum of a row of the history."""
    said = [row[name] for name in ("name", "kind", "time_ns", "interval", "content")]
    return xxhash.xxh3_64_hexdigest(json.dumps(said).encode())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    return {**cast("dict[str, Any]", json.loads(row["content"])), "time_ns": row["time_ns"]}


def _checksum(content: str, transactions: str | None, seen: str | None) -> str:
    return xxhash.xxh3_64_hexdigest(f"{content}\n{transactions}\n{seen}".encode())


_BOUNDARY, _REWINDS, _GAPS, _OUTSIDE = map(Interval._fields.index, ("boundary", "rewinds", "gaps", "outside"))


def _content(interval: Interval) -> str:
    values: list[Any] = [*interval]
    values[_REWINDS] = [astuple(each) for each in interval.rewinds]
    values[_GAPS] = [astuple(each) for each in interval.gaps]
    return json.dumps(values)


def _interval(values: list[Any]) -> Interval:
    """What `_content` was made of: there can be ten thousand, so this is short."""
    values[_BOUNDARY] = Boundary._make(values[_BOUNDARY])
    values[_REWINDS] = tuple(Rewind(*each) for each in values[_REWINDS]) if values[_REWINDS] else ()
    values[_GAPS] = tuple(Gap(*each) for each in values[_GAPS]) if values[_GAPS] else ()
    if values[_OUTSIDE] is not None:
        values[_OUTSIDE] = tuple((name, place) for name, place in values[_OUTSIDE])
    return Interval._make(values)


_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
}


def _damaged(path: Path, error: Exception) -> PgcdpError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK:
        return PgcdpError(
            f"the catalog {path} cannot be used now: {str(error).lower()}",
            "see that its disk is well and has room",
        )
    return DamageError(
        f"the catalog {path} cannot be read: {str(error).lower()} (offset unknown to sqlite)",
        "nothing is only in it; pgcdp rebuild makes it anew from the store",
    )
