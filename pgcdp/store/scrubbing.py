"""A scrub that takes its time: at a bounded rate, part by part, and after a kill from where it was.

What it reads does not stay in the page cache, where production's own pages are. The record (`store.scrub_record`) is
written every few seconds; a part that was read and not recorded is read again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pgcdp.fsio import FileLock, is_locked
from pgcdp.records import BLOCK
from pgcdp.store.damage import Damage
from pgcdp.store.layout import Store
from pgcdp.store.notes import make_notes, notes_of
from pgcdp.store.scrub import COMMON, PIECE_BLOCKS, Checker, ScrubReport, total_bytes
from pgcdp.store.scrub_record import LOCK_NAME, By, Record, read_record, write_record

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""
WANTED_NAME = "scrub.wanted"
RECORD_SECONDS = 2.0
"""How often the record is written, besides when something was found."""
SLEEP_SECONDS = 0.1
"""How long it sleeps before it looks again whether it shall stop."""


class Stopped(Exception):
    """It was told to stop."""


class Pace:
    """Waits so that no more than `rate` bytes a second are read; 0: as fast as it goes."""

    def __init__(self, rate: int, stop: Callable[[], bool] = lambda: False) -> None:
        self.rate = rate
        self._stop = stop
        self._free_at = time.monotonic()

    def __call__(self, size: int) -> None:
        """So many bytes were read. Raises Stopped when it shall stop."""
        now = time.monotonic()
        if self.rate:
            self._free_at = max(self._free_at, now) + size / self.rate
        while True:
            if self._stop():
                raise Stopped
            left = self._free_at - time.monotonic()
            if not self.rate or left <= 0:
                return
            time.sleep(min(left, SLEEP_SECONDS))


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass that was read to its end. `gone_on`: the record of the killed one that it went on from, None if none."""

    record: Record
    report: ScrubReport
    gone_on: Record | None


def scrub(store: Store, by: By, pace: Pace, progress: Progress = lambda done, total: None) -> Pass:
    """Read all of a store; go on with a pass that was begun and not ended.

    `by` "check" goes on only with one of its own: who asks for a check wants all of it read now. Raises Stopped when
    the pace says so, with all that was read recorded, and PreconditionError when another scrubs this store.
    """
    place = make_notes(store)
    with ExitStack() as stack:
        if place is not None:
            if by == "check":  # the agent makes way
                stack.enter_context(FileLock(place / WANTED_NAME, "another check of this store"))
            stack.enter_context(
                FileLock(place / LOCK_NAME, "a scrub of this store", wait=math.inf if by == "check" else 0)
            )
        before = read_record(store)
        resumed = before.under_way and (by == "agent" or before.by == "check")
        if not resumed:
            kept = before.damages
            before = Record(by, time.time_ns(), before.ended, before.whole, total=total_bytes(store), damages=kept)
        run = _Run(store, before, pace, progress)
        try:
            run.read()
        finally:
            write_record(store, run.record)
        return Pass(run.record, run.checker.report, before if resumed else None)


def is_wanted(store: Store) -> bool:
    """Whether somebody waits to check this store, or does: the agent's scrub makes way for that."""
    try:
        return is_locked(notes_of(store) / WANTED_NAME)
    except OSError:
        return False


class _Run:
    def __init__(self, store: Store, record: Record, pace: Pace, progress: Progress) -> None:
        self.store = store
        self.record = record
        self.progress = progress
        self.checker = Checker(store)
        self.checker.count = self._count
        self._pace = pace
        self._written_at = time.monotonic()
        self._uncounted = 0

    def _count(self, size: int) -> None:
        self._uncounted += size
        done = self.record.bytes + self._uncounted
        self.progress(done, max(done, self.record.total))
        self._pace(size)

    def read(self) -> None:
        """All that is left of the pass."""
        write_record(self.store, self.record)
        self._done(COMMON, self.checker.common())
        for span in self.store.spans():
            if span.last > self.record.interval:
                found = self.checker.interval(span)
                _drop_cached(sorted(self.store.place(span).glob("*")))
                self.record = replace(self.record, interval=span.last)
                self._done(f"interval {span.last}", found)
        for volume in self.store.volumes[self.record.volume :]:
            first = self.record.block if volume.number == self.record.volume else 0
            for block in range(first, volume.bytes // BLOCK, PIECE_BLOCKS):
                found = self.checker.piece(volume.number, block)
                _drop_cached([self.store.image / f"{volume.name}.img"], block * BLOCK, PIECE_BLOCKS * BLOCK)
                self.record = replace(self.record, volume=volume.number, block=block + PIECE_BLOCKS)
                self._done(f"image {volume.number} {block}", found)
        self.record = self._without_gone(
            replace(self.record, ended=max(time.time_ns(), self.record.began), whole=self.record.began)
        )

    def _done(self, part: str, found: list[Damage]) -> None:
        """A part was read."""
        changed = bool(found) or any(each.part == part for each in self.record.damages)
        size, self._uncounted = self._uncounted, 0
        self.record = replace(self.record, bytes=self.record.bytes + size).with_part(part, found)
        if changed or time.monotonic() - self._written_at > RECORD_SECONDS:
            self._written_at = time.monotonic()
            write_record(self.store, self.record)

    def _without_gone(self, record: Record) -> Record:
        """What was recorded of intervals that retention joined or let go of, is of no use any more."""
        there = {f"interval {span.last}" for span in self.store.spans()}
        kept = [each for each in record.damages if not each.part.startswith("interval ") or each.part in there]
        return replace(record, interval=0, volume=0, block=0, damages=tuple(kept))


def _drop_cached(files: list[Path], offset: int = 0, length: int = 0) -> None:
    """Have the kernel forget what was read of files: clean pages only, the agent's own work stays."""
    for file in files:
        with suppress(OSError):
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
