"""What a view needs and no published interval has, copied into a frames file of the view's own (FORMAT.md 5).

Of the open interval the frames that hold the last content of a block, as they are stored; of the journal's writes the
last content of each block, once; and a write whose WAL is blank from an LSN on. So neither the journal nor `incoming/`
has to be kept for a view.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.journal import BatchRun
from pgcdp.intervals.applying import run_index
from pgcdp.intervals.extents import forward_map
from pgcdp.postgres.wal import blank_wal
from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, RecoveryPoint
from pgcdp.recovery.mapfile import PATCH
from pgcdp.recovery.source import Source
from pgcdp.store.frames import FrameReader, FrameWriter

KEPT_BYTES = 64 << 20
"""Of the journal, from the first look at it to the second; if there is more, it is read twice."""


class Patch:
    """A frames file that grows; nothing is made before something is put in. Close it with `finish`."""

    def __init__(self, path: Path, set_id: bytes) -> None:
        self.path = path
        self._set_id = set_id
        self._writer: FrameWriter | None = None

    def append(self, data: bytes | memoryview) -> int:
        """Put bytes in; their position in the stream."""
        return self._made().append(data)

    def _made(self) -> FrameWriter:
        if self._writer is None:
            self._writer = FrameWriter.create(self.path, PATCH, self._set_id, 0)
        return self._writer

    def finish(self) -> None:
        """Finish the file, if there is one."""
        if self._writer is not None:
            self._writer.finish()

    # --- the tail

    def take_tail(self, source: Source, done: int, upto: int) -> NDArray[np.void]:
        """Copy what writes `done` + 1 to `upto` leave behind: an array EXTENT over this file.

        They are in no published interval. When one is published meanwhile this raises what `Source.again` repeats; what
        was copied until then is not used by anybody.
        """
        parts: list[NDArray[np.void]] = []
        opened = source.snapshot(done + 1)
        try:
            stored = 0
            if opened is not None:
                parts.append(opened.index[opened.index["number"] <= upto])
                stored, done = opened.writes.length, int(parts[0]["number"][-1])
            kept: list[BatchRun] | None = []
            at = stored
            for run in source.batches(done, upto) if done < upto else ():
                index = run_index(run)
                index["position"] += at
                at += len(run.data)
                parts.append(index)
                if kept is not None and at - stored <= KEPT_BYTES:
                    kept.append(run)
                else:
                    kept = None
            table = np.concatenate(parts)
            left = forward_map(table)
            data = np.flatnonzero(left["kind"] == EXTENT_DATA)
            data = data[np.argsort(left["source"][data], kind="stable")]
            behind = int(np.searchsorted(left["source"][data], np.uint64(stored)))
            if opened is not None:
                self._copy_stored(left, data[:behind], opened.writes)
            if behind < len(data):
                again = kept if kept is not None else source.batches(done, upto)
                self._copy_journal(left, data[behind:], table, again)
            return left
        finally:
            if opened is not None:
                opened.writes.close()

    def _copy_stored(self, left: NDArray[np.void], rows: NDArray[np.int64], writes: FrameReader) -> None:
        """Copy the frames of which something is left, as they are. `rows` are in order of `source`."""
        begin = left["source"][rows]
        starts = np.array([entry.position for entry in writes.entries], dtype=np.uint64)
        first = np.searchsorted(starts, begin, side="right") - 1
        behind = np.searchsorted(starts, begin + left["count"][rows].astype(np.uint64) * BLOCK, side="left")
        holds = np.zeros(len(starts) + 1, dtype=np.int64)
        np.add.at(holds, first, 1)
        np.subtract.at(holds, behind, 1)
        copied = np.zeros(len(starts), dtype=np.uint64)
        for number in np.flatnonzero(np.cumsum(holds)).tolist():  # those of one extent follow each other here as well
            copied[number] = self._made().adopt(writes.frame(writes.entries[number]))
        left["source"][rows] = copied[first] + (begin - starts[first])

    def _copy_journal(
        self, left: NDArray[np.void], rows: NDArray[np.int64], table: NDArray[np.void], runs: Iterable[BatchRun]
    ) -> None:
        first = int(table["number"][0])
        at = 0
        for run in runs:
            while at < len(rows) and int(left["write"][rows[at]]) <= run.last_write:
                extent = left[rows[at]]
                begin = int(extent["source"]) - int(table["position"][int(extent["write"]) - first])
                left["source"][rows[at]] = self.append(_data_of(run, int(extent["write"]), begin, int(extent["count"])))
                at += 1

    # --- the end of WAL

    def take_blank(self, source: Source, point: RecoveryPoint) -> NDArray[np.void]:
        """The write of a point whose WAL is blank from an LSN on; none when there is no such write."""
        if point.blank_write is None:
            return np.empty(0, dtype=EXTENT)
        assert point.lsn is not None
        assert point.blank_at is not None
        entry = source.record(point.blank_write)
        data = blank_wal(source.data(point.blank_write), point.blank_at, point.lsn)
        extent = np.zeros(1, dtype=EXTENT)
        extent["volume"], extent["block"] = entry["volume"], int(entry["offset"]) // BLOCK
        extent["count"], extent["write"] = len(data) // BLOCK, point.blank_write
        extent["source"] = self.append(data)
        return extent


def _data_of(run: BatchRun, write: int, begin: int, count: int) -> bytes:
    at = int(run.data_offsets[write - run.first_write]) + begin
    return run.data[at : at + count * BLOCK].tobytes()
