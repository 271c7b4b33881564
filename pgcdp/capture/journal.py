"""Reads the journal that the engine writes (FORMAT.md section 1), also while it is being written.

The reader judges only what it was told is durable: whoever calls `batches` passes a write that the engine has
reported as durable, and bytes behind its batch are never looked at. A segment is listed after that report, so every
segment that holds such a write is in the list. Segments disappear only when all their writes are released, and the
reader never opens one below the write it starts from.

Batches are small (about 12 KB under pgbench), so they are handed out in runs of several: per batch there is one
unpack and one hash, everything else is numpy over the run.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp import fsio
from pgcdp.capture.segment import CHUNK_BYTES, SEGMENT_HEADER_BYTES, Head, Segment, Window
from pgcdp.errors import DamageError
from pgcdp.records import BLOCK, RECORD, Position

MARK_BYTES = 4096
FORMAT = 1
"""Format version of journals that this reader and the engine beside it know."""

_MARK_MAGIC = b"PGCDPAPL"
_MARK = struct.Struct("<8sII16sQQQQQQQQI4xQQQ")
_CLEAN = 1
"""Flag of the applied mark."""
_CHECKSUM_AT = 88
_NO_DATA: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)


class Tracking(NamedTuple):
    """What the applied mark has of the bitmap of changed blocks (FORMAT.md 1.8), should that be lost; never idle."""

    state: int
    since_ns: int
    behind: int
    begin_ns: int


@dataclass(frozen=True, slots=True)
class AppliedMark:
    """The applied mark (FORMAT.md 1.4). `position` is where batch `durable_batch` ended; `tracking`: None when idle."""

    sequence: int
    clean: bool
    applied_write: int
    released_write: int
    durable_write: int
    durable_batch: int
    position: Position
    tracking: Tracking | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BatchRun:
    """One or several consecutive batches, or the part of them that was asked for.

    `records` is an array RECORD, `data` the uint8 data areas one after another, `data_offsets` (int64) where each
    record's data begins in `data`. `batch_ends` (int64) are the last writes of the batches. `number` is the number of
    the first batch, `position` its place; `end` is where write `last_write + 1` is looked for: the `start` of the
    next call.
    """

    number: int
    records: NDArray[np.void]
    data: NDArray[np.uint8]
    data_offsets: NDArray[np.int64]
    batch_ends: NDArray[np.int64]
    position: Position
    end: Position

    def __len__(self) -> int:
        return len(self.records)

    @property
    def first_write(self) -> int:
        """Number of the first write; the run must not be empty."""
        return int(self.records["number"][0])

    @property
    def last_write(self) -> int:
        """Number of the last write; the run must not be empty."""
        return int(self.records["number"][-1])

    def data_of(self, i: int) -> NDArray[np.uint8]:
        """Data of record `i`, without padding."""
        begin = int(self.data_offsets[i])
        return self.data[begin : begin + int(self.records["data_length"][i])]

    def _part(self, begin: int, end: int) -> BatchRun:
        records = self.records[begin:end]
        if not len(records):
            return replace(self, records=records, data=_NO_DATA, data_offsets=self.data_offsets[:0])
        first = int(self.data_offsets[begin])
        last = int(self.data_offsets[end]) if end < len(self.records) else len(self.data)
        return replace(
            self, records=records, data=self.data[first:last], data_offsets=self.data_offsets[begin:end] - first
        )

    def upto(self, write: int) -> BatchRun:
        """The part with writes up to `write`; may be empty. Its `end` is still that of the whole run."""
        if not len(self) or write >= self.last_write:
            return self
        return self._part(0, max(0, write + 1 - self.first_write))

    def after(self, write: int) -> BatchRun:
        """The part with writes behind `write`; may be empty."""
        if not len(self) or write < self.first_write:
            return self
        return self._part(min(len(self), write + 1 - self.first_write), len(self))


class _Gather:
    """Batches on their way into one run."""

    def __init__(self) -> None:
        self.number = 0
        self.position = Position(0, 0)
        self.records = bytearray()
        self.data = np.empty(2 * CHUNK_BYTES, dtype=np.uint8)
        self.filled = 0
        self.ends: list[int] = []
        self.bytes = 0

    def add(self, head: Head, position: Position, records: memoryview, data: memoryview) -> None:
        if not self.ends:
            self.number, self.position = head.number, position
        self.records += records
        end = self.filled + len(data)
        if end > len(self.data):
            self.data = np.concatenate([self.data[: self.filled], np.empty(end - self.filled, dtype=np.uint8)])
        self.data[self.filled : end] = data
        self.filled = end
        self.ends.append(head.last)
        self.bytes += head.length

    def run(self, end: Position) -> BatchRun:
        records = np.frombuffer(bytes(self.records), dtype=RECORD)
        data = self.data[: self.filled]
        data.flags.writeable = False
        padded = (records["data_length"].astype(np.int64) + (BLOCK - 1)) & -BLOCK
        offsets = np.cumsum(padded) - padded
        numbers = records["number"]
        begin = int(numbers[0])
        if int(padded.sum()) != len(data) or not np.array_equal(
            numbers, np.arange(begin, begin + len(records), dtype=np.uint64)
        ):
            raise DamageError(
                f"segment {self.position.segment} has records that contradict their batch, in batches from "
                f"{self.number} on, offset {self.position.offset}",
                f"everything up to write {begin - 1} can still be restored",
            )
        ends = np.array(self.ends, dtype=np.int64)
        return BatchRun(self.number, records, data, offsets, ends, self.position, end)


class LostWritesError(DamageError):
    """Writes that were durable in a journal cannot be read from it."""


class Journal:
    """Read-only access to a journal directory. Raises DamageError naming segment file and offset.

    Not for several threads at once.
    """

    def __init__(self, directory: Path, set_id: bytes) -> None:
        self.directory = directory
        self.set_id = set_id
        self.window = Window()
        self.peeking = Window()

    def path(self, sequence: int) -> Path:
        """File of a segment."""
        return self.directory / f"{sequence:016d}.seg"

    def segments(self) -> list[int]:
        """Sequence numbers of the segments present, in order."""
        names = os.listdir(self.directory)
        return sorted(int(name[:16]) for name in names if re.fullmatch(r"\d{16}\.seg", name))

    def applied_mark(self) -> AppliedMark | None:
        """The newest valid slot of the applied mark; None if there is no mark file. DamageError if no slot is valid."""
        marks = self.applied_marks()
        return None if marks is None else max(marks, key=lambda mark: mark.sequence)

    def applied_marks(self) -> list[AppliedMark] | None:
        """Each valid slot of it, one or two; as `applied_mark`."""
        path = self.directory / "applied"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        marks = [mark for slot in (0, 1) if (mark := self._slot(raw[slot * MARK_BYTES : (slot + 1) * MARK_BYTES]))]
        if not marks:
            raise DamageError(
                f"{path} has no valid slot at offsets 0 and {MARK_BYTES}",
                "the store's intervals are not touched by this and can still be restored",
            )
        return marks

    def _slot(self, slot: bytes) -> AppliedMark | None:
        if len(slot) < MARK_BYTES:
            return None
        magic, version, flags, owner, sequence, *rest = _MARK.unpack_from(slot)
        applied, released, durable, batch, segment, offset, checksum, *tracking = rest
        if magic != _MARK_MAGIC or version != FORMAT or owner != self.set_id or _checksum_of(slot) != checksum:
            return None
        told = Tracking(*tracking) if tracking[0] else None
        place = Position(segment, offset)
        return AppliedMark(sequence, bool(flags & _CLEAN), applied, released, durable, batch, place, told)

    def batches(self, after_write: int, upto_write: int | None, start: Position | None = None) -> Iterator[BatchRun]:
        """Runs of batches with the writes behind `after_write`, up to and including `upto_write`.

        `upto_write` must be durable as the engine reports it, or None: to the end of a journal that nobody writes,
        by the rules of FORMAT.md 1.5. `start` is the `end` of the last run of an earlier call that ended at
        `after_write`. Raises DamageError for everything at or below `upto_write` that is not as it was written.
        """
        if upto_write is not None and upto_write <= after_write:
            return
        walk = _Walk(self, after_write, upto_write)
        try:
            yield from walk.runs(start)
        finally:
            walk.close()

    def last_write(self, after_write: int = 0) -> int:
        """Last write of a journal that nobody writes; `after_write` when it holds none behind it. Checks all of it."""
        last = after_write
        for run in self.batches(after_write, None):
            last = run.last_write
        return last


class _Walk:
    """One pass over the journal by the rules of FORMAT.md 1.5."""

    def __init__(self, journal: Journal, after: int, upto: int | None) -> None:
        self.journal = journal
        self.after = after
        self.upto = upto
        self.current: Segment | None = None
        self.exits: dict[int, int] = {}
        self.number = 0
        self.last = after
        try:
            self.sequences = journal.segments()
        except FileNotFoundError:
            if upto is None:
                raise
            raise self.damage(f"{journal.directory} is missing") from None

    def close(self) -> None:
        """Close the segment that is being read."""
        if self.current is not None:
            self.current.close()
            self.current = None

    def damage(self, what: str) -> DamageError:
        """The error for something unreadable: which writes are gone and which are not."""
        good = max(self.last, self.after)
        lost = f"from {good + 1} on" if self.upto is None else f"{good + 1} to {self.upto}"
        return LostWritesError(
            f"{what}: writes {lost} are lost", f"everything up to write {good} can still be restored"
        )

    def opened(self, sequence: int, window: Window) -> Segment:
        """A segment. Raises FileNotFoundError, DamageError."""
        try:
            return Segment(self.journal.path(sequence), sequence, self.journal.set_id, window)
        except DamageError as damage:
            raise self.damage(damage.message) from None

    def peek(self, sequence: int) -> Head | None:
        """The first batch of a segment if it is valid; None also when the segment is gone."""
        try:
            segment = self.opened(sequence, self.journal.peeking)
        except FileNotFoundError:
            return None
        try:
            return segment.batch(SEGMENT_HEADER_BYTES, whole_window=False)
        finally:
            segment.close()

    def enter(self, sequence: int) -> Segment:
        """Open a segment and learn where it is left: offset -> next segment (rule 3).

        The newest segment that names an offset counts: one whose very first batch could not be synced holds a batch
        that was given up, and the segment behind it begins with the same number at the same place.
        """
        self.close()
        self.current = self.opened(sequence, self.journal.window)
        self.exits = {}
        for later in self.sequences[bisect_right(self.sequences, sequence) :]:
            head = self.peek(later)
            if head is not None and head.previous[0] != sequence:
                break
            if head is not None:
                self.exits[head.previous[1]] = later
        return self.current

    def runs(self, start: Position | None) -> Iterator[BatchRun]:
        """Everything that was asked for, in runs of about CHUNK_BYTES."""
        if start is not None and not self.present(start.segment):
            start = None
        place = start if start is not None else self.find()
        if place is None:
            if self.upto is not None:
                raise self.damage(f"{self.journal.directory} holds no valid batch with write {self.after + 1}")
            self.judge_end(Position(self.sequences[0], SEGMENT_HEADER_BYTES) if self.sequences else None)
            return
        came_from = start if start is not None and start.offset > SEGMENT_HEADER_BYTES else None
        segment = self.current or self.enter_wanted(place.segment)
        gather = _Gather()
        while self.upto is None or self.last < self.upto:
            try:
                place, head = self.next_batch(segment, place, came_from)
            except DamageError:  # what lies before it is whole
                if gather.bytes:
                    yield from self.trimmed(gather.run(place), place)
                raise
            if head is None:
                break
            if self.current is not None:
                segment = self.current
            if head.last > self.after:
                gather.add(head, place, *segment.parts(place.offset, head))
            self.last, self.number = head.last, head.number + 1
            came_from = end = Position(place.segment, place.offset + head.length)
            done = self.upto is not None and self.last >= self.upto
            if gather.bytes >= CHUNK_BYTES or (done and gather.bytes):
                yield from self.trimmed(gather.run(end), place)
                gather = _Gather()
            place = end
        if gather.bytes:
            yield from self.trimmed(gather.run(place), place)

    def next_batch(self, segment: Segment, place: Position, came_from: Position | None) -> tuple[Position, Head | None]:
        """The batch that follows, and its place; None at the end of the journal."""
        exit_to = self.exits.get(place.offset)
        if exit_to is not None:
            head = self.peek(exit_to)
            if head is not None and (not self.number or head.number == self.number) and self.follows(head):
                segment = self.enter_wanted(exit_to)
                segment.batch(SEGMENT_HEADER_BYTES)
                return Position(exit_to, SEGMENT_HEADER_BYTES), head
        head = segment.batch(place.offset)
        if head is not None and (
            (self.number and head.number != self.number)
            or not self.follows(head)
            or (came_from is not None and head.previous != (came_from.segment, came_from.offset))
        ):
            head = None
        if head is None:
            if self.upto is not None:
                raise self.unreadable(segment, place)
            self.judge_end(place)
        return place, head

    def follows(self, head: Head) -> bool:
        """Whether its first write is the one after the last; the very first batch may begin earlier."""
        if self.number:
            return head.first == self.last + 1
        return head.first <= self.after + 1

    def trimmed(self, run: BatchRun, last_batch: Position) -> Iterator[BatchRun]:
        """The run without the writes nobody asked for. A batch used in part is where the next call begins."""
        if self.upto is not None and run.last_write > self.upto:
            run = replace(run.upto(self.upto), end=last_batch)
        run = run.after(self.after)
        if len(run):
            yield run

    def enter_wanted(self, sequence: int) -> Segment:
        """`enter` for a segment that must be there."""
        try:
            return self.enter(sequence)
        except FileNotFoundError:
            raise self.damage(f"{self.journal.path(sequence)} is missing") from None

    def present(self, sequence: int) -> bool:
        """Whether a segment can be read. One that ended with the write before the first wanted may be recycled."""
        try:
            self.enter(sequence)
        except FileNotFoundError:
            return False
        return True

    def find(self) -> Position | None:
        """Beginning of the newest segment whose first batch is not behind the first write wanted."""
        first = self.after + 1
        lowest: int | None = None
        bad: Path | None = None
        for sequence in reversed(self.sequences):
            path = self.journal.path(sequence)
            if not path.exists():
                break
            head = self.peek(sequence)
            if head is None:
                bad = bad or (path if lowest is not None else None)
                continue
            if head.first <= first:
                return Position(sequence, SEGMENT_HEADER_BYTES)
            lowest, bad = head.first, None
        if lowest is not None and bad is not None:
            raise self.damage(f"{bad} has a damaged batch at offset {SEGMENT_HEADER_BYTES}")
        if lowest is not None:
            raise self.damage(f"{self.journal.directory} begins with write {lowest}, write {first} is wanted")
        return None

    def unreadable(self, segment: Segment, place: Position) -> DamageError:
        """Which file to name: the next segment, if this one may well end here and that one has no valid batch."""
        later = self.sequences[bisect_right(self.sequences, place.segment) :]
        if later and later[0] != place.segment + 1:
            return self.damage(f"{self.journal.path(place.segment + 1)} is missing")
        if later and not self.exits and not segment.has_magic(place.offset):
            return self.damage(f"{self.journal.path(later[0])} has a damaged batch at offset {SEGMENT_HEADER_BYTES}")
        return self.damage(f"{segment.path} has a damaged batch at offset {place.offset}")

    def judge_end(self, place: Position | None) -> None:
        """Rule 4: raises DamageError unless the journal ends at `place`, with at most a torn tail behind it."""
        mark = self.journal.applied_mark()
        reached = max(self.last, self.after)
        if place is not None:
            path = self.journal.path(place.segment)
            for later in self.sequences[bisect_left(self.sequences, place.segment) :]:
                found = self.valid_batch_behind(later, place.offset if later == place.segment else 0)
                if found is not None:
                    raise self.damage(
                        f"{path} has a damaged batch at offset {place.offset}, "
                        f"a valid one lies at {found} of segment {later}"
                    )
        if mark is not None and mark.durable_write > reached:
            where = f"{self.journal.path(place.segment)} ends at offset {place.offset}" if place else "it is empty"
            raise self.damage(
                f"{self.journal.directory} is damaged: {where}, but write {mark.durable_write} was durable"
            )

    def valid_batch_behind(self, sequence: int, offset: int) -> int | None:
        """Offset of a valid batch behind `offset` in a segment that must not be there if the journal had ended.

        The first batch of a later segment may be the damaged one, so all of a later segment is looked through.
        """
        segment = self.opened(sequence, self.journal.peeking)
        try:
            for at in range(offset + BLOCK, segment.size, BLOCK):
                head = segment.batch(at) if segment.has_magic(at) else None
                if head is not None and head.number >= self.number:
                    return at
        finally:
            segment.close()
        return None


def write_mark(directory: Path, set_id: bytes, mark: AppliedMark) -> None:
    """Write the applied mark of a journal that no capture process has open (FORMAT.md 1.4), durably."""
    place = mark.position
    told = (
        mark.applied_write,
        mark.released_write,
        mark.durable_write,
        mark.durable_batch,
        place.segment,
        place.offset,
    )
    flags = _CLEAN if mark.clean else 0
    tracking = mark.tracking or (0, 0, 0, 0)
    slot = _MARK.pack(_MARK_MAGIC, FORMAT, flags, set_id, mark.sequence, *told, 0, *tracking).ljust(MARK_BYTES, b"\0")
    slot = slot[:_CHECKSUM_AT] + _checksum_of(slot).to_bytes(8, "little") + slot[_CHECKSUM_AT + 8 :]
    fsio.write_atomic(directory / "applied", slot + slot)


def _checksum_of(slot: bytes) -> int:
    return xxhash.xxh3_64_intdigest(slot[:_CHECKSUM_AT] + bytes(8) + slot[_CHECKSUM_AT + 8 :])


def formats(directory: Path) -> set[int]:
    """The format versions that the applied mark and the headers of the segments have now."""
    found = set()
    for file in [directory / "applied", *directory.glob("*.seg")]:
        with suppress(FileNotFoundError), file.open("rb") as content:  # its name may change just now
            head = content.read(12)
            if len(head) == 12:
                found.add(int.from_bytes(head[8:], "little"))
    return found
