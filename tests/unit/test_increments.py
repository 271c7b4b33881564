"""Increments against a dumb model: a bytearray a volume, every write applied to it in order."""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcdp.capture.journal import Journal
from pgcdp.errors import BugError, DamageError
from pgcdp.intervals.applying import FileTarget, apply_backward, apply_forward, apply_writes, replay_writes
from pgcdp.intervals.extents import forward_map, spans
from pgcdp.intervals.increments import build_increments, close_interval, move_image
from pgcdp.records import INDEX, Boundary, Volume
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import Image, ImageState, read_state
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval, read_open
from tests import small_store
from tests.journal_writer import BLOCK, DISCARD, MARK, WRITE, ZERO, JournalWriter, Op

SET_ID = small_store.SET_ID
BLOCKS = 40
Model = list[bytearray]


def boundary(number: int, write: int) -> Boundary:
    return Boundary(number, write, 10**18 + write, 100 + number, 90 + number, 1, 700 + number, "period")


def apply_op(model: Model, op: Op) -> None:
    if op.kind == WRITE:
        model[op.volume][op.offset : op.offset + op.length] = op.data
    elif op.kind in (ZERO, DISCARD):
        model[op.volume][op.offset : op.offset + op.length] = bytes(op.length)


def random_op(chooser: random.Random) -> Op:
    kind = chooser.choice([WRITE, WRITE, WRITE, WRITE, ZERO, DISCARD, MARK])
    if kind == MARK:
        return Op(MARK, data=b"m" * chooser.randrange(1, 9))
    begin = chooser.randrange(BLOCKS)
    count = chooser.randrange(1, min(BLOCKS - begin, 9 if kind == WRITE else BLOCKS) + 1)
    data = b""
    if kind == WRITE:
        data = b"".join(chooser.choice([bytes(BLOCK), chooser.randbytes(64) * 64]) for _ in range(count))
    return Op(kind, chooser.randrange(2), begin * BLOCK, count * BLOCK, data)


@dataclass
class World:
    store: Store
    journal: Journal
    writer: JournalWriter
    model: Model
    states: list[list[bytes]]
    ops: list[Op]

    def contents(self) -> list[bytes]:
        return [bytes(volume) for volume in self.model]


def make_world(place: Path) -> World:
    volumes = [Volume(0, "data", BLOCKS * BLOCK), Volume(1, "wal", BLOCKS * BLOCK)]
    store = Store.create(place / "store", "s", SET_ID, volumes, {"cluster": {"system_identifier": "1"}})
    image = Image.create(store, 1)
    image.set_at(0, 0)
    image.close()
    writer = JournalWriter(place / "journal", SET_ID)
    world = World(
        store, Journal(writer.directory, SET_ID), writer, [bytearray(BLOCKS * BLOCK) for _ in volumes], [], []
    )
    world.states.append(world.contents())
    return world


def capture(world: World, ops: list[Op], chooser: random.Random) -> None:
    """Journal some writes, in batches of any size."""
    at = 0
    while at < len(ops):
        size = chooser.randrange(1, 5)
        world.writer.append(ops[at : at + size])
        at += size
    for op in ops:
        apply_op(world.model, op)
    world.ops += ops


def fill(world: World, number: int, upto: int, frame_bytes: int | None = None) -> OpenInterval:
    first = upto_of(world, number - 1) + 1
    opened = OpenInterval.open(world.store, number, first)
    if frame_bytes is not None:
        opened._writes._frame_bytes = frame_bytes
    for run in world.journal.batches(opened.last_write, upto):
        opened.append(run)
    return opened


def upto_of(world: World, number: int) -> int:
    return Bundle.open(world.store, number).interval.to_write if number else 0


def image_bytes(store: Store) -> list[bytes]:
    return [(store.image / f"{volume.name}.img").read_bytes() for volume in store.volumes]


def run_interval(world: World, number: int, mode: str, chooser: random.Random, size: int) -> Bundle:
    capture(world, [random_op(chooser) for _ in range(size)], chooser)
    opened = fill(world, number, len(world.ops))
    image = Image.open(world.store, writable=True)
    bundle = close_interval(world.store, opened, image, boundary(number, len(world.ops)), {"port": 5432})
    move_image(image, bundle, "replay" if mode == "replay" else "optimal")
    image.close()
    world.states.append(world.contents())
    return bundle


def applied(place: Path, before: list[bytes], apply: object, *args: object) -> list[bytes]:
    """What `apply` makes of plain files with this content."""
    fds = []
    for number, content in enumerate(before):
        (place / f"plain{number}").write_bytes(content)
        fds.append(os.open(place / f"plain{number}", os.O_RDWR))
    assert callable(apply)
    apply(FileTarget(fds), *args)
    for fd in fds:
        os.close(fd)
    return [(place / f"plain{number}").read_bytes() for number in range(len(before))]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_image_and_increments_equal_the_model(
    seed: int, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("world")
    chooser = random.Random(seed)
    world = make_world(place)
    for number, size in enumerate(sizes, 1):
        bundle = run_interval(world, number, chooser.choice(["replay", "optimal"]), chooser, size)
        before, after = world.states[number - 1], world.states[number]
        assert image_bytes(world.store) == after
        bundle.check()
        assert applied(place, after, apply_backward, bundle) == before
        assert applied(place, before, apply_forward, bundle) == after
        index, first = bundle.index(), bundle.interval.from_write
        point = chooser.randrange(first - 1, bundle.interval.to_write + 1)
        model = [bytearray(content) for content in before]
        for op in world.ops[first - 1 : point]:
            apply_op(model, op)
        with bundle.writes() as writes:
            for apply in (apply_writes, replay_writes):
                assert applied(place, before, apply, index, writes, point) == [bytes(volume) for volume in model]
    state = world.states[-1]
    for number in range(len(sizes), 0, -1):
        state = applied(place, state, apply_backward, Bundle.open(world.store, number))
        assert state == world.states[number - 1]
    image = Image.open(world.store)
    for volume in (0, 1):
        assert image.read_blocks(volume, 0, BLOCKS) == world.states[-1][volume]
    image.close()
    shutil.rmtree(place)


def test_maps_name_last_writers_and_never_overlap() -> None:
    chooser = random.Random(9)
    for _ in range(200):
        ops = [random_op(chooser) for _ in range(chooser.randrange(1, 60))]
        rows = np.zeros(len(ops), dtype=INDEX)
        last: dict[tuple[int, int], tuple[int, int]] = {}
        position = 0
        for i, op in enumerate(ops):
            size = len(op.data)
            rows[i] = (
                op.kind,
                0,
                op.volume,
                size,
                i + 1,
                0,
                0,
                op.offset,
                0 if op.kind == MARK else op.length,
                position,
                0,
            )
            for block in range(op.length // BLOCK):
                source = position + block * BLOCK if op.kind == WRITE else -1
                last[op.volume, op.offset // BLOCK + block] = (i + 1, source)
            position += size
        found: dict[tuple[int, int], tuple[int, int]] = {}
        extents = forward_map(rows)
        for extent in extents.tolist():
            block, count, volume, kind, source, number = extent
            for i in range(count):
                assert (volume, block + i) not in found
                found[volume, block + i] = (number, -1 if kind else source + i * BLOCK)
        assert found == last
        order = list(zip(extents["volume"].tolist(), extents["block"].tolist(), strict=True))
        assert order == sorted(order)
        assert sum(count for _, _, count in spans(extents)) == len(last)


def test_huge_discards_stay_ranges() -> None:
    rows = np.zeros(400, dtype=INDEX)
    rows["number"] = np.arange(1, 401)
    rows["kind"] = DISCARD
    rows["length"] = 1 << 50
    rows["kind"][200] = WRITE
    rows["offset"][200], rows["length"][200] = 1 << 40, BLOCK
    rows["kind"][399] = WRITE
    rows["offset"][399], rows["length"][399], rows["position"][399] = 1 << 45, BLOCK, 77
    extents = forward_map(rows)
    assert len(extents) <= 130
    assert int(extents["count"].astype(np.uint64).sum()) == (1 << 50) // BLOCK
    (data,) = extents[extents["kind"] == 0].tolist()
    assert data == ((1 << 45) // BLOCK, 1, 0, 0, 77, 400)
    assert spans(extents) == [(0, 0, (1 << 50) // BLOCK)]


def test_discard_of_a_huge_volume_is_cheap(tmp_path: Path) -> None:
    size = 64 << 30
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", size)])
    image = Image.create(store, 1)
    image.write_blocks(0, 1000, b"x" * BLOCK)
    image.write_blocks(0, size // BLOCK - 1, b"y" * BLOCK)
    image.set_at(0, 0)
    writer = JournalWriter(tmp_path / "journal", SET_ID)
    writer.append([Op(DISCARD, 0, i << 30, 1 << 30) for i in range(64)])
    opened = OpenInterval.open(store, 1, 1)
    for run in Journal(writer.directory, SET_ID).batches(0, 64):
        opened.append(run)
    begin = time.process_time()
    bundle = close_interval(store, opened, image, boundary(1, 64), {})
    move_image(image, bundle)
    assert time.process_time() - begin < 5
    assert bundle.interval.blocks_changed == size // BLOCK
    backward = bundle.backward_map()
    assert backward["kind"].tolist() == [1, 0, 1, 0]
    assert (store.image / "data.img").stat().st_blocks == 0
    image.close()


def test_wrong_start_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    chooser = random.Random(1)
    bundle = run_interval(world, 1, "optimal", chooser, 10)
    capture(world, [random_op(chooser) for _ in range(5)], chooser)
    opened = fill(world, 2, len(world.ops) - 1)
    image = Image.open(world.store, writable=True)
    with pytest.raises(BugError, match="does not end interval 2"):
        close_interval(world.store, opened, image, boundary(2, len(world.ops)), {})
    move_image(image, bundle)
    assert image.state.boundary == 1
    image.set_at(0, 0)
    with pytest.raises(BugError, match="interval 2 begins with write"):
        build_increments(opened, image)
    image.close()
    opened.close()


class Killed(Exception):
    """Stands for the moment of a kill."""


class DyingImage(Image):
    """An image whose process dies after some changes."""

    steps = 0

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Killed

    def write_blocks(self, volume: int, block: int, data: bytes | bytearray | memoryview) -> None:
        self.step()
        super().write_blocks(volume, block, data)

    def zero_blocks(self, volume: int, block: int, count: int) -> None:
        self.step()
        super().zero_blocks(volume, block, count)


@pytest.mark.parametrize("mode", ["optimal", "replay"])
def test_move_killed_at_every_step_ends_with_the_same_bytes(tmp_path: Path, mode: str) -> None:
    world = make_world(tmp_path)
    chooser = random.Random(4)
    run_interval(world, 1, "optimal", chooser, 30)
    capture(world, [random_op(chooser) for _ in range(25)], chooser)
    opened = fill(world, 2, len(world.ops))
    image = Image.open(world.store, writable=True)
    bundle = close_interval(world.store, opened, image, boundary(2, len(world.ops)), {})
    image.close()
    before = tmp_path / "before"
    shutil.copytree(world.store.image, before)
    kills = 0
    for steps in range(200):
        shutil.rmtree(world.store.image)
        shutil.copytree(before, world.store.image)
        image = DyingImage.open(world.store, writable=True)
        assert isinstance(image, DyingImage)
        image.steps = steps
        try:
            move_image(image, bundle, "replay" if mode == "replay" else "optimal")
        except Killed:
            kills += 1
            assert read_state(world.store) == ImageState("moving", boundary=1, write=30, to=2)
        done = image.steps >= 0
        if steps % 2:
            image.close()
        again = Image.open(world.store, writable=True)
        move_image(again, bundle, "replay" if mode == "replay" else "optimal")
        assert image_bytes(world.store) == world.contents()
        for volume in (0, 1):
            assert again.read_blocks(volume, 0, BLOCKS) == world.contents()[volume]
        again.close()
        if done:
            break
    assert kills > 5


def test_closing_killed_at_every_file_is_done_again(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    chooser = random.Random(6)
    run_interval(world, 1, "optimal", chooser, 20)
    capture(world, [random_op(chooser) for _ in range(25)], chooser)
    end = boundary(2, len(world.ops))
    opened = fill(world, 2, len(world.ops))
    image = Image.open(world.store)
    opened.set_boundary(end)
    opened.finish()
    build_increments(opened, image)
    opened.close()
    whole = tmp_path / "whole"
    shutil.copytree(opened.path, whole)
    first = opened.from_write
    checksums = set()
    for name in ("writes", "index", "backward", "backward.map", "forward.map", "settings.json", "manifest.json"):
        for keep in (0.0, 0.3, 0.9, 1.0):
            shutil.rmtree(opened.path, ignore_errors=True)
            shutil.rmtree(world.store.interval(2), ignore_errors=True)
            shutil.copytree(whole, opened.path)
            path = opened.path / name
            if name in ("writes", "index"):
                with FrameReader.open(path, b"WRIT" if name == "writes" else b"INDX", SET_ID, 2) as reader:
                    synced = reader.entries[-1].offset + 32 + reader.entries[-1].stored
                size = synced + int((path.stat().st_size - synced) * keep)
                os.truncate(path, size)
            elif path.exists():
                os.truncate(path, int(path.stat().st_size * keep))
            else:
                path.with_name(f".{name}.new").write_bytes(b"{" * int(10 * keep))
            again = OpenInterval.open(world.store, 2, first, durable_write=end.write)
            assert again.boundary == end
            bundle = close_interval(world.store, again, image, again.boundary, {})
            bundle.check()
            checksums.add(tuple(sorted(entry["checksum"] for entry in bundle.manifest["files"].values())))
    assert len(checksums) == 1
    image.close()


def test_killed_between_manifest_and_rename_still_knows_its_boundary(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    bundle = run_interval(world, 1, "optimal", random.Random(2), 10)
    shutil.copytree(bundle.path, world.store.incoming(1))
    shutil.rmtree(bundle.path)
    again = OpenInterval.open(world.store, 1, 1, durable_write=10)
    assert again.boundary == boundary(1, 10)
    again.close()


def test_open_interval_cut_at_any_byte_of_either_file(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    chooser = random.Random(8)
    capture(world, [random_op(chooser) for _ in range(30)], chooser)
    opened = OpenInterval.open(world.store, 1, 1)
    sizes = {}
    for run in world.journal.batches(0, len(world.ops)):
        for part in (run.upto(12), run.after(12)):
            opened.append(part)
            if part.last_write == 12:
                assert opened.sync() == 12
                sizes = {name: (opened.path / name).stat().st_size for name in ("writes", "index")}
    opened.sync()
    opened.close()
    whole = {name: (opened.path / name).read_bytes() for name in sizes}
    full = opened.last_write
    for name in sizes:
        for size in {*range(sizes[name], len(whole[name]), 17), len(whole[name])}:
            for other, raw in whole.items():
                (opened.path / other).write_bytes(raw[:size] if other == name else raw)
            snapshot = read_open(world.store, 1)
            with snapshot.writes:
                seen = len(snapshot.index)
            again = OpenInterval.open(world.store, 1, 1, durable_write=12)
            assert again.last_write == again.synced_write == 12  # the rest is in the journal
            assert 12 <= seen <= full
            for run in world.journal.batches(again.last_write, full):
                again.append(run)
            with again.reader() as reader:
                for row, op in zip(again.index(), world.ops, strict=True):
                    assert reader.read(int(row["position"]), int(row["data_length"])) == op.data
            again.close()
        for size in (0, 63, 64, 100, sizes[name] - 1):
            for other, raw in whole.items():
                (opened.path / other).write_bytes(raw[:size] if other == name else raw)
            with pytest.raises(DamageError):
                OpenInterval.open(world.store, 1, 1, durable_write=12)
