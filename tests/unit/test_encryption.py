"""An encrypted store: nobody reads the cluster in it, only its key opens it, and nothing in it can be moved."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pgcdp import keys, twice, wrapped
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.fsio import make_directory, read_file, read_json, write_json
from pgcdp.intervals.increments import close_interval, move_image
from pgcdp.intervals.superblocks import superblocks
from pgcdp.keys import KeySource
from pgcdp.postgres import timelines
from pgcdp.records import RecoveryPoint, Span
from pgcdp.recovery.joining import join
from pgcdp.recovery.left import damages_of
from pgcdp.recovery.merged import merge
from pgcdp.recovery.source import Source
from pgcdp.store import parquet
from pgcdp.store.base import COPIES, base_settings, publish_base
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameReader
from pgcdp.store.gaps import announce
from pgcdp.store.history import add_history
from pgcdp.store.image import Image
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.parquet import read_table, write_table
from pgcdp.store.scrub import check_store
from tests.fix_keys import opened_with, plain_files
from tests.journal_writer import BLOCK, WRITE, Op
from tests.small_store import flip, make_store
from tests.unit.test_blockmap import Scene, materialized
from tests.unit.test_increments import (
    SET_ID,
    DyingImage,
    Killed,
    boundary,
    capture,
    fill,
    make_world,
    random_op,
    run_interval,
)

MARKER = bytes.fromhex("c0ffee5eed") * 3 + b"the row that nobody may read"


def marked(place: Path) -> Store:
    """A store with everything that one can hold; MARKER is in the middle of incompressible blocks and in all texts."""
    place.mkdir()
    chooser = random.Random(5)
    world = make_world(place)
    for number in (1, 2):
        blocks = [chooser.randbytes(2000) + MARKER + chooser.randbytes(BLOCK - 2000 - len(MARKER)) for _ in range(8)]
        capture(world, [Op(WRITE, at % 2, at * BLOCK, BLOCK, data) for at, data in enumerate(blocks)], chooser)
        run_interval(world, number, "optimal", chooser, 6)
    store = world.store
    merge(store, Span(1, 2))
    add_history(store, "event", 7, {"event": "x", "said": MARKER.decode("latin-1")})
    announce(store, 3)
    pg_wal = place / "pg_wal"
    pg_wal.mkdir()
    (pg_wal / "00000002.history").write_bytes(b"1\t0/3000000\t" + MARKER[15:] + b"\n")
    timelines.keep(pg_wal, store.path / TIMELINES, archives=False)
    write_json(store.incoming(3).with_name("settings.json"), {"hba": MARKER[15:].decode()})
    names = pa.table({"name": [MARKER[15:].decode()]})
    write_table(store.incoming(3).with_name("relations.parquet"), names, rising=(), repeated=())
    return store


def with_marker(store: Store) -> set[str]:
    files = [path for path in store.path.rglob("*") if path.is_file()]
    return {path.name for path in files if MARKER[15:] in path.read_bytes()}


def test_nothing_of_the_cluster_can_be_read_in_any_file(
    tmp_path: Path, key: KeySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = marked(tmp_path / "sealed")
    assert store.encrypted
    assert with_marker(store) == set()
    assert plain_files(store.path) == []
    assert check_store(store).ok
    monkeypatch.delenv(keys.FILE_VARIABLE)
    plain = marked(tmp_path / "plain")  # the same is found where it is not encrypted
    assert not plain.encrypted
    assert with_marker(plain) >= {
        "writes",
        "data.img",
        "wal.img",
        "00000002.history",
        "settings.json",
        "relations.parquet",
    }
    assert len(plain_files(plain.path)) > 20


def test_equal_content_is_never_the_same_ciphertext(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    image = Image.open(store, writable=True)
    image.write_blocks(0, 0, b"same" * 1024 * 4)
    image.sync()
    once = (store.image / "data.img").read_bytes()[: 4 * BLOCK]
    assert len({once[at : at + BLOCK] for at in range(0, 4 * BLOCK, BLOCK)}) == 4
    image.write_blocks(0, 0, b"same" * 1024 * 4)
    image.sync()
    assert (store.image / "data.img").read_bytes()[:BLOCK] != once[:BLOCK]
    assert image.read_blocks(0, 0, 4) == b"same" * 1024 * 4
    image.close()


# --- what somebody changed who can compute checksums


def resummed(raw: bytearray, offset: int) -> bytes:
    """A frame's checksum made right again: only the tag tells."""
    stored = struct.unpack_from("<I", raw, offset + 20)[0]
    raw[offset + 24 : offset + 32] = bytes(8)
    digest = xxhash.xxh3_64_intdigest(bytes(raw[offset : offset + 32 + stored]))
    raw[offset + 24 : offset + 32] = struct.pack("<Q", digest)
    return bytes(raw)


def entries_of(path: Path) -> list[tuple[int, int]]:
    with FrameReader.open(path, b"WRIT", SET_ID, 1) as reader:
        return [(entry.offset, 32 + entry.stored) for entry in reader.entries]


def framed(place: Path) -> tuple[Store, Path]:
    """An interval whose `writes` have several frames of one length."""
    world = make_world(place)
    chooser = random.Random(8)
    capture(world, [Op(WRITE, 0, at * BLOCK, BLOCK, chooser.randbytes(BLOCK)) for at in range(12)], chooser)

    opened = fill(world, 1, len(world.ops), BLOCK)
    image = Image.open(world.store, writable=True)
    bundle = close_interval(world.store, opened, image, boundary(1, len(world.ops)), {})
    image.close()
    return world.store, bundle.path / "writes"


@pytest.mark.parametrize("at", ["nonce", "content", "tag", "codec"])
def test_a_changed_frame_with_a_right_checksum_is_damage(tmp_path: Path, key: KeySource, at: str) -> None:
    _, path = framed(tmp_path)
    offset, length = entries_of(path)[3]
    raw = bytearray(path.read_bytes())
    raw[offset + {"nonce": 32, "content": 60, "tag": length - 1, "codec": 4}[at]] ^= 1
    path.write_bytes(resummed(raw, offset))
    with FrameReader.open(path, b"WRIT", SET_ID, 1) as reader:
        assert len(reader.read(0, 3 * BLOCK)) == 3 * BLOCK
        with pytest.raises(DamageError, match=f"damaged frame at offset {offset}"):
            reader.read(3 * BLOCK, BLOCK)


def test_frames_cannot_be_swapped(tmp_path: Path, key: KeySource) -> None:
    store, path = framed(tmp_path)
    (one, length), (other, same) = entries_of(path)[2:4]
    assert length == same
    whole = path.read_bytes()
    raw = bytearray(whole)
    for to, source in ((one, other), (other, one)):  # the stored bytes, under headers that fit their new place
        raw[to + 32 : to + length] = whole[source + 32 : source + length]
        raw[:] = resummed(raw, to)
    path.write_bytes(raw)
    with FrameReader.open(path, b"WRIT", SET_ID, 1) as reader:
        for position in (2 * BLOCK, 3 * BLOCK):
            with pytest.raises(DamageError, match="damaged frame"):
                reader.read(position, BLOCK)
    # Another file's frames of the same place: its salt, and so its key, is another.
    again = path.with_name("other")
    shutil.copy(path, again)
    again.write_bytes(whole[:40] + os.urandom(16) + whole[56:])
    head = bytearray(again.read_bytes())
    head[56:64] = bytes(8)
    head[56:64] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(head[:64])))
    again.write_bytes(head)
    with pytest.raises(DamageError, match="damaged directory"):
        FrameReader.open(again, b"WRIT", SET_ID, 1)
    assert store.encrypted


def test_blocks_of_the_image_cannot_be_swapped(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    image = Image.open(store)
    blocks, sums = store.image / "data.img", store.image / "data.sums"
    for path, unit in ((blocks, BLOCK), (sums, 32)):
        raw = path.read_bytes()
        path.write_bytes(raw[unit : 2 * unit] + raw[:unit] + raw[2 * unit :])
    for block in (0, 1):
        with pytest.raises(DamageError, match=f"damaged block {block} at offset {block * BLOCK}"):
            image.read_blocks(0, block, 1)
    assert len(image.read_blocks(0, 2, 20)) == 20 * BLOCK
    raw = flip(sums, 2 * 32 + 14)
    with pytest.raises(DamageError, match="damaged block 2"):
        image.read_blocks(0, 0 + 2, 1)
    sums.write_bytes(raw)
    image.close()


def test_a_file_of_another_place_and_a_plain_one_are_refused(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    one, other = (store.interval(number) / "settings.json" for number in (1, 2))
    whole = one.read_bytes()
    shutil.copy(other, one)
    with pytest.raises(DamageError, match=rf"{one} is not what was encrypted \(offset 32\)"):
        read_json(one)
    one.write_text("{}")
    with pytest.raises(DamageError, match=rf"{one} is not encrypted as its store is"):
        read_json(one)
    one.write_bytes(whole)
    read_json(one)
    plain = tmp_path / "elsewhere"
    plain.mkdir()
    monkey = os.environ.pop(keys.FILE_VARIABLE)
    writes = make_store(plain).interval(1) / "writes"
    os.environ[keys.FILE_VARIABLE] = monkey
    shutil.copy(writes, store.interval(1) / "writes")
    with pytest.raises(DamageError, match="is not encrypted as its store is"):
        FrameReader.open(store.interval(1) / "writes", b"WRIT", SET_ID, 1)


def test_one_flipped_byte_in_any_file_is_found(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    chooser = random.Random(12)
    files = [path for path in sorted(store.path.rglob("*")) if path.is_file() and not path.name.endswith("lock")]
    for path in files:
        if "incoming" in path.parts or path.name in twice.STORE.names:
            continue
        for at in [0, path.stat().st_size - 1, *(chooser.randrange(path.stat().st_size) for _ in range(4))]:
            raw = flip(path, at, 6)
            if path.name not in wrapped.FILES or not raw[at : at + 1].isspace():
                assert not check_store(store).ok, (path, at)
            path.write_bytes(raw)
    assert check_store(store).ok


def test_the_oldest_boundary_of_joined_intervals_can_be_read(tmp_path: Path, key: KeySource) -> None:
    """What is encrypted is bound to its directory's name, and a joined interval's is another than the boundary's."""
    store = make_store(tmp_path)
    make_directory(store.aside)
    join(store, Span(1, 2))
    before = Bundle.at(store, Span(1, 2)).settings()
    publish_base(store, Span(1, 2))
    assert base_settings(store) == before != {}
    assert check_store(store).ok


def test_settings_that_were_copied_from_elsewhere_are_found_by_a_check(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    make_directory(store.aside)
    publish_base(store, Span(1, 1))
    place = store.bases / f"{1:010d}"
    foreign = (store.interval(2) / "settings.json").read_bytes()
    (place / "settings.json").write_bytes(foreign)
    for name in COPIES:
        content = read_json(place / name)
        files = {"settings.json": {"bytes": len(foreign), "checksum": xxhash.xxh3_64_hexdigest(foreign), "length": 1}}
        write_json(place / name, {**content, "files": files})
    assert not check_store(store).ok


# --- going on


def test_a_copy_elsewhere_is_opened_with_the_key(
    tmp_path: Path, key: KeySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path / "scene", 21, [9, 14, 7], 8, 0)
    whole = materialized(scene.source(), RecoveryPoint(scene.source().intervals()[-1].to_write, None, 0), scene.place)
    copy = tmp_path / "under" / "another" / "name"
    shutil.copytree(scene.world.store.path, copy)
    monkeypatch.delenv(keys.FILE_VARIABLE)
    with pytest.raises(PreconditionError, match="no key is given"):
        opened_with(copy, None)
    source = Source(opened_with(copy, key))
    point = RecoveryPoint(source.intervals()[-1].to_write, None, 0)
    assert materialized(source, point, scene.place) == whole
    assert check_store(source.store).ok


def test_a_move_killed_at_every_step_is_done_again(tmp_path: Path, key: KeySource) -> None:

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
            move_image(image, bundle)
        except Killed:
            kills += 1
            assert check_store(Store.open(world.store.path)).ok, "blocks on the move are not judged"
        done = image.steps >= 0
        if steps % 2:
            image.close()
        again = Image.open(world.store, writable=True)
        move_image(again, bundle)
        assert [again.read_blocks(volume, 0, len(each) // BLOCK) for volume, each in enumerate(world.contents())] == (
            world.contents()
        )
        again.close()
        if done:
            break
    assert kills > 5
    assert Bundle.open(world.store, 2).interval.number == 2


@pytest.mark.parametrize("what", ["block", "sum", "cut", "lost"])
def test_a_superblock_that_is_damaged_is_told_and_not_served(
    tmp_path: Path, key: KeySource, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path)
    image = Image.open(store)
    first = image.read_blocks(0, 0, 1)
    image.close()
    assert superblocks(store) == (first,)
    assert not caplog.records
    file = store.image / "data.img"
    if what == "block":
        flip(file, 1500)
    elif what == "sum":
        flip(file.with_suffix(".sums"), 20)
    elif what == "cut":
        os.truncate(file, 100)
    else:
        file.unlink()
    assert superblocks(store) == (None,)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the first block of volume data cannot be read: ")
    assert str(file) in said


def test_who_has_a_plain_store_does_not_wait_for_the_library_that_encrypts() -> None:
    """It is ten megabytes, to be read from a cold disk before a clone is there."""
    code = "import sys; from pgcdp import api; print([name for name in sys.modules if name.startswith('cryptography')])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_of_arrow_hold_no_object_of_python(
    tmp_path: Path, key: KeySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a process that ends while one of them lets go of it is aborted, behind all that it did."""
    store = make_store(tmp_path)
    path = store.incoming(1).with_name("relations.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pa.table({"name": ["orders"]}), rising=(), repeated=())
    content = read_file(path)
    seen = []

    open_table = pq.ParquetFile

    def watched(source: object, **options: bool) -> Any:
        seen.append((source, sys.getrefcount(content)))
        return open_table(source, **options)

    monkeypatch.setattr(parquet, "read_file", lambda path: content)
    monkeypatch.setattr(pq, "ParquetFile", watched)
    held = sys.getrefcount(content)
    assert read_table(path, "").to_pydict() == {"name": ["orders"]}
    ((source, during),) = seen
    assert isinstance(source, pa.BufferReader), "an encrypted table is read from memory"
    assert (during, sys.getrefcount(content)) == (held, held)


@pytest.mark.parametrize("entries", [1, 40])
def test_a_copy_without_the_end_of_its_sums_is_not_told_as_whole(tmp_path: Path, key: KeySource, entries: int) -> None:
    """An entry has 32 bytes here: counted as of a plain store, three quarters of them could be missing."""
    store = make_store(tmp_path)
    assert damages_of(Source(store)) == []
    sums = store.image / "data.sums"
    os.truncate(sums, sums.stat().st_size - 32 * entries)
    (damage,) = damages_of(Source(store))
    assert (damage.file, damage.offset) == (sums, sums.stat().st_size)
