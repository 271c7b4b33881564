"""The stages between journal and image, one set at a time: take writes, end intervals, move the image, release.

Everything here is called by one thread of the agent. What it has done is in the store, never only in memory: after a
kill `Stages.open` looks at the store and the journal and goes on (truth 5).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pgcdp import twice
from pgcdp.capture.filemap import FileMap
from pgcdp.capture.journal import BatchRun, Journal
from pgcdp.capture.outside import Outside, rows_of
from pgcdp.errors import BugError, DamageError
from pgcdp.fsio import read_json, write_json
from pgcdp.intervals.baseline import Baseline
from pgcdp.intervals.cutter import Checkpoint, CheckpointFinder
from pgcdp.intervals.increments import Mode, close_interval, move_image
from pgcdp.intervals.indexing import Start
from pgcdp.postgres.relations import Look
from pgcdp.records import Boundary, Interval, Position
from pgcdp.store.bundle import Bundle
from pgcdp.store.gaps import keep as keep_gaps
from pgcdp.store.image import Image
from pgcdp.store.image_lock import image_to_move
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OUTSIDE, SETTINGS, OpenInterval
from pgcdp.store.rewinds import keep as keep_rewinds
from pgcdp.store.transactions import write_look

log = logging.getLogger(__name__)

STEP_BYTES = 256 << 20
"""Bytes of writes after which a step comes back."""
SAVE_BYTES = 512 << 20
"""Copied bytes after which a baseline notes how far it is."""


class Capture(Protocol):
    """What the stages need of the engine (`capture.control.EngineClient`)."""

    def release(self, write: int) -> None:
        """The store holds all writes up to `write`."""

    def durable_write(self) -> int:
        """The last write that is durable in the journal."""


@dataclass(frozen=True, slots=True)
class StageSettings:
    """What of the set's settings the stages follow."""

    system_identifier: int
    backings: tuple[Path, ...]
    apply: Mode
    compression_level: int


Decide = Callable[[Checkpoint], str | None]
"""Whether to end the interval at a checkpoint: the reason, or None."""
MakeWay = Callable[[Store, Bundle], bool]
"""Called with readers kept out before the image moves by an interval: True when no open view reads any more what the
move changes (truth 6), False when that cannot be brought about now."""


class Stages:
    """The store's side of one set, from the journal on."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        capture: Capture,
        settings: StageSettings,
        image: Image,
        make_way: MakeWay,
    ) -> None:
        self.store = store
        self.journal = journal
        self.capture = capture
        self.settings = settings
        self.image = image
        self.make_way = make_way
        self.published: Callable[[Bundle], None] = lambda bundle: None  # hears of it before the image moves
        self.taken: Callable[[BatchRun], None] = lambda run: None  # each run of the journal, in order
        self.file_map: Callable[[], FileMap | None] = lambda: None  # of the mounted filesystems, now
        self.outside: Callable[[], Sequence[Outside] | None] = lambda: None  # data of the cluster that is not captured
        self._files_before: FileMap | None = None
        self.newest: Boundary | None = None
        self.behind: list[Bundle] = []
        self.opened: OpenInterval | None = None
        self.baseline: Baseline | None = None
        self.baseline_end: int | None = None
        self.finder = CheckpointFinder(settings.system_identifier, 0)
        self.begun = time.monotonic()
        self._start: Position | None = None
        self._saved = 0

    @classmethod
    def open(
        cls,
        store: Store,
        journal: Journal,
        capture: Capture,
        settings: StageSettings,
        *,
        make_way: MakeWay,
        synced: int,
        released: int,
    ) -> Stages:
        """Take up what the store holds. `synced` and `released` are writes, as the engine's status tells them.

        An image that does not exist yet is begun. Raises DamageError when store or journal lack what they said to have.
        """
        for file in twice.mend(store.path):
            log.warning("%s was damaged or missing: it is written again from its other copy", file)
        if twice.STATE.exists(store.image):
            image = Image.open(store, writable=True)
        else:
            _refuse_lost_image(store)
            image = Image.create(store, synced + 1)
        stages = cls(store, journal, capture, settings, image, make_way)
        try:
            if image.state.state == "baseline":
                stages._begin_baseline()
            else:
                stages._take_up(released)
        except BaseException:
            stages.close()
            raise
        return stages

    # --- baseline

    def _begin_baseline(self) -> None:
        self.baseline = Baseline(self.image, list(self.settings.backings))
        log.info("baseline: %d of %d bytes copied", self.baseline.done, self.baseline.total)
        if self.store.baseline is not None:  # killed between naming the boundary and reaching it: no write beyond it
            self._reach(self.store.baseline)

    def baseline_step(self, synced: int, seconds: float = 0.5) -> None:
        """Copy for a while, then go through the journal up to `synced`, the engine's synced write."""
        baseline = self._baseline()
        until = time.monotonic() + seconds
        while not baseline.complete and time.monotonic() < until:
            baseline.copy_chunk()
        if self.baseline_end is None:
            for run in self._some(self.journal.batches(baseline.journal_write, synced, self._start)):
                self.finder.scan(run)
                baseline.take(run)
                self._start = run.end
        if baseline.done - self._saved >= SAVE_BYTES:
            self._save_baseline()

    def _save_baseline(self) -> None:
        baseline = self._baseline()
        baseline.save()
        self._saved = baseline.done
        self.capture.release(baseline.journal_write)

    def baseline_copied(self, durable: int, checkpoint_lsn: int) -> None:
        """The copy is complete and holds nothing behind `durable`: from there on a checkpoint ends it.

        `durable` is the engine's durable write: the copy may have seen writes on their way to the volume, which the
        synced write does not tell of yet, and an agent killed here may have taken all that was durable.
        `checkpoint_lsn`: the newest checkpoint that Postgres knows now, in case none was captured yet.
        """
        self.baseline_end = durable
        if self.finder.checkpoint_lsn == 0:
            self.finder.checkpoint_lsn = checkpoint_lsn
        self._save_baseline()

    def finish_baseline(self, durable: int) -> bool:
        """Look for the boundary that ends the baseline in the writes up to `durable`; True when it is there."""
        baseline = self._baseline()
        for run in self._some(self.journal.batches(baseline.journal_write, durable, self._start)):
            for checkpoint in self.finder.scan(run):
                if self.baseline_end is not None and checkpoint.write > self.baseline_end:
                    boundary = checkpoint.boundary(0, "baseline")
                    baseline.take(run.upto(boundary.write))
                    self.store = self.store.with_baseline(boundary)
                    self.image.store = self.store
                    self._reach(boundary)
                    return True
            baseline.take(run)
            self._start = run.end
        return False

    def _reach(self, boundary: Boundary) -> None:
        baseline = self._baseline()
        for run in self.journal.batches(baseline.journal_write, boundary.write):
            baseline.take(run)
        self.image.set_at(0, boundary.write)
        baseline.close()
        self.baseline = None
        log.info("baseline: complete at write %d", boundary.write)
        self._go_on_from(boundary)

    def _baseline(self) -> Baseline:
        if self.baseline is None:
            raise BugError("no baseline is under way")
        return self.baseline

    # --- intervals

    def _take_up(self, released: int) -> None:
        """After a start: finish a move, an unpublished interval, then go on with the open one."""
        reached = self.image.state.boundary
        numbers = self.store.interval_numbers()
        self.behind = [Bundle.open(self.store, number) for number in numbers if number > reached]
        for bundle in self.behind:  # killed before that was done
            keep_rewinds(self.store, bundle.interval.rewinds)
            keep_gaps(self.store, bundle.interval.gaps)
        self.move()
        self._go_on_from(self._boundary(max([reached, *numbers])), released)
        opened = self._opened()
        if opened.boundary is not None:
            self.move(wait=True)
            self._close(opened.boundary, _kept_settings(opened))
            return
        with opened.reader() as writes:
            for checkpoint in self.finder.scan_stored(opened.index(), writes):
                log.info("interval %d: checkpoint at write %d was not cut at", opened.number, checkpoint.write)

    def _boundary(self, number: int) -> Boundary:
        if number == 0:
            if self.store.baseline is None:
                raise BugError("the image is at boundary 0, but the store knows none")
            return self.store.baseline
        # retention leaves what ends at the image's boundary, and all behind it, as it is
        return Bundle.open(self.store, number).interval.boundary

    def _go_on_from(self, boundary: Boundary, released: int = 0) -> None:
        self.newest = boundary
        self.finder.checkpoint_lsn = boundary.checkpoint_lsn
        self.opened = OpenInterval.open(
            self.store,
            boundary.number + 1,
            boundary.write + 1,
            durable_write=released,
            level=self.settings.compression_level,
        )
        self.begun = time.monotonic()
        self._start = None
        self.capture.release(boundary.write)

    def _opened(self) -> OpenInterval:
        if self.opened is None:
            raise BugError("no interval is open")
        return self.opened

    def follow(self, durable: int, decide: Decide, settings: dict[str, Any]) -> list[Interval]:
        """Take writes, at most up to `durable`, into the open interval, ending it where `decide` says so.

        It comes back after STEP_BYTES, so that the journal can be freed meanwhile: see `opened.last_write`.
        Returns the intervals published on the way. While somebody who copies the image holds it behind the newest
        boundary, no interval is ended: the open one grows.
        """
        published = []
        self.move()
        for run in self._some(self.journal.batches(self._opened().last_write, durable, self._start)):
            rest = run
            for checkpoint in self.finder.scan(run):
                head = rest.upto(checkpoint.write)
                self._append(head)
                rest = rest.after(checkpoint.write)
                reason = None if self.behind else decide(checkpoint)
                if reason is not None:
                    lsn = self.finder.checkpoint_lsn
                    published.append(self._close(checkpoint.boundary(self._opened().number, reason), settings))
                    self.finder.checkpoint_lsn = lsn
            self._append(rest)
            self._start = run.end
        return published

    def look(self, look: Look, settings: dict[str, Any]) -> None:
        """Keep a look at the catalogs, and the settings, with the interval that is open."""
        if self.opened is not None and self.opened.boundary is None:
            write_look(self.opened.path, look)
            write_json(self.opened.path / SETTINGS, settings)

    def grow(self, volume: int, size: int) -> None:
        """A volume is to become larger; call it before anything is written there."""
        self.store = self.image.grow(volume, size)

    def _some(self, runs: Iterator[BatchRun]) -> Iterator[BatchRun]:
        """The first STEP_BYTES of them."""
        taken = 0
        for run in runs:
            yield run
            taken += len(run.data)
            if taken >= STEP_BYTES:
                return

    def _append(self, run: BatchRun) -> None:
        if len(run):
            self.taken(run)
            self._opened().append(run)

    def _close(self, boundary: Boundary, settings: dict[str, Any]) -> Interval:
        """Truth 5: bundle synced and published, then the image moves, then the journal may forget."""
        begun = time.monotonic()
        opened = self._opened()
        files = None
        if opened.boundary is None:  # a restart finds them before it finds the boundary
            write_json(opened.path / SETTINGS, settings)
            files = self.file_map()
            rows = rows_of(self.outside())
            if rows is None:
                (opened.path / OUTSIDE).unlink(missing_ok=True)  # of a try that was killed, at another checkpoint
            else:
                write_json(opened.path / OUTSIDE, {"outside": rows})
        before = self._boundary(boundary.number - 1)
        identifier = self.settings.system_identifier
        bundle = close_interval(
            self.store, opened, self.image, boundary, settings,
            lambda: Start.of(self.store, before, settings, identifier),
            self._behind,
            (self._files_before, files) if files else None,
        )  # fmt: skip
        self._files_before = files
        keep_rewinds(self.store, bundle.interval.rewinds)
        keep_gaps(self.store, bundle.interval.gaps)
        self.published(bundle)
        self.behind.append(bundle)
        self.move()
        self._go_on_from(boundary)
        log.info(
            "interval %d: %d writes, %d blocks, %s, %.2f s",
            boundary.number, bundle.interval.writes, bundle.interval.blocks_changed, boundary.reason,
            time.monotonic() - begun,
        )  # fmt: skip
        return bundle.interval

    def _behind(self) -> tuple[Path, int]:
        """Where what comes behind a boundary can be read, and up to which write."""
        return self.journal.directory, self.capture.durable_write()

    def move(self, *, wait: bool = False) -> None:
        """Bring the image to the newest boundary; later, if somebody copies it now and this shall not `wait`.

        Open views are told first, each time (truth 6): a kill leaves views that were told of a move that did not begin.
        """
        while self.behind:
            with image_to_move(self.store, wait=wait) as let_readers_in:
                if let_readers_in is None:
                    return
                moved = self.make_way(self.store, self.behind[0])
                if moved:
                    move_image(self.image, self.behind[0], self.settings.apply, let_readers_in)
            if moved:
                del self.behind[0]
            elif not wait:
                return

    def relieve(self) -> None:
        """The journal is filling: make what was taken durable here, so that its segments can be used again."""
        if self.baseline is not None:
            self._save_baseline()
        else:
            self.capture.release(self._opened().sync())

    def close(self) -> None:
        """Leave everything as it is on disk."""
        if self.baseline is not None:
            self.baseline.close()
        if self.opened is not None:
            self.opened.close()
        self.image.close()


def _refuse_lost_image(store: Store) -> None:
    """A new image may only be begun where no boundary stands on one."""
    if store.baseline is not None or store.interval_numbers():
        raise DamageError(
            f"{store.image / 'state.json'} is missing (offset 0), but the store is in use",
            "bring the store's files back; nothing is begun anew over what is left of it",
        )


def _kept_settings(opened: OpenInterval) -> dict[str, Any]:
    """What `_close` wrote before it was killed."""
    try:
        return read_json(opened.path / SETTINGS)
    except FileNotFoundError:
        return {}
