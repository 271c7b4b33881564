"""The map of a view against the dumb model: for random histories every block is what the last write left there."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pgcdp.errors import BugError, DamageError, TargetError
from pgcdp.intervals.applying import FileTarget
from pgcdp.intervals.increments import Mode, close_interval, move_image
from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, MAP_EXTENT, RecoveryPoint
from pgcdp.recovery import blockmap, patch
from pgcdp.recovery.mapfile import FramesSource, ImageSource, ViewMap, decode, encode
from pgcdp.recovery.materializing import materialize
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import make_map, moved_on
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import Image
from pgcdp.store.layout import Store
from tests.journal_writer import WRITE, Op
from tests.unit.test_increments import (
    BLOCKS,
    SET_ID,
    apply_op,
    boundary,
    capture,
    fill,
    make_world,
    random_op,
    run_interval,
)


def served(view: ViewMap) -> list[bytes]:
    """What a view of this map shows, by the plainest reading of FORMAT.md 5."""
    volumes = []
    for image, volume in zip(view.images, view.volumes, strict=True):
        source = view.sources[image]
        assert isinstance(source, ImageSource)
        volumes.append(bytearray(Path(f"{source.path}.img").read_bytes()))
        assert len(volumes[-1]) == volume.bytes
    readers: dict[int, FrameReader] = {}
    for extent in view.extents:
        begin, length = int(extent["block"]) * BLOCK, int(extent["count"]) * BLOCK
        content = bytes(length)
        if extent["kind"] == EXTENT_DATA:
            number = int(extent["source"])
            frames = view.sources[number]
            assert isinstance(frames, FramesSource)
            if number not in readers:
                readers[number] = FrameReader.open(frames.path, frames.content, SET_ID, frames.interval)
            content = readers[number].read(int(extent["position"]), length)
        volumes[int(extent["volume"])][begin : begin + length] = content
    for reader in readers.values():
        reader.close()
    return [bytes(volume) for volume in volumes]


def materialized(source: Source, point: RecoveryPoint, place: Path) -> list[bytes]:
    fds = [os.open(place / f"{v.name}.out", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for v in source.store.volumes]
    for fd, volume in zip(fds, source.store.volumes, strict=True):
        os.ftruncate(fd, volume.bytes)
    materialize(source, point, FileTarget(fds))
    for fd in fds:
        os.close(fd)
    return [(place / f"{volume.name}.out").read_bytes() for volume in source.store.volumes]


def wal_op(chooser: random.Random) -> Op:
    """A write of up to three WAL pages of 8192 bytes (not a valid log, but pages with their headers)."""
    pages = chooser.randrange(1, 4)
    begin = chooser.randrange(BLOCKS - 2 * pages)
    data = b"".join(chooser.randbytes(8192) for _ in range(pages))
    return Op(WRITE, chooser.randrange(2), begin * BLOCK, len(data), data)


class Scene:
    """A history with published intervals, an open one, and a tail in the journal; the image anywhere."""

    def __init__(self, place: Path, seed: int, sizes: list[int], taken: int, behind: int) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        self.chooser = random.Random(seed)
        self.world = make_world(place)
        for number, size in enumerate(sizes, 1):
            run_interval(self.world, number, "optimal", self.chooser, size)
        self.world.store = self.world.store.with_baseline(boundary(0, 0))
        self.capture(taken)
        frame_bytes = self.chooser.choice([BLOCK, 3 * BLOCK + 512, 20 * BLOCK])  # a write may lie in several
        opened = fill(self.world, len(sizes) + 1, len(self.world.ops), frame_bytes)
        opened.sync()
        opened.close()
        self.capture(behind)

    def capture(self, count: int) -> None:
        make = [random_op, random_op, random_op, wal_op]
        capture(self.world, [self.chooser.choice(make)(self.chooser) for _ in range(count)], self.chooser)

    def publish(self, number: int) -> Bundle:
        """Interval `number` is published, and the image still where it was."""
        opened = fill(self.world, number, len(self.world.ops))
        image = Image.open(self.world.store, writable=True)
        bundle = close_interval(self.world.store, opened, image, boundary(number, len(self.world.ops)), {})
        image.close()
        return bundle

    def leave_moving(self, number: int) -> None:
        """Interval `number` is published, but the image was on its way to it when the agent was killed."""
        self.move_in_part(self.publish(number))

    def move_in_part(self, bundle: Bundle) -> None:
        """The image is on its way, with anything in the blocks that the move changes."""
        image = Image.open(self.world.store, writable=True)
        image.set_moving(bundle.number)
        forward = bundle.forward_map()
        with bundle.writes() as writes:
            for extent in forward:
                what = self.chooser.choice(["old", "new", "neither"])
                first, count = int(extent["block"]), int(extent["count"])
                if what == "new" and extent["kind"] == EXTENT_DATA:
                    data = writes.read(int(extent["source"]), count * BLOCK)
                    image.write_blocks(int(extent["volume"]), first, data)
                elif what == "neither":
                    image.write_blocks(int(extent["volume"]), first, self.chooser.randbytes(count * BLOCK))
        image.sync()
        image.close()

    def source(self, *, trusting: bool = False) -> Source:
        return Source(Store.open(self.world.store.path), self.world.journal, len(self.world.ops), trusting=trusting)

    def at(self, write: int) -> list[bytes]:
        """What the dumb model holds after a write."""
        model = [bytearray(BLOCKS * BLOCK) for _ in range(2)]
        for op in self.world.ops[:write]:
            apply_op(model, op)
        return [bytes(volume) for volume in model]

    def mapped(self, point: RecoveryPoint, place: Path | None = None) -> ViewMap:
        place = place or self.place
        place.mkdir(exist_ok=True)
        (place / "patch").unlink(missing_ok=True)
        source = self.source()
        with source.held():
            return make_map(source, point, place)

    def assert_view_is_right(self, write: int) -> None:
        point = RecoveryPoint(write, None, 0)
        view = self.mapped(point)
        assert served(view) == self.at(write), f"write {write}"
        named = set(view.extents["source"][view.extents["kind"] == EXTENT_DATA].tolist())
        assert named == set(range(len(view.volumes), len(view.sources))), "no file is opened that nothing is read from"
        again = decode(encode(view), self.place)
        assert np.array_equal(again.extents, view.extents)
        assert replace(again, extents=view.extents) == view

    def blank_points(self, write: int) -> list[RecoveryPoint]:
        """A point at this write whose WAL is blank from somewhere on, if one of the last writes can be WAL."""
        chosen = [n for n in range(max(1, write - 5), write + 1) if self.world.ops[n - 1].kind == WRITE]
        if not chosen or len(self.world.ops[chosen[-1] - 1].data) % 8192:
            return []
        at = self.chooser.randrange(24, len(self.world.ops[chosen[-1] - 1].data) // 8) * 8
        return [RecoveryPoint(write, None, 0, lsn=at, blank_at=at, blank_write=chosen[-1])]

    def assert_blank_is_right(self, write: int) -> None:
        for point in self.blank_points(write):
            source = self.source()
            with source.held():
                wanted = materialized(source, point, self.place)
            assert served(self.mapped(point)) == wanted, f"{point}"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    sizes=st.lists(st.integers(1, 30), max_size=6),
    taken=st.integers(0, 25),
    behind=st.integers(0, 25),
    moving=st.booleans(),
    kept=st.sampled_from([0, 40 * BLOCK, patch.KEPT_BYTES]),
)
def test_every_block_of_a_map_is_what_the_last_write_left(
    seed: int,
    sizes: list[int],
    taken: int,
    behind: int,
    moving: bool,
    kept: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = tmp_path_factory.mktemp("scene")
    scene = Scene(place, seed, sizes, taken, behind)
    if moving and taken + behind:
        scene.leave_moving(len(sizes) + 1)
        scene.capture(taken)
    newest = len(scene.world.ops)
    starts = [0, newest, *(interval.to_write for interval in scene.source().intervals())]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch, "KEPT_BYTES", kept)
        for write in {*starts, *(scene.chooser.randrange(newest + 1) for _ in range(6))}:
            scene.assert_view_is_right(write)
            scene.assert_blank_is_right(write)
    shutil.rmtree(place)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    sizes=st.lists(st.integers(1, 20), max_size=4),
    taken=st.integers(0, 10),
    behind=st.integers(0, 10),
    more=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    mode=st.sampled_from(["optimal", "replay"]),
)
def test_a_map_stays_right_while_the_image_moves_under_it(
    seed: int,
    sizes: list[int],
    taken: int,
    behind: int,
    more: list[int],
    mode: Mode,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Before each move, in the middle of it with anything in the blocks that it changes, and behind it."""
    place = tmp_path_factory.mktemp("scene")
    scene = Scene(place, seed, sizes, taken, behind + 1)
    points = {0, len(scene.world.ops), *(scene.chooser.randrange(len(scene.world.ops) + 1) for _ in range(3))}
    wanted = {write: scene.at(write) for write in points}
    views = {write: scene.mapped(RecoveryPoint(write, None, 0), place / str(write)) for write in points}
    for number, size in enumerate(more, len(sizes) + 1):
        scene.capture(size)
        bundle = scene.publish(number)
        views = {write: moved_on(view, bundle) or view for write, view in views.items()}
        assert {write: served(view) for write, view in views.items()} == wanted, "the image has not moved yet"
        scene.move_in_part(bundle)
        assert {write: served(view) for write, view in views.items()} == wanted, "in the middle of a move"
        assert [moved_on(view, bundle) for view in views.values()] == [None] * len(views), "told again after a kill"
        image = Image.open(scene.world.store, writable=True)
        move_image(image, bundle, mode)
        image.close()
        assert {write: served(view) for write, view in views.items()} == wanted, "the image has moved"
        scene.capture(1)
    shutil.rmtree(place)


def test_a_published_interval_is_found_while_the_tail_is_copied(tmp_path: Path) -> None:
    """The agent publishes between the look at the store and the look at the journal, and the journal forgets."""
    scene = Scene(tmp_path, 3, [10, 10], 12, 8)
    source = scene.source()
    batches, done = source.batches, False

    def overtaken(after: int, upto: int) -> object:
        nonlocal done
        if not done:
            done = True
            scene.leave_moving(3)
            for segment in scene.world.journal.segments()[:-1]:
                scene.world.writer.path(segment).unlink()
        return batches(after, upto)

    source.batches = overtaken  # type: ignore[method-assign,assignment]
    newest = len(scene.world.ops)
    image = source.image_state()
    view = make_map(source, RecoveryPoint(newest, 3, 0), tmp_path)
    assert done
    assert image.state == "at", "the image was held: only what moves it in this test does not ask"
    assert served(replace(view)) == scene.at(newest)


# --- the pieces


def random_extents(chooser: random.Random, blocks: int, source: int) -> NDArray[np.void]:
    rows = []
    for volume in (0, 1):
        block = chooser.randrange(6)
        while block < blocks:
            count = min(chooser.randrange(1, 9), blocks - block)
            kind = chooser.choice([EXTENT_DATA, EXTENT_ZEROS])
            position = chooser.randrange(100) * BLOCK if kind == EXTENT_DATA else 0
            rows.append((block, count, volume, kind, position, source if kind == EXTENT_DATA else 0, 0))
            block += count + chooser.choice([0, 0, 1, 5])
    return np.array(rows, dtype=MAP_EXTENT)


def by_block(extents: NDArray[np.void]) -> dict[tuple[int, int], tuple[int, int, int]]:
    found = {}
    for extent in extents.tolist():
        block, count, volume, kind, position, source, _ = extent
        for i in range(count):
            assert (volume, block + i) not in found, "overlapping"
            found[volume, block + i] = (kind, position + i * BLOCK if kind == EXTENT_DATA else 0, source)
    return found


def test_a_layer_hides_what_lies_below_it() -> None:
    chooser = random.Random(17)
    for _ in range(300):
        layers = [random_extents(chooser, 40, number) for number in range(chooser.randrange(1, 8))]
        wanted: dict[tuple[int, int], tuple[int, int, int]] = {}
        for part in layers:
            wanted |= by_block(part)
        made = blockmap.flatten(layers)
        assert by_block(made) == wanted
        blockmap.check(made, [40, 40])
        assert len(made) <= 2 * sum(len(part) for part in layers) + 1


def test_a_discard_of_everything_stays_a_range() -> None:
    """One row for 8 TiB below, one data block on top: three rows, at once."""
    blocks = 1 << 31
    bottom = np.array([(0, blocks, 0, EXTENT_ZEROS, 0, 0, 0)], dtype=MAP_EXTENT)
    top = np.array([(12345, 1, 0, EXTENT_DATA, 0, 7, 0)], dtype=MAP_EXTENT)
    made = blockmap.overlay(top, bottom)
    assert made["block"].tolist() == [0, 12345, 12346]
    assert made["count"].tolist() == [12345, 1, blocks - 12346]
    with pytest.raises(BugError, match="outside"):
        blockmap.check(made, [blocks - 1])
    with pytest.raises(BugError, match="overlap"):
        blockmap.check(np.concatenate([made, top]), [blocks])


def test_an_interval_that_is_missing_is_said(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 5, [5, 5, 5], 0, 0)
    with pytest.raises(TargetError, match="no interval 2"):
        blockmap.plan(3, 15, None, [i for i in scene.source().intervals() if i.number != 2], 7)


def test_a_damaged_map_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 5, [5], 3, 3)
    raw = bytearray(encode(scene.mapped(RecoveryPoint(8, None, 0))))
    for at in range(0, len(raw), 7):
        raw[at] ^= 4
        with pytest.raises(DamageError, match="offset 0"):
            decode(bytes(raw), tmp_path)
        raw[at] ^= 4
