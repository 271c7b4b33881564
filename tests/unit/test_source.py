"""A source while the agent goes on, and when something of it is broken: nothing is missed, nothing is skipped."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgcdp.capture.journal import BatchRun, Journal
from pgcdp.errors import DamageError, PreconditionError, TargetError
from pgcdp.intervals.applying import FileTarget
from pgcdp.intervals.increments import close_interval
from pgcdp.records import BLOCK, Position, Target, Volume
from pgcdp.recovery.materializing import materialize
from pgcdp.recovery.source import Source
from pgcdp.store.bundle import CONTENTS
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import Image
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval, read_open, read_open_index, read_open_last
from pgcdp.store.scrub import check_store
from tests.unit.test_increments import SET_ID, World, boundary, capture, make_world, random_op, run_interval

PUBLISHED, TAKEN, DURABLE = 20, 30, 60


class BusyJournal(Journal):
    """A journal whose first reader is overtaken: the agent does something between its look at the store and this."""

    meanwhile: Callable[[], None] | None = None

    def batches(self, after_write: int, upto_write: int | None, start: Position | None = None) -> Iterator[BatchRun]:
        if self.meanwhile is not None:
            todo, self.meanwhile = self.meanwhile, None
            todo()
        return super().batches(after_write, upto_write, start)


class RestartedJournal(Journal):
    """A journal whose capture starts again just after the first look for segments, and removes the empty last one."""

    restarted = False

    def segments(self) -> list[int]:
        found = super().segments()
        if not self.restarted:
            self.restarted = True
            self.path(found[-1]).unlink()
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Interval 1 with writes 1 to 20; 21 to 30 in the open one, in several frames; 31 to 60 in the journal only."""
    made = make_world(tmp_path)
    chooser = random.Random(5)
    run_interval(made, 1, "optimal", chooser, PUBLISHED)
    made.store = made.store.with_baseline(boundary(0, 0))
    capture(made, [random_op(chooser) for _ in range(TAKEN - PUBLISHED)], chooser)
    take(made, TAKEN, step=2)
    capture(made, [random_op(chooser) for _ in range(DURABLE - TAKEN)], chooser)
    return made


def reopen(world: World) -> OpenInterval:
    """The open interval as the agent left it, which had told the journal of each sync."""
    made = world.store.incoming(2).is_dir()
    last = read_open_last(world.store, 2) if made else None
    released = PUBLISHED if last is None else int(last["number"])
    return OpenInterval.open(world.store, 2, PUBLISHED + 1, durable_write=released)


def take(world: World, upto: int, step: int = 10) -> None:
    """The agent takes writes into the open interval and syncs after every few."""
    opened = reopen(world)
    while opened.last_write < upto:
        for run in world.journal.batches(opened.last_write, min(upto, opened.last_write + step)):
            opened.append(run)
        opened.sync()
    opened.close()


def recycle(world: World) -> None:
    """The journal gives away all it may: every segment but the newest."""
    for segment in world.journal.segments()[:-1]:
        world.writer.path(segment).rename(world.writer.directory / f"free-{segment:016d}")


def relieve(world: World) -> None:
    take(world, DURABLE)
    recycle(world)


def publish(world: World) -> None:
    take(world, DURABLE)
    image = Image.open(world.store)
    opened = reopen(world)
    close_interval(world.store, opened, image, boundary(2, DURABLE), {})
    image.close()
    recycle(world)


def busy_source(world: World, meanwhile: Callable[[World], None]) -> Source:
    journal = BusyJournal(world.writer.directory, SET_ID)
    source = Source(Store.open(world.store.path), journal, DURABLE)
    source.intervals()
    journal.meanwhile = lambda: meanwhile(world)
    return source


def materialized(source: Source, write: int, place: Path) -> list[bytes]:
    files = [place / f"{volume.name}.out" for volume in source.store.volumes]
    fds = [os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for file in files]
    for fd, volume in zip(fds, source.store.volumes, strict=True):
        os.ftruncate(fd, volume.bytes)
    with source.held():
        materialize(source, source.resolve(Target("write", write)), FileTarget(fds))
    for fd in fds:
        os.close(fd)
    return [file.read_bytes() for file in files]


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# --- overtaken by the agent


@pytest.mark.parametrize("meanwhile", [relieve, publish])
def test_every_look_may_be_overtaken(world: World, tmp_path: Path, meanwhile: Callable[[World], None]) -> None:
    before = tmp_path / "before"
    for name in ("store", "journal"):
        shutil.copytree(tmp_path / name, before / name)

    def again() -> Source:
        for name in ("store", "journal"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(before / name, tmp_path / name)
        return busy_source(world, meanwhile)

    late = 10**18 + 45
    assert again().resolve(Target("time", late)).write == DURABLE  # no transaction is later
    assert again().resolve(Target("write", 45)).time_ns == late
    assert again().resolve(Target("newest")).time_ns == 10**18 + DURABLE
    assert again().window()[1].write == DURABLE
    assert int(again().record(45)["number"]) == 45
    assert again().data(45) == world.ops[44].data
    assert materialized(again(), DURABLE, tmp_path) == world.contents()


def test_capture_that_starts_again_removes_a_segment_that_was_seen(world: World) -> None:
    world.writer.new_segment()
    journal = RestartedJournal(world.writer.directory, SET_ID)
    assert Source(Store.open(world.store.path), journal).window()[1].write == DURABLE
    assert journal.restarted


def test_a_store_alone_whose_open_interval_is_published(world: World) -> None:
    source = Source(Store.open(world.store.path))
    listing = source.listing()
    assert listing.newest_write == TAKEN
    publish(world)
    assert listing.times(None).tolist() == [10**18 + write for write in range(PUBLISHED + 1, TAKEN + 1)]
    assert source.data(TAKEN) == world.ops[TAKEN - 1].data


def test_what_nobody_holds_is_damage(world: World) -> None:
    recycle(world)
    source = Source(Store.open(world.store.path), world.journal, DURABLE)
    with pytest.raises(DamageError, match=r"write \d+ is wanted"):
        source.record(TAKEN + 1)


# --- damage in the open interval


def broken(world: World, name: str, at: int | None) -> tuple[Path, int]:
    """Flip a byte of the header (`at` None) or of the frame `at`; the file and the offset that must be named."""
    path = world.store.incoming(2) / name
    if at is None:
        flip(path, 40)
        return path, 0
    with FrameReader.open(path, CONTENTS[name], SET_ID, 2, unfinished=True) as reader:
        offset = reader.entries[at].offset
    flip(path, offset + 40)
    return path, offset


@pytest.mark.parametrize("name", ["writes", "index"])
@pytest.mark.parametrize("frame", [None, 0, 2, -1])
def test_damage_of_the_open_interval_is_named(world: World, tmp_path: Path, name: str, frame: int | None) -> None:
    path, offset = broken(world, name, frame)
    named = rf"{path} .*offset {offset}"
    with pytest.raises(DamageError, match=named):
        read_open(world.store, 2)
    with pytest.raises(DamageError, match=named):
        materialized(Source(Store.open(world.store.path)), TAKEN, tmp_path)
    with pytest.raises(DamageError, match=named):
        materialized(Source(Store.open(world.store.path), world.journal, DURABLE), DURABLE, tmp_path)
    assert (path, offset) in [(damage.file, damage.offset) for damage in check_store(world.store).damages]
    published = Source(Store.open(world.store.path))
    assert materialized(published, PUBLISHED, tmp_path) == world.states[1]
    assert published.resolve(Target("boundary", 1)).write == PUBLISHED
    if frame in (None, -1):
        for target in (Target("newest"), Target("time", 10**18 + PUBLISHED), Target("write", TAKEN)):
            with pytest.raises(DamageError, match=named):
                published.resolve(target)


@pytest.mark.parametrize("name", ["writes", "index"])
def test_a_lost_file_of_the_open_interval_is_damage(world: World, name: str) -> None:
    path = world.store.incoming(2) / name
    for size in (10, None):
        if size is None:
            path.unlink()
        else:
            os.truncate(path, size)
        with pytest.raises(DamageError, match=str(path)):
            Source(Store.open(world.store.path)).window()
        assert [damage.file for damage in check_store(world.store).damages] == [path]


def test_an_interval_that_is_being_made_is_no_damage(world: World) -> None:
    publish(world)
    place = world.store.incoming(3)
    place.mkdir()
    for name in ("writes", "index"):
        (place / name).write_bytes(b"")
        assert Source(Store.open(world.store.path)).window()[1].write == DURABLE
        assert check_store(world.store).ok


def test_a_torn_tail_is_no_damage(world: World) -> None:
    path = world.store.incoming(2) / "writes"
    os.truncate(path, path.stat().st_size - 10)
    source = Source(Store.open(world.store.path))
    newest = source.window()[1].write
    assert PUBLISHED < newest < TAKEN
    assert newest == PUBLISHED + len(read_open_index(world.store, 2))
    with pytest.raises(TargetError, match=f"writes 0 to {newest} can be restored"):
        source.resolve(Target("write", newest + 1))


def test_a_tail_that_was_released_is_damage_of_the_store(world: World) -> None:
    """Nothing in the file tells that its last frame was durable; the journal's mark does."""
    take(world, DURABLE, step=DURABLE)
    recycle(world)
    world.writer.mark(DURABLE, DURABLE, DURABLE)
    path = world.store.incoming(2) / "writes"
    os.truncate(path, path.stat().st_size - 10)
    for durable in (None, DURABLE):
        with pytest.raises(DamageError, match=rf"{path} is damaged at offset \d+: .* up to {DURABLE} were durable"):
            Source(Store.open(world.store.path), world.journal, durable).record(TAKEN + 1)
    with pytest.raises(DamageError, match=str(path)):
        Source(Store.open(world.store.path), world.journal).window()


# --- the newest point is cheap


def test_the_newest_point_reads_only_the_end(world: World) -> None:
    """What lies before the end is broken, so whoever reads it would tell."""
    broken(world, "writes", 1)
    broken(world, "index", 1)
    assert Source(Store.open(world.store.path)).window()[1].write == TAKEN
    last = read_open_last(world.store, 2)
    assert last is not None
    assert int(last["number"]) == TAKEN
    first = next(placed for placed in world.writer.placed if placed.first > TAKEN)
    assert first.segment < world.writer.segment
    world.writer.poke(first.segment, first.offset + 5000, b"broken")
    world.writer.mark(DURABLE - 2, PUBLISHED, world.writer.placed[-1].last)
    assert Source(Store.open(world.store.path), world.journal).window()[1].write == DURABLE
    assert Source(Store.open(world.store.path), world.journal, DURABLE).window()[1].time_ns == 10**18 + DURABLE


def test_the_end_of_a_journal_behind_an_old_mark(world: World) -> None:
    placed = world.writer.placed[-3]
    newest = Source(Store.open(world.store.path), world.journal)
    assert newest.window()[1].write == DURABLE
    world.writer.number, world.writer.previous = placed.number + 1, (placed.segment, placed.offset + placed.length)
    world.writer.mark(placed.first, PUBLISHED, placed.last)
    assert newest.window()[1].write == DURABLE


# --- an image that is not there yet


def test_an_image_on_its_way_to_boundary_0_is_not_read(tmp_path: Path) -> None:
    """The agent was killed between naming boundary 0 and bringing the image there."""
    volumes = [Volume(0, "data", 40 * BLOCK)]
    store = Store.create(tmp_path / "store", "s", SET_ID, volumes)
    image = Image.create(store, 1)
    image.set_baseline(3, {volume.name: volume.bytes for volume in volumes})
    image.close()
    source = Source(store.with_baseline(boundary(0, 5)))
    with pytest.raises(PreconditionError, match="the first backup image of set s is being finished") as caught:
        materialized(source, 5, tmp_path)
    assert "pgcdp status s" in str(caught.value.hint)
