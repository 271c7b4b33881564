"""Read the whole store and say what is damaged, where, and what can still be restored.

A point in interval j needs: the writes of j up to it, the backward increments j, j+1, ... k, and the image at k, each
block from the first of these that has it. So damaged writes cost points inside one interval, a damaged backward
increment costs points in its own and earlier intervals, and a damaged image block costs points behind the last
interval that changed it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pgcdp.errors import DamageError, PgcdpError
from pgcdp.fsio import read_json
from pgcdp.postgres import timelines
from pgcdp.records import BLOCK
from pgcdp.store.base import base_place, check_copies, check_kept, missing_before, read_base
from pgcdp.store.bundle import CONTENTS, Bundle
from pgcdp.store.frames import HEADER_BYTES, Entry, FrameReader, check_unfinished
from pgcdp.store.history import history_names, read_history
from pgcdp.store.image import Image, ImageState
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.open_interval import read_open

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage: file, offset in it, what is wrong, what can still be restored."""

    file: Path
    offset: int
    message: str
    still: str


@dataclass(slots=True)
class ScrubReport:
    """What was read and what was found. `timelines`: how many have a history file."""

    damages: list[Damage] = field(default_factory=list)
    files: int = 0
    timelines: int = 0
    bytes_read: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


def check_store(store: Store, full: bool = True, progress: Progress | None = None) -> ScrubReport:
    """Check a store. Without `full` only manifests, sizes, states and that the intervals follow each other.

    Reports all damage it finds and raises none. The image must not move meanwhile (hold the store's lock).
    """
    return _Scrub(store, full, progress).run()


class _Scrub:
    def __init__(self, store: Store, full: bool, progress: Progress | None) -> None:
        self.store = store
        self.full = full
        self.progress = progress
        self.report = ScrubReport()
        self.total = _total_bytes(store)
        self.bundles: dict[int, Bundle] = {}

    def run(self) -> ScrubReport:
        """Everything, in the order in which it is needed."""
        everything = "every boundary and write can still be restored if nothing else is damaged"
        with _noting(self, self.store.path / "store.json", everything):
            read_json(self.store.path / "store.json")
        self.check_intervals()
        self.check_incoming()
        self.check_image()
        self.check_timelines()
        for name in history_names(self.store):
            with _noting(self, self.store.history / name, everything):
                read_history(self.store, name)
                self.read(self.store.history / name, 0)
        return self.report

    def note(self, file: Path, offset: int, message: str, still: str) -> None:
        """Report a damage; where the message names another file of the same directory or an offset, these count."""
        beside = [path for path in file.parent.glob("*") if str(path) in message]
        named = max(beside, key=lambda path: len(path.name), default=file)
        place = re.search(r"offset (\d+)", message)
        self.report.damages.append(Damage(named, int(place[1]) if place else offset, message, still))

    def read(self, file: Path, size: int) -> None:
        """Count a file that was read."""
        self.report.files += 1
        self.report.bytes_read += size or os.stat(file).st_size
        if self.progress is not None:
            self.progress(self.report.bytes_read, max(self.total, self.report.bytes_read))

    def check_intervals(self) -> None:
        """Manifests and their files; each interval begins where the one before ends."""
        behind: tuple[int, int] | None = None
        place = (base_place(self.store) or self.store.bases) / "manifest.json"
        with _noting(self, place, "every boundary and write can still be restored if nothing else is damaged"):
            check_copies(self.store)
        with _noting(self, place, f"every point behind boundary {self.store.base_number()} can still be restored"):
            check_kept(self.store)
        with _noting(self, place, "nothing can be restored until one of both is brought back from a copy of the store"):
            base = read_base(self.store)
            behind = (base.number, base.write) if base is not None else None
        for span in self.store.spans():
            number, path = span.last, self.store.place(span)
            try:
                bundle = Bundle.at(self.store, span)
            except DamageError as damage:
                self.note(path / "manifest.json", 0, damage.message, _from_boundary(number))
                behind = None
                continue
            interval = bundle.interval
            if behind is not None and (span.first, interval.from_write) != (behind[0] + 1, behind[1] + 1):
                before = f"{'interval' if behind[0] in self.bundles else 'boundary'} {behind[0]}"
                message = f"interval {number} from write {interval.from_write} does not follow {before}"
                missing = missing_before(self.store, behind[0], span.first)
                if missing is not None:
                    message = f"{missing} is missing: {message}"
                still = "nothing can be restored until what is missing is brought back from a copy of the store"
                self.note(missing or path / "manifest.json", 0, message, still)
            behind = number, interval.to_write
            self.bundles[number] = bundle
            if self.full:
                self.check_bundle(bundle)
                continue
            for name in bundle.manifest["files"]:
                with _noting(self, path / name, _still_restorable(bundle, name)):
                    bundle.check_size(name)

    def check_bundle(self, bundle: Bundle) -> None:
        """Every byte of an interval's files; damage is named by frame where there are frames."""
        found = len(self.report.damages)
        for name in bundle.manifest["files"]:
            path, before = bundle.path / name, len(self.report.damages)
            if name in CONTENTS:
                self.check_frames(bundle, name)
            if len(self.report.damages) == before:
                with _noting(self, path, _still_restorable(bundle, name)):
                    bundle.check_file(name)
            if path.exists():
                self.read(path, 0)
        if len(self.report.damages) == found:
            with _noting(self, bundle.path / "manifest.json", _from_boundary(bundle.number)):
                bundle.check_tie()

    def check_frames(self, bundle: Bundle, name: str) -> None:
        """Each frame of a file, so that every damaged one is named."""
        path = bundle.path / name
        try:
            reader = FrameReader.open(path, CONTENTS[name], self.store.set_id, bundle.number)
        except DamageError as damage:
            self.note(path, 0, damage.message, _still_restorable(bundle, name))
            return
        with reader:
            for entry, bad in _bad_frames(reader):
                self.note(path, entry.offset, bad.message, _still_restorable(bundle, name, entry))

    def check_incoming(self) -> None:
        """Frames of the open interval: all but a torn tail must be whole. It may be published meanwhile."""
        for number in self.store.incoming_numbers():
            path = self.store.incoming(number)
            still = "all published intervals can still be restored, if nothing else is damaged"
            for name in ("writes", "index"):
                with _noting(self, path / name, still), suppress(FileNotFoundError):
                    self.check_growing(path / name, number)
            lost = [path / name for name in ("writes", "index") if not (path / name).exists()]
            with _noting(self, lost[0] if lost else path / "index", still), suppress(FileNotFoundError):
                if not any(damage.file.parent == path for damage in self.report.damages):
                    read_open(self.store, number).writes.close()

    def check_growing(self, path: Path, number: int) -> None:
        """An unfinished file; a restarted agent may be cutting its tail, so damage counts when it stays."""
        if path.stat().st_size < HEADER_BYTES:
            return  # read_open knows whether it is being made or has lost its header
        try:
            check_unfinished(path, CONTENTS[path.name], self.store.set_id, number)
        except DamageError:
            check_unfinished(path, CONTENTS[path.name], self.store.set_id, number)
        self.read(path, 0)

    def check_image(self) -> None:
        """State, sizes, and with `full` every block against its sum; blocks on the move are not judged."""
        state_file = self.store.image / "state.json"
        still = "nothing is known to be restorable without the image's state"
        with _noting(self, state_file, still):
            image = Image.open(self.store)
            try:
                if self.full:
                    for volume in self.store.volumes:
                        self.check_volume(image, volume.number, volume.bytes // BLOCK, image.state)
            finally:
                image.close()

    def check_volume(self, image: Image, number: int, blocks: int, state: ImageState) -> None:
        """Blocks of one volume, holes passed over where image and sums have one."""
        files = image.files(number)
        moving: np.ndarray[tuple[int], np.dtype[np.bool_]] | None = None
        if state.state == "moving" and state.to in self.bundles:
            moving = np.zeros(blocks, dtype=np.bool_)
            extents = self.bundles[state.to].forward_map()
            for row in extents[extents["volume"] == number]:
                moving[int(row["block"]) : int(row["block"]) + int(row["count"])] = True
        block = 0
        while block < blocks:
            step, bad = image.bad_blocks(number, block, blocks - block)
            for wrong in bad:
                if moving is None or not moving[wrong]:
                    message = f"{files.path} has a damaged block {wrong} at offset {wrong * BLOCK}"
                    self.note(files.path, wrong * BLOCK, message, self.still_without(number, wrong))
            block += step
            if self.progress is not None:
                self.progress(self.report.bytes_read, max(self.total, self.report.bytes_read))
        self.read(files.path, files.used_bytes())

    def check_timelines(self) -> None:
        """What rewinds in place left; that of the newest one is in pg_wal too, and may not be kept yet."""
        place, found = self.store.path / TIMELINES, list[int]()
        if place.is_dir():
            for path, damage in timelines.check(place):
                self.report.timelines += path.suffix == ".history"
                if damage is not None:
                    self.note(path, 0, damage.message, _WITHOUT_TIMELINES)
                self.read(path, 0)
            found = timelines.known(place)
        before, behind = [1], list[int]()
        for bundle in self.bundles.values():
            (behind if behind or bundle.interval.rewinds else before).append(bundle.interval.boundary.timeline)
        if not behind:
            return
        needed = [place / timelines.NOTED]
        needed += [place / f"{each:08X}.history" for each in sorted({*behind} - {*before, *found, behind[-1]})]
        for path in needed:
            if not path.exists():
                self.note(path, 0, f"{path} is missing", _WITHOUT_TIMELINES)

    def still_without(self, volume: int, block: int) -> str:
        """What can be restored without one block of the image: what has the block in a backward increment."""
        for number in sorted(self.bundles, reverse=True):
            try:
                extents = self.bundles[number].backward_map()
            except DamageError:
                continue
            begin, count = extents["block"], extents["count"]
            if np.any((extents["volume"] == volume) & (begin <= block) & (block < begin + count)):
                before = self.bundles[number].interval.first - 1
                return f"boundary {before} and everything before it can still be restored; later points lack the block"
        return "no point can be restored without this block, since no interval changed it"


_WITHOUT_TIMELINES = "every boundary and write can still be restored; a rewind may take a timeline a second time"


class _noting:  # noqa: N801 - used like a function
    """A context that turns an error into a reported damage."""

    def __init__(self, scrub: _Scrub, file: Path, still: str) -> None:
        self.scrub, self.file, self.still = scrub, file, still

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, PgcdpError):
            self.scrub.note(self.file, 0, error.message, self.still)
            return True
        if isinstance(error, OSError):
            self.scrub.note(self.file, 0, f"{self.file} cannot be read: {error.strerror}", self.still)
            return True
        return False


def _bad_frames(reader: FrameReader) -> Iterator[tuple[Entry, DamageError]]:
    for entry in reader.entries:
        try:
            reader.check(entry)
        except DamageError as damage:
            yield entry, damage


def _from_boundary(number: int) -> str:
    return f"boundary {number} and everything behind it can still be restored"


def _still_restorable(bundle: Bundle, name: str, entry: Entry | None = None) -> str:
    """What is left when a file of an interval is damaged (all of it, or one frame)."""
    number, first = bundle.number, bundle.interval.from_write
    if name in ("backward", "backward.map"):
        return _from_boundary(number)
    if name == "writes" and entry is not None:
        try:
            index = bundle.index()
        except DamageError:
            return f"every boundary can still be restored, single writes of interval {number} cannot"
        ends = (index["position"] + index["data_length"]).astype(np.int64)
        whole = int(np.searchsorted(ends, entry.position, side="right"))
        return (
            f"every boundary can still be restored, and single writes {first} to {first + whole - 1} of interval "
            f"{number}, not those from {first + whole} on"
            if whole
            else f"every boundary can still be restored, single writes of interval {number} cannot"
        )
    if name == "forward":
        return "every boundary can still be restored, if the image is at a later one"
    if name in ("writes", "index"):
        return f"every boundary can still be restored, single writes of interval {number} cannot"
    return "every boundary and write can still be restored if nothing else is damaged"


def _total_bytes(store: Store) -> int:
    total = 0
    for directory, below, names in os.walk(store.path):
        if directory == os.fspath(store.path) and store.aside.name in below:
            below.remove(store.aside.name)
        for name in names:
            with suppress(FileNotFoundError):  # the agent goes on meanwhile
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total
