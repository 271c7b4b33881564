"""Everything that a recovery point can be made from: the store, and behind it the journal of the same set.

A source is looked at while the agent goes on. What holds it together is the image lock: as long as it is held, the
image stays at its boundary, and every write behind that is in a published interval, in the open one or in the journal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.journal import Journal
from pgcdp.errors import DamageError, PreconditionError, TargetError
from pgcdp.intervals.baseline import run_index
from pgcdp.intervals.extents import forward_map, spans
from pgcdp.intervals.increments import BlockTarget, apply_backward, apply_forward, apply_writes
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import BLOCK, EXTENT_ZEROS, Boundary, Interval, RecoveryPoint, Target
from pgcdp.recovery.target import Listing, resolve
from pgcdp.store.bundle import Bundle, OpenSnapshot, read_open
from pgcdp.store.image import Image
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store

ATTEMPTS = 5
"""How often reading the tail begins anew when the agent published or released it meanwhile."""


class Source:
    """A store, with the set's journal where there is one.

    `durable_write`: the journal's newest durable write, as the engine says (None: look at a journal that nobody
    writes). `now_ns`: until when it is known that no other write came.
    """

    def __init__(
        self, store: Store, journal: Journal | None = None, durable_write: int | None = None, now_ns: int = 0
    ) -> None:
        self.store = store
        self.journal = journal
        self.durable_write = durable_write
        self.now_ns = now_ns
        self._intervals: dict[int, Interval] = {}

    def intervals(self) -> list[Interval]:
        """Published intervals, in order."""
        for number in self.store.interval_numbers():
            if number not in self._intervals:
                self._intervals[number] = Bundle.open(self.store, number).interval
        return [self._intervals[number] for number in sorted(self._intervals)]

    def base(self) -> Boundary:
        """The oldest boundary. Raises TargetError while there is none."""
        if self.store.baseline is None:
            self.store = Store.open(self.store.path)
        if self.store.baseline is None:
            raise TargetError(
                f"the first backup image of set {self.store.set_name} is not complete, nothing can be restored yet",
                "pgcdp status tells how far it is",
            )
        return self.store.baseline

    def listing(self) -> Listing:
        """What can be restored now."""
        base = self.base()
        intervals = self.intervals()
        newest = self._newest(intervals[-1].to_write if intervals else base.write)

        def times(number: int | None) -> NDArray[np.int64]:
            if number is not None:
                return np.asarray(Bundle.open(self.store, number).index()["wall_ns"], dtype=np.int64)
            return self._tail_times(intervals[-1].to_write if intervals else base.write, newest)

        return Listing(base, intervals, newest, times, self.now_ns)

    def resolve(self, target: Target) -> RecoveryPoint:
        """The recovery point of a target; TargetError when there is none."""
        return resolve(target, self.listing())

    def _newest(self, stored: int) -> int:
        if self.durable_write is not None:
            return max(stored, self.durable_write)
        opened = self._snapshot(stored)
        newest = stored
        if opened is not None:
            opened.writes.close()
            newest += len(opened.index)
        if self.journal is not None:
            newest = max(newest, self.journal.last_write(newest))
        return newest

    def _snapshot(self, stored: int) -> OpenSnapshot | None:
        """The open interval that begins behind `stored`; None when it holds nothing or is published by now."""
        numbers = self.store.interval_numbers()
        try:
            opened = read_open(self.store, numbers[-1] + 1 if numbers else 1)
        except (FileNotFoundError, DamageError):
            return None
        if not len(opened.index) or int(opened.index["number"][0]) != stored + 1:
            opened.writes.close()
            return None
        return opened

    def _tail_times(self, stored: int, newest: int) -> NDArray[np.int64]:
        parts: list[NDArray[np.int64]] = []
        done = stored
        opened = self._snapshot(stored)
        if opened is not None:
            opened.writes.close()
            part = opened.index[: newest - stored]
            parts.append(np.asarray(part["wall_ns"], dtype=np.int64))
            done += len(part)
        if done < newest:
            for run in self._journal().batches(done, newest):
                parts.append(np.asarray(run.records["wall_ns"], dtype=np.int64))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _journal(self) -> Journal:
        if self.journal is None:
            raise PreconditionError(
                f"{self.store.path} was opened without a journal", "name the set instead of its store"
            )
        return self.journal

    def record(self, write: int) -> np.void:
        """The entry (INDEX or RECORD) of one restorable write. DamageError when nothing holds it."""
        return self._look(write)[0]

    def data(self, write: int) -> bytes:
        """The data of one restorable write."""
        return self._look(write)[1]

    def _look(self, write: int) -> tuple[np.void, bytes]:
        for interval in self.intervals():
            if interval.from_write <= write <= interval.to_write:
                bundle = Bundle.open(self.store, interval.number)
                entry = bundle.index()[write - interval.from_write]
                with bundle.writes() as writes:
                    return entry, writes.read(int(entry["position"]), int(entry["data_length"]))
        stored = max((interval.to_write for interval in self.intervals()), default=self.base().write)
        opened = self._snapshot(stored)
        if opened is not None:
            with opened.writes as writes:
                if write - stored <= len(opened.index):
                    entry = opened.index[write - stored - 1]
                    return entry, writes.read(int(entry["position"]), int(entry["data_length"]))
        for run in self._journal().batches(write - 1, write):
            return run.records[0], run.data_of(0).tobytes()
        raise DamageError(f"write {write} is in neither {self.store.path} nor the journal")

    def settings(self, point: RecoveryPoint) -> dict[str, Any] | None:
        """Postgres's settings at a point: those kept with its interval, or with the last one before it."""
        known = [interval.number for interval in self.intervals() if interval.from_write <= point.write + 1]
        for number in reversed(known):
            settings = Bundle.open(self.store, number).settings()
            if settings:
                return settings
        return None

    # --- making it

    @contextmanager
    def held(self) -> Iterator[None]:
        """The image does not move inside."""
        with image_held(self.store):
            yield

    def materialize(self, point: RecoveryPoint, target: BlockTarget, progress: Report = silent) -> None:
        """Write the state just behind `point.write` to `target`, whose blocks are zeros. Call it `held`.

        Every byte is checked on its way. Raises DamageError naming file and offset.
        """
        image = Image.open(self.store)
        try:
            done = self._copy_image(image, point.write, target, progress)
        finally:
            image.close()
        self._forward(done, point.write, target, progress)

    def _copy_image(self, image: Image, upto: int, target: BlockTarget, progress: Report) -> int:
        """The image, rolled back to the last boundary at or before `upto`; returns the write it is at."""
        state = image.state
        moving = Bundle.open(self.store, state.to) if state.to is not None else None
        total = sum(volume.bytes for volume in self.store.volumes)
        copied = 0
        for volume in self.store.volumes:
            for first, count in _judged(moving, volume.number, volume.bytes // BLOCK):
                for block, size, data in image.contents(volume.number, first, count):
                    if data is not None:
                        target.write_blocks(volume.number, block, data)
                    copied += size * BLOCK
                    progress(Progress("copying the image", copied, total))
        number, write = state.boundary, state.write
        if moving is not None:
            apply_forward(target, moving)
            number, write = moving.number, moving.interval.to_write
        while write > upto:
            progress(Progress(f"rolling back interval {number}"))
            bundle = Bundle.open(self.store, number)
            apply_backward(target, bundle)
            number, write = number - 1, bundle.interval.from_write - 1
        return write

    def _forward(self, done: int, upto: int, target: BlockTarget, progress: Report) -> None:
        attempts = 0
        while done < upto:
            progress(Progress("applying single writes", done, upto, "writes"))
            try:
                done = self._forward_once(done, upto, target)
            except (FileNotFoundError, DamageError):
                attempts += 1
                if attempts >= ATTEMPTS or not self._changed():
                    raise

    def _changed(self) -> bool:
        """Whether something was published since it was looked at last."""
        before = len(self._intervals)
        return len(self.intervals()) != before

    def _forward_once(self, done: int, upto: int, target: BlockTarget) -> int:
        """Go on from write `done` with whatever holds the next write; returns the write reached."""
        for interval in self.intervals():
            if interval.from_write <= done + 1 <= interval.to_write:
                bundle = Bundle.open(self.store, interval.number)
                if done + 1 == interval.from_write and upto >= interval.to_write:
                    apply_forward(target, bundle)
                else:
                    index = bundle.index()
                    with bundle.writes() as writes:
                        apply_writes(target, index[index["number"] > done], writes, upto)
                return min(upto, interval.to_write)
        stored = max((interval.to_write for interval in self.intervals()), default=self.base().write)
        opened = self._snapshot(stored)
        if opened is not None:
            with opened.writes as writes:
                index = opened.index[opened.index["number"] > done]
                if len(index):
                    apply_writes(target, index, writes, upto)
                    return min(upto, int(index["number"][-1]))
        for run in self._journal().batches(done, upto):
            for extent in forward_map(run_index(run)):
                volume, block, count = int(extent["volume"]), int(extent["block"]), int(extent["count"])
                if extent["kind"] == EXTENT_ZEROS:
                    target.zero_blocks(volume, block, count)
                else:
                    begin = int(extent["source"])
                    target.write_blocks(volume, block, run.data[begin : begin + count * BLOCK].tobytes())
            done = run.last_write
        return done


def _judged(moving: Bundle | None, volume: int, blocks: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the image's blocks that are what their sums say: all but those of a move in progress."""
    at = 0
    if moving is not None:
        for number, block, count in spans(moving.forward_map()):
            if number == volume:
                if block > at:
                    yield at, block - at
                at = block + count
    if at < blocks:
        yield at, blocks - at


def open_source(path: Path, set_id: bytes | None = None) -> Source:
    """A store alone."""
    return Source(Store.open(path, set_id))
