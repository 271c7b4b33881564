"""Read the store part by part and say what is damaged, where, and what can still be restored (`store.damage`).

A part is what the intervals have in common, one interval, or a piece of the image. Nobody is kept from anything
meanwhile: an interval that retention lets go of is not missed, and the image is held for one piece at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pgcdp import keys, twice, wrapped
from pgcdp.errors import DamageError, PgcdpError, TargetError
from pgcdp.postgres import timelines
from pgcdp.records import BLOCK, Gap, Rewind, Span
from pgcdp.store.base import base_place, check_copies, check_kept, missing_before, read_base
from pgcdp.store.bundle import CONTENTS, Bundle
from pgcdp.store.damage import Costs, Damage
from pgcdp.store.frames import HEADER_BYTES, Entry, FrameReader, check_unfinished
from pgcdp.store.gaps import MARKER as GAPS
from pgcdp.store.gaps import kept as kept_gaps
from pgcdp.store.history import history_names, read_history
from pgcdp.store.image import Image
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.open_interval import read_open
from pgcdp.store.rewinds import KEPT as REWINDS
from pgcdp.store.rewinds import kept as kept_rewinds
from pgcdp.store.survey import survey
from pgcdp.twice import Twice

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""
PIECE_BLOCKS = 1024
"""Blocks of the image that are one part: 4 MiB, which a move of the image waits for."""
COMMON = "common"
"""The part that is no interval and not the image."""


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
    """Check all of a store. Without `full` only manifests, sizes, states and that the intervals follow each other.

    Reports all damage it finds and raises none.
    """
    checker = Checker(store, full)
    total = total_bytes(store)
    if progress is not None:
        checker.count = lambda size: progress(checker.report.bytes_read, max(total, checker.report.bytes_read))
    checker.common()
    for span in store.spans():
        checker.interval(span)
    for volume in store.volumes if full else ():
        for block in range(0, volume.bytes // BLOCK, PIECE_BLOCKS):
            checker.piece(volume.number, block)
    return checker.report


class Checker:
    """Reads parts of a store, and gathers what is wrong with them. Each returns what was found in it.

    `count` is called with the bytes of each file or piece when they have been read, without holding anything.
    """

    def __init__(self, store: Store, full: bool = True) -> None:
        self.store = store
        self.full = full
        self.report = ScrubReport()
        self.count: Callable[[int], None] = lambda size: None
        self._unpaid = 0
        self._holding = False
        self._costs: Costs | None = None
        self._no_image: list[Damage] = []

    # --- what the intervals have in common

    def common(self) -> list[Damage]:
        """store.json, the oldest boundary, that intervals follow each other, what is open, timelines, history."""
        begun = len(self.report.damages)
        everything = "every boundary and write can still be restored if nothing else is damaged"
        self._check_small(twice.STORE, self.store.path, everything)
        self._check_data_key()
        self._check_chain()
        self._check_incoming()
        self._check_small(twice.STATE, self.store.image, _WITHOUT_STATE)
        with _noting(self, self.store.image / twice.STATE.name, _WITHOUT_STATE):
            Image.open(self.store).close()
        self._check_timelines()
        self._check_twice(REWINDS, "rewinds", kept_rewinds, _WITHOUT_REWINDS)
        self._check_twice(GAPS, "gaps", kept_gaps, _WITHOUT_GAPS)
        for name in history_names(self.store):
            with _noting(self, self.store.history / name, everything):
                read_history(self.store, name)
                self._read(self.store.history / name)
        return self._found(begun)

    def _check_small(self, file: Twice, place: Path, without: str) -> None:
        """Both copies of a small file that is there twice, where one of them is whole; else `without` it."""
        with _noting(self, place / file.name, without):
            for one, message, other in file.damaged(place):
                if other is not None:
                    self._note(one, 0, message, f"everything, as long as {other} is whole: {_WRITTEN_AGAIN}")
            if file is twice.STORE:
                file.read(place)

    def _check_data_key(self) -> None:
        """Both copies of what an encrypted store is opened with."""
        if not self.store.encrypted:
            return
        with _noting(self, self.store.path / wrapped.FILES[0], _WITHOUT_DATA_KEY):
            for file, message, other in keys.damaged_copies(self.store.path):
                again = f"pgcdp rebuild {self.store.set_name} writes it again (of a store alone: cp -a {other} {file})"
                still = f"everything, as long as {other} is whole: {again}" if other else _WITHOUT_DATA_KEY
                self._note(file, 0, message, still)

    def _check_chain(self) -> None:
        """The oldest boundary, and that each interval begins where the one before ends."""
        place = (base_place(self.store) or self.store.bases) / "manifest.json"
        with _noting(self, place, "every boundary and write can still be restored if nothing else is damaged"):
            check_copies(self.store)
        with _noting(self, place, f"every point behind boundary {self.store.base_number()} can still be restored"):
            check_kept(self.store)
        with _noting(self, place, "nothing can be restored until one of both is brought back from a copy of the store"):
            base = read_base(self.store)
            if base is None:
                return
            there = {span.last for span in self.store.spans()}
            before = base.number
            for number, each in survey(self.store).items():
                interval = each.interval
                gone = [] if not each.damage else [n for n in range(interval.first, number + 1) if n not in there]
                if gone:
                    missing = missing_before(self.store, before, number + 1) or self.store.interval(gone[0])
                    what = "interval" if before in there else "boundary"
                    message = f"{missing} is missing: interval {number + 1} does not follow {what} {before}"
                    self._note(missing, 0, message, _from_boundary(number))
                before = number

    def _check_incoming(self) -> None:
        """Frames of the open interval: all but a torn tail must be whole. It may be published meanwhile."""
        for number in self.store.incoming_numbers():
            path = self.store.incoming(number)
            still = "all published intervals can still be restored, if nothing else is damaged"
            for name in ("writes", "index"):
                with _noting(self, path / name, still), suppress(FileNotFoundError):
                    self._check_growing(path / name, number)
            lost = [path / name for name in ("writes", "index") if not (path / name).exists()]
            with _noting(self, lost[0] if lost else path / "index", still), suppress(FileNotFoundError):
                if not any(damage.file.parent == path for damage in self.report.damages):
                    read_open(self.store, number).writes.close()

    def _check_growing(self, path: Path, number: int) -> None:
        """An unfinished file; a restarted agent may be cutting its tail, so damage counts when it stays."""
        if path.stat().st_size < HEADER_BYTES:
            return  # read_open knows whether it is being made or has lost its header
        try:
            check_unfinished(path, CONTENTS[path.name], self.store.set_id, number)
        except DamageError:
            check_unfinished(path, CONTENTS[path.name], self.store.set_id, number)
        self._read(path)

    def _check_timelines(self) -> None:
        """What rewinds in place left; that of the newest one is in pg_wal too, and may not be kept yet."""
        place, found = self.store.path / TIMELINES, list[int]()
        if place.is_dir():
            for path, damage in timelines.check(place):
                self.report.timelines += path.suffix == ".history"
                if damage is not None:
                    self._note(path, 0, damage.message, _WITHOUT_TIMELINES)
                self._read(path)
            found = timelines.known(place)
        before, behind = [1], list[int]()
        with suppress(DamageError):
            for each in survey(self.store).values():
                interval = each.interval
                (behind if behind or interval.rewinds else before).append(interval.boundary.timeline)
        if not behind:
            return
        needed = [place / timelines.NOTED]
        needed += [place / f"{each:08X}.history" for each in sorted({*behind} - {*before, *found, behind[-1]})]
        for path in needed:
            if not path.exists():
                self._note(path, 0, f"{path} is missing", _WITHOUT_TIMELINES)

    def _check_twice(self, name: str, what: str, read: Callable[[Store], Sequence[Rewind | Gap]], without: str) -> None:
        """That rewinds or gaps of whole intervals are written down once more beside them. The newest may just be."""
        path = self.store.path / name
        with _noting(self, path, without):
            told, newest = {each.begin for each in read(self.store)}, self.store.newest_number()
            if any(
                one.begin not in told
                for number, each in survey(self.store).items() if number < newest
                for one in getattr(each.interval, what)
            ):  # fmt: skip
                self._note(path, 0, f"{path} lacks {what}", without)
        self._read(path)

    # --- an interval

    def interval(self, span: Span) -> list[Damage]:
        """Manifest and files of a published interval. What seems damaged is read again with retention kept out."""
        begun = len(self.report.damages)
        before = replace(self.report, damages=[])
        self._interval(span)
        if len(self.report.damages) > begun:
            del self.report.damages[begun:]
            self.report.files, self.report.bytes_read = before.files, before.bytes_read
            with self._held():
                if span in self.store.spans():
                    self._interval(span)
        self._pay()
        return self._found(begun)

    def _interval(self, span: Span) -> None:
        path = self.store.place(span)
        try:
            bundle = Bundle.at(self.store, span)
        except DamageError as damage:
            self._note(path / "manifest.json", 0, damage.message, _from_boundary(span.last))
            return
        except TargetError:  # joined or let go of just now; else `_check_chain` misses it
            return
        if self.full:
            self._check_bundle(bundle)
            return
        for name in bundle.manifest["files"]:
            with _noting(self, path / name, _still_restorable(bundle, name)):
                bundle.check_size(name)

    def _check_bundle(self, bundle: Bundle) -> None:
        """Every byte of an interval's files; damage is named by frame where there are frames."""
        found = len(self.report.damages)
        for name in bundle.manifest["files"]:
            path, before = bundle.path / name, len(self.report.damages)
            if name in CONTENTS and path.exists():
                self._check_frames(bundle, name)
            if len(self.report.damages) == before:
                with _noting(self, path, _still_restorable(bundle, name)):
                    bundle.check_file(name, frames=False)
            self._read(path, paid=name in CONTENTS)
        if len(self.report.damages) == found:
            with _noting(self, bundle.path / "manifest.json", _from_boundary(bundle.number)):
                bundle.check_tie()

    def _check_frames(self, bundle: Bundle, name: str) -> None:
        """Each frame of a file, so that every damaged one is named."""
        path = bundle.path / name
        try:
            bundle.check_size(name)
            reader = FrameReader.open(path, CONTENTS[name], self.store.set_id, bundle.number)
        except DamageError as damage:
            self._note(path, 0, damage.message, _still_restorable(bundle, name))
            return
        with reader:
            for entry in reader.entries:
                try:
                    reader.check(entry)
                except DamageError as bad:
                    self._note(path, entry.offset, bad.message, _still_restorable(bundle, name, entry))
                self._owe(entry.stored)
            if reader.length != bundle.manifest["files"][name]["length"]:
                message = f"{path} has a stream that its manifest does not know (offset 0)"
                self._note(path, 0, message, _still_restorable(bundle, name))

    # --- the image

    def piece(self, volume: int, block: int) -> list[Damage]:
        """Blocks of the image from one on, each against its sum; blocks on the move are not judged."""
        begun = len(self.report.damages)
        with self._held():
            store = self.store
            with suppress(PgcdpError):  # a volume may have become larger
                store = Store.open(store.path, store.set_id)
            count = min(PIECE_BLOCKS, store.volumes[volume].bytes // BLOCK - block)
            try:
                image = Image.open(store, cut_short=True)
            except PgcdpError as error:
                if not self._no_image:
                    self._note(
                        store.image / "state.json", 0, error.message, "nothing can be restored without the image"
                    )
                    self._no_image = self._found(begun)
                return self._no_image
            try:
                self._check_piece(image, volume, block, count)
            finally:
                image.close()
        self._pay()
        return self._found(begun)

    def _check_piece(self, image: Image, volume: int, block: int, count: int) -> None:
        files, state = image.files(volume), image.state
        moving = np.zeros(count, dtype=np.bool_)
        if state.state == "moving" and state.to is not None:
            with suppress(DamageError, TargetError):
                extents = Bundle.open(self.store, state.to).forward_map()
                of_volume = extents[extents["volume"] == volume]
                for row in of_volume:
                    begin = int(row["block"]) - block
                    moving[max(0, begin) : max(0, begin + int(row["count"]))] = True
        at, wrong = block, list[int]()
        while at < block + count:
            try:
                step, bad = image.bad_blocks(volume, at, block + count - at)
            except OSError as error:  # a sector that cannot be read
                step, bad = min(256, block + count - at), [at]
                self._note(
                    files.path, at * BLOCK, f"{files.path} cannot be read at offset {at * BLOCK}: {error.strerror}",
                    "what can still be restored is told by pgcdp info", image.state.boundary,
                )  # fmt: skip
                bad = []
            wrong += [each for each in bad if not moving[each - block]]
            at += step
        for first, length in _runs(wrong):
            what = f"a damaged block {first}" if length == 1 else f"damaged blocks {first} to {first + length - 1}"
            message = f"{files.path} has {what} at offset {first * BLOCK}"
            lost = self._cost().of_blocks(volume, first, length)
            self._note_lost(Damage(files.path, first * BLOCK, message, self._still_without(lost), lost))
        self.report.files += block == 0
        size = files.used_bytes_in(block, count)
        self.report.bytes_read += size
        self._unpaid += size

    def _still_without(self, lost: tuple[int, int | None]) -> str:
        costs = self._cost()
        if lost[0] == costs.base.write:
            return "no point can be restored without this block, since no interval changed it"
        number = next(n for n, each in costs.listed.items() if each.interval.to_write == lost[0])
        before = costs.listed[number].interval.first - 1
        return f"boundary {before} and everything before it can still be restored; later points lack the block"

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The image stays where it is inside, and retention lets go of nothing."""
        with image_held(self.store):
            self._holding = True
            try:
                yield
            finally:
                self._holding = False

    # --- what was found

    def _cost(self) -> Costs:
        if self._costs is None:
            base = read_base(self.store)
            if base is None:
                raise TargetError("the first backup image is not complete", "pgcdp status tells how far it is")
            self._costs = Costs(self.store, base, survey(self.store))
        return self._costs

    def _note(self, file: Path, offset: int, message: str, still: str, boundary: int | None = None) -> None:
        """Report a damage; where the message names another file of the same directory or an offset, these count."""
        beside = [path for path in file.parent.glob("*") if str(path) in message]
        named = max(beside, key=lambda path: len(path.name), default=file)
        place = re.search(r"offset (\d+)", message)
        at = int(place[1]) if place else offset
        lost = None
        with suppress(PgcdpError):
            lost = self._cost().lost(named, at)
        self._note_lost(Damage(named, at, message, still, lost))

    def _note_lost(self, damage: Damage) -> None:
        self.report.damages.append(damage)

    def _found(self, begun: int) -> list[Damage]:
        self._costs = None  # the store goes on
        return self.report.damages[begun:]

    def _read(self, file: Path, *, paid: bool = False) -> None:
        """Count a file that was read; `paid`: its bytes were told of already."""
        with suppress(FileNotFoundError):
            size = file.stat().st_size
            self.report.files += 1
            self.report.bytes_read += size
            if not paid:
                self._owe(size)

    def _owe(self, size: int) -> None:
        """So many bytes were read: they are told of at once, or when nothing is held any more."""
        self._unpaid += size
        if not self._holding:
            self._pay()

    def _pay(self) -> None:
        unpaid, self._unpaid = self._unpaid, 0
        if unpaid:
            self.count(unpaid)


_WRITTEN_AGAIN = "the agent writes it again when it starts, and the image's state with each interval, too"
_WITHOUT_STATE = "nothing is known to be restorable without the image's state"
_WITHOUT_DATA_KEY = f"everything, as long as a copy of {wrapped.FILES[0]} is elsewhere"
_WITHOUT_REWINDS = (
    "every boundary and write can still be restored; should an interval with a rewind in it be lost, too, transactions "
    "that this rewind left would count as current"
)
_WITHOUT_GAPS = (
    "every boundary and write can still be restored; should an interval with a gap in it be lost, too, a time in that "
    "gap would count as one that is known"
)
_WITHOUT_TIMELINES = "every boundary and write can still be restored; a rewind may take a timeline a second time"


class _noting:  # noqa: N801 - used like a function
    """A context that turns an error into a reported damage."""

    def __init__(self, scrub: Checker, file: Path, still: str) -> None:
        self.scrub, self.file, self.still = scrub, file, still

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, PgcdpError):
            self.scrub._note(self.file, 0, error.message, self.still)
            return True
        if isinstance(error, OSError):
            self.scrub._note(self.file, 0, f"{self.file} cannot be read: {error.strerror}", self.still)
            return True
        return False


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of blocks that follow each other."""
    at = 0
    while at < len(blocks):
        end = at + 1
        while end < len(blocks) and blocks[end] == blocks[end - 1] + 1:
            end += 1
        yield blocks[at], end - at
        at = end


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


def total_bytes(store: Store) -> int:
    """What the files of a store take on disk."""
    total = 0
    for directory, below, names in os.walk(store.path):
        if directory == os.fspath(store.path) and store.aside.name in below:
            below.remove(store.aside.name)
        for name in names:
            with suppress(FileNotFoundError):  # the agent goes on meanwhile
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total
