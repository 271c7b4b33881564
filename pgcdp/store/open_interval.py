"""The open interval below `incoming/`: two growing streams, the writes' data and their index.

`sync()` syncs the data first and the index second, so an index entry that is durable has its data behind it. A restart
keeps the longest run of writes that both files hold whole; what the journal was told to release must be among them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import BugError, DamageError
from pgcdp.fsio import make_directory, read_json, sync_directory, write_json
from pgcdp.records import BLOCK, INDEX, Boundary
from pgcdp.store.frame_format import HINT
from pgcdp.store.frames import DEFAULT_LEVEL, HEADER_BYTES, FileSummary, FrameReader, FrameWriter
from pgcdp.store.layout import Store, boundary_from

WRITES = b"WRIT"
INDEX_CONTENT = b"INDX"
SETTINGS = "settings.json"
OUTSIDE = "outside.json"
"""{"outside": [[name, place], ...]}: data of the cluster that nobody captured; the manifest has it in the end."""
T = TypeVar("T")


class Run(Protocol):
    """What `append` takes: a `capture.journal.BatchRun`."""

    @property
    def records(self) -> NDArray[np.void]:
        """Array RECORD."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """Data areas, each record's data padded to whole blocks."""

    @property
    def data_offsets(self) -> NDArray[np.int64]:
        """Where each record's data begins in `data`."""


class OpenInterval:
    """Interval `number`, beginning with write `from_write`; holds writes up to `last_write` (from_write - 1: none).

    `synced_write` is the last one that is durable here: the journal may be released up to it. `boundary` is where it
    ends, once that is known. One at a time may write an interval; the store's lock sees to that.
    """

    def __init__(
        self, path: Path, number: int, from_write: int, writes: FrameWriter, index: FrameWriter, table: NDArray[np.void]
    ) -> None:
        self.path = path
        self.number = number
        self.from_write = from_write
        self.last_write = from_write + len(table) - 1
        self.synced_write = self.last_write
        self.bytes_written = int(table["data_length"].sum())
        self.boundary: Boundary | None = None
        self._writes = writes
        self._index = index
        self._parts = [table] if len(table) else []
        self._streams: tuple[FileSummary, FileSummary] | None = None

    @classmethod
    def open(
        cls, store: Store, number: int, from_write: int, *, durable_write: int = 0, level: int = DEFAULT_LEVEL
    ) -> OpenInterval:
        """Make `incoming/NNNNNNNNNN`, or take it up after a kill or an error and cut both streams to what is durable.

        `durable_write`: the last write that was reported as durable here (the journal's released write); what lies
        behind it is in the journal. If it is not in the files any more that is DamageError, never a cut tail.
        """
        path = store.incoming(number)
        made = path.is_dir() and (path / "index").exists() and (path / "writes").exists()
        if made and durable_write < from_write and min(_size(path / "index"), _size(path / "writes")) < HEADER_BYTES:
            made = False
        if not made:
            if durable_write >= from_write:
                raise DamageError(
                    f"{path} lacks its files: writes {from_write} to {durable_write} are lost (offset 0)",
                    f"everything up to write {from_write - 1} can still be restored",
                )
            return cls._create(store, number, from_write, level)
        boundary = _known_boundary(path)
        if boundary is not None:
            durable_write = max(durable_write, boundary.write)
        opened = cls._resume(store, number, from_write, durable_write, level)
        opened.boundary = boundary
        return opened

    @classmethod
    def _create(cls, store: Store, number: int, from_write: int, level: int) -> OpenInterval:
        path = store.incoming(number)
        make_directory(path)
        writes = FrameWriter.create(path / "writes", WRITES, store.set_id, number, level=level)
        index = FrameWriter.create(path / "index", INDEX_CONTENT, store.set_id, number, level=level)
        sync_directory(path)
        return cls(path, number, from_write, writes, index, np.empty(0, dtype=INDEX))

    @classmethod
    def _resume(cls, store: Store, number: int, from_write: int, durable_write: int, level: int) -> OpenInterval:
        path = store.incoming(number)
        durable = max(0, durable_write - from_write + 1)
        with ExitStack() as failing:
            index = FrameWriter.resume(
                path / "index", INDEX_CONTENT, store.set_id, number, durable=durable * INDEX.itemsize, level=level
            )
            failing.callback(index.close)
            with index.reader() as reader:
                raw = reader.read_stream()
            table = np.frombuffer(raw[: len(raw) // INDEX.itemsize * INDEX.itemsize], dtype=INDEX)
            numbers = np.arange(from_write, from_write + len(table), dtype=np.uint64)
            if not np.array_equal(table["number"], numbers):
                raise DamageError(f"{path / 'index'} does not begin with write {from_write} (offset {HEADER_BYTES})")
            ends = (table["position"] + table["data_length"]).astype(np.int64)
            writes = FrameWriter.resume(
                path / "writes",
                WRITES,
                store.set_id,
                number,
                durable=int(ends[durable - 1]) if durable else 0,
                level=level,
            )
            failing.callback(writes.close)
            whole = int(np.searchsorted(ends, writes.length, side="right"))
            end = int(ends[whole - 1]) if whole else 0
            index.cut(whole * INDEX.itemsize)
            writes.cut(end)
            if whole * INDEX.itemsize != index.length or end != writes.length:
                raise DamageError(
                    f"{path / 'writes'} ends at byte {writes.length} of its stream, its index at write "
                    f"{from_write + whole - 1} (offset {writes.file_bytes})"
                )
            opened = cls(path, number, from_write, writes, index, table[:whole])
            opened.sync()
            failing.pop_all()
            return opened

    def append(self, run: Run) -> NDArray[np.void]:
        """Append the writes of a run; the first must be `last_write + 1`. Returns their entries, an array INDEX.

        Nothing is durable before `sync()`. Raises BugError when the run does not follow or a boundary is set.
        """
        records = run.records
        entries = np.zeros(len(records), dtype=INDEX)
        if not len(records):
            return entries
        if int(records["number"][0]) != self.last_write + 1 or self.boundary is not None:
            raise BugError(
                f"interval {self.number} holds writes up to {self.last_write}, it cannot take {records['number'][0]}"
            )
        lengths = records["data_length"].astype(np.int64)
        entries.view(np.uint8).reshape(-1, 64)[:, :48] = records.view(np.uint8).reshape(-1, 48)
        ends = np.cumsum(lengths)
        entries["position"] = self._writes.length + ends - lengths
        if np.any(lengths % BLOCK):
            for begin, length in zip(run.data_offsets.tolist(), lengths.tolist(), strict=True):
                self._writes.append(run.data[begin : begin + length].data)
        else:
            self._writes.append(run.data.data)
        self._index.append(entries.tobytes())
        self._parts.append(entries)
        self.last_write = int(records["number"][-1])
        self.bytes_written += int(ends[-1])
        return entries

    def sync(self) -> int:
        """Make everything appended durable, data before index; returns `synced_write`."""
        if self._streams is None:
            self._writes.sync()
            self._index.sync()
        self.synced_write = self.last_write
        return self.synced_write

    def index(self) -> NDArray[np.void]:
        """The write index so far, an array INDEX."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts)] if self._parts else [np.empty(0, dtype=INDEX)]
        return self._parts[0]

    def reader(self) -> FrameReader:
        """A reader of the writes' data so far; the caller closes it."""
        return self._writes.reader()

    def set_boundary(self, boundary: Boundary) -> None:
        """Remember durably that the interval ends here, so that a restart goes on with closing it.

        Raises BugError unless `last_write` is the boundary's write.
        """
        if boundary.write != self.last_write or boundary.number != self.number:
            raise BugError(
                f"boundary {boundary.number} at write {boundary.write} does not end interval {self.number}, "
                f"which holds writes up to {self.last_write}"
            )
        self.sync()
        write_json(self.path / "boundary.json", boundary._asdict())
        self.boundary = boundary

    def finish(self) -> tuple[FileSummary, FileSummary]:
        """Finish both streams, durably; returns what they are: `writes`, `index`."""
        if self._streams is None:
            self._streams = (self._writes.finish(), self._index.finish())
            self.synced_write = self.last_write
        return self._streams

    def close(self) -> None:
        """Close the files; what was not synced may be lost. Harmless when done twice."""
        self._writes.close()
        self._index.close()


@dataclass(frozen=True, slots=True)
class OpenSnapshot:
    """What an unpublished interval held when it was looked at. The caller closes `writes`."""

    number: int
    index: NDArray[np.void]
    writes: FrameReader
    boundary: Boundary | None


def read_open(store: Store, number: int) -> OpenSnapshot:
    """Look at `incoming/NNNNNNNNNN` without touching it, also while the agent appends to it.

    Raises FileNotFoundError when it is not (or no longer) there: it has been published. Raises DamageError with file
    and offset for what is broken before the last whole frame.
    """
    return _judged(lambda: _snapshot(store, number))


def read_open_index(store: Store, number: int) -> NDArray[np.void]:
    """The index of `read_open` (array INDEX), without reading the writes' data. Raises the same."""
    return _judged(lambda: _whole_index(store, number))


def read_open_last(store: Store, number: int) -> np.void | None:
    """The last entry of `read_open_index`, without reading what lies before it; None: no write yet. Raises the same."""
    return _judged(lambda: _last_entry(store, number))


def _judged(look: Callable[[], T]) -> T:
    """A restarted agent cuts and writes again what lies behind its last whole write: damage counts when it stays."""
    try:
        return look()
    except DamageError:
        return look()


def _snapshot(store: Store, number: int) -> OpenSnapshot:
    path = _place(store, number)
    writes = FrameReader.open(path / "writes", WRITES, store.set_id, number, unfinished=True)
    try:
        table = _clipped(store, number, writes.length)
        return OpenSnapshot(number, table, writes, _known_boundary(path))
    except BaseException:
        writes.close()
        raise


def _whole_index(store: Store, number: int) -> NDArray[np.void]:
    path = _place(store, number)
    with FrameReader.open_end(path / "writes", WRITES, store.set_id, number) as writes:
        return _clipped(store, number, writes.length)


def _clipped(store: Store, number: int, length: int) -> NDArray[np.void]:
    """Index entries whose data lies within the first `length` bytes of the writes' stream."""
    path = store.incoming(number) / "index"
    with FrameReader.open(path, INDEX_CONTENT, store.set_id, number, unfinished=True) as reader:
        raw = reader.read_stream()
    table = np.frombuffer(raw[: len(raw) // INDEX.itemsize * INDEX.itemsize], dtype=INDEX)
    return table[: _whole(table, length)]


def _last_entry(store: Store, number: int) -> np.void | None:
    path = _place(store, number)
    with FrameReader.open_end(path / "writes", WRITES, store.set_id, number) as writes:
        length = writes.length
    with FrameReader.open_end(path / "index", INDEX_CONTENT, store.set_id, number) as reader:
        if not reader.entries:
            return None
        begin = -(-reader.entries[0].position // INDEX.itemsize) * INDEX.itemsize
        end = reader.length // INDEX.itemsize * INDEX.itemsize
        table = np.frombuffer(reader.read(begin, max(0, end - begin)), dtype=INDEX)
    whole = _whole(table, length)
    if not whole:  # the index is a frame ahead of the data
        table = _clipped(store, number, length)
        whole = len(table)
    return table[whole - 1] if whole else None


def _whole(table: NDArray[np.void], length: int) -> int:
    """How many entries of an index have their data within `length` bytes."""
    ends = (table["position"] + table["data_length"]).astype(np.int64)
    return int(np.searchsorted(ends, length, side="right"))


def _place(store: Store, number: int) -> Path:
    """The directory of an open interval whose two files are there, as far as their headers.

    Raises FileNotFoundError while they are being made and when they are published, DamageError when one is lost.
    """
    path = store.incoming(number)
    sizes = {path / name: _size(path / name) if (path / name).exists() else -1 for name in ("writes", "index")}
    short, size = min(sizes.items(), key=lambda item: item[1])
    if size >= HEADER_BYTES:
        return path
    if max(sizes.values()) <= HEADER_BYTES or not path.is_dir():
        raise FileNotFoundError(path)
    what = "is missing (offset 0)" if size < 0 else f"ends at offset {size}, inside its header"
    raise DamageError(f"{short} {what}", HINT)


def _known_boundary(path: Path) -> Boundary | None:
    """Where an unpublished interval ends: `boundary.json`, which goes only when the manifest says the same."""
    for name in ("boundary.json", "manifest.json"):
        try:
            content = read_json(path / name)
        except FileNotFoundError:
            continue
        return boundary_from(content["boundary"] if name == "manifest.json" else content, path / name)
    return None


def _size(path: Path) -> int:
    return os.stat(path).st_size
