"""What a view promises: the bytes of its recovery point or EIO, writes that touch nothing else, bounded memory."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

import tests.golden.make_golden as golden
from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, MAP_EXTENT, RecoveryPoint, Volume
from pgcdp.recovery.mapfile import FramesSource, ImageSource, ViewMap, encode
from pgcdp.store.frames import FrameReader, FrameWriter
from tests.fix_engine import Direct
from tests.fix_views import ShowMap, ShownView
from tests.raw_workload import erase
from tests.unit.test_blockmap import Scene, materialized
from tests.unit.test_increments import BLOCKS, SET_ID
from tests.waiting import wait_until

NAMES = ["data", "wal"]


def shown_bytes(view: ShownView, chooser: random.Random) -> list[bytes]:
    """Both volumes, read in pieces of any size and in any order."""
    content = []
    for name in NAMES:
        whole = bytearray(BLOCKS * BLOCK)
        cuts = sorted({0, BLOCKS, *(chooser.randrange(BLOCKS) for _ in range(8))})
        pieces = list(itertools.pairwise(cuts))
        chooser.shuffle(pieces)
        with Direct(view.device(name)) as volume:
            for first, behind in pieces:
                whole[first * BLOCK : behind * BLOCK] = volume.read(first * BLOCK, (behind - first) * BLOCK)
        content.append(bytes(whole))
    return content


def tree(place: Path) -> dict[str, str]:
    """Every file below a directory with the digest of its content."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "moving"])
def test_a_view_equals_the_image_that_a_restore_makes(
    show_map: ShowMap, scratch: Path, seed: int, moving: bool
) -> None:
    """At boundaries, inside of intervals old and open, in the journal, with WAL blank from an LSN on."""
    scene = Scene(scratch / "scene", seed, [12, 20, 9], 14, 16)
    if moving:
        scene.leave_moving(4)
        scene.capture(15)
    newest = len(scene.world.ops)
    points = {0, newest, *(interval.to_write for interval in scene.source().intervals())}
    points |= {scene.chooser.randrange(newest + 1) for _ in range(5)}
    before = tree(scene.world.store.path) | {"image/lock": hashlib.sha256(b"").hexdigest()}
    for write in sorted(points):
        for point in [RecoveryPoint(write, None, 0), *scene.blank_points(write)]:
            source = scene.source()
            with source.held():
                wanted = materialized(source, point, scene.place)
            view = show_map(scene.mapped(point))
            assert shown_bytes(view, scene.chooser) == wanted, f"{point}"
            assert view.status()["error_count"] == 0
            assert view.stop() == 0
    assert tree(scene.world.store.path) == before


# --- damage


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def single_blocks(view: ShownView) -> list[list[bytes | None]]:
    """Each block read alone; None where that is EIO."""
    found: list[list[bytes | None]] = []
    for name in NAMES:
        with Direct(view.device(name)) as volume:
            blocks: list[bytes | None] = []
            for block in range(BLOCKS):
                try:
                    blocks.append(volume.read(block * BLOCK, BLOCK))
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    blocks.append(None)
            found.append(blocks)
    return found


def image_block(scene: Scene, view_map: ViewMap) -> int:
    """A block of volume 0 that no extent names."""
    named = {
        int(extent["block"]) + i
        for extent in view_map.extents
        if extent["volume"] == 0
        for i in range(int(extent["count"]))
    }
    return next(block for block in range(BLOCKS) if block not in named)


def first_frame(view_map: ViewMap, content: bytes) -> tuple[Path, int]:
    """A frames file with this content that the map needs, and where its first frame's bytes are."""
    needed = {int(extent["source"]) for extent in view_map.extents if extent["kind"] == EXTENT_DATA}
    source = next(
        found
        for number, found in enumerate(view_map.sources)
        if number in needed and isinstance(found, FramesSource) and found.content == content
    )
    with FrameReader.open(source.path, content, SET_ID, source.interval) as reader:
        return source.path, reader.entries[0].offset + 40


def place_of(kind: str, scene: Scene, view_map: ViewMap) -> tuple[Path, int, str]:
    """File and offset of a byte of this kind, and what must be named."""
    if kind in ("img", "sums"):
        block = image_block(scene, view_map)
        image = scene.world.store.image / "data.img"
        path = scene.world.store.image / f"data.{kind}"
        where = block * BLOCK + 100 if kind == "img" else block * 8 + 3
        return (
            path,
            where,
            rf"{image} has a damaged block {block} at offset {block * BLOCK}",
        )
    content = {"writes": b"WRIT", "backward": b"BWRD", "patch": b"PTCH"}[kind]
    path, where = first_frame(view_map, content)
    return path, where, rf"{path} has a damaged frame at offset {where - 40}"


@pytest.mark.parametrize("kind", ["img", "sums", "backward", "writes", "patch"])
def test_a_flipped_byte_is_eio_to_those_who_need_it_and_never_served(
    show_map: ShowMap, scratch: Path, kind: str
) -> None:
    scene = Scene(scratch / "scene", 8, [6, 6, 6], 6, 6)
    write = {"backward": 12, "writes": 10, "img": 18, "sums": 18, "patch": len(scene.world.ops)}[kind]
    view_map = scene.mapped(RecoveryPoint(write, None, 0))
    wanted = scene.at(write)
    path, where, named = place_of(kind, scene, view_map)
    view = show_map(view_map, allowed=[named])
    flip(path, where)
    found = single_blocks(view)
    refused = [(v, b) for v in (0, 1) for b in range(BLOCKS) if found[v][b] is None]
    assert refused, "the flipped byte was needed"
    assert len(refused) < 2 * BLOCKS, "what does not need it can be read"
    for volume in (0, 1):
        for block, content in enumerate(found[volume]):
            assert content is None or content == wanted[volume][block * BLOCK : (block + 1) * BLOCK]
    status = view.status()
    assert status["error_count"] == len(refused)
    assert [error["kind"] for error in status["errors"]] == ["damage"]
    assert re.fullmatch(named, status["errors"][0]["message"])
    assert len(re.findall(named, view.text())) == 1, "one line for one damage"
    with Direct(view.device(NAMES[refused[0][0]])) as whole, pytest.raises(OSError, match="Input/output"):
        whole.read(0, BLOCKS * BLOCK)
    flip(path, where)
    assert shown_bytes(view, scene.chooser) == wanted, "once it is mended it is read again"
    assert view.stop() == 0


@pytest.mark.parametrize("part", ["header", "directory", "its checksum", "trailer", "cut short", "missing"])
def test_a_frames_file_that_is_not_whole_is_damage(show_map: ShowMap, scratch: Path, part: str) -> None:
    scene = Scene(scratch / "scene", 8, [6, 6, 6], 0, 0)
    view_map = scene.mapped(RecoveryPoint(12, None, 0))
    path, _ = first_frame(view_map, b"BWRD")
    size = path.stat().st_size
    if part == "missing":
        path.unlink()
    elif part == "cut short":
        os.truncate(path, size - 5)
    else:
        (directory,) = struct.unpack("<Q", path.read_bytes()[-24:-16])
        places = {"header": 33, "directory": size - 40, "its checksum": directory + 25, "trailer": size - 3}
        flip(path, places[part])
    view = show_map(view_map, allowed=[str(path)])
    found = single_blocks(view)
    wanted = scene.at(12)
    assert any(content is None for blocks in found for content in blocks)
    for volume in (0, 1):
        for block, content in enumerate(found[volume]):
            assert content is None or content == wanted[volume][block * BLOCK : (block + 1) * BLOCK]
    assert str(path) in view.status()["errors"][0]["message"]
    assert "offset" in view.status()["errors"][0]["message"]


def test_a_flip_in_a_frame_that_was_not_compressed(show_map: ShowMap, scratch: Path) -> None:
    """Nothing but the checksum tells of it."""
    view_map = big_map(scratch, 4, random.Random(9).randbytes(4 * FRAME))
    path = scratch / "patch"
    whole = path.read_bytes()
    chooser = random.Random(10)
    with FrameReader.open(path, b"PTCH", SET_ID, 0) as frames:
        entries = frames.entries
    assert {entry.stored for entry in entries} == {FRAME}
    view = show_map(view_map, "--cache=0", allowed=[str(path)])
    with Direct(view.device("data")) as volume:
        for number in range(24):
            entry = entries[number % 4]
            at = entry.offset + (number if number < 20 else chooser.randrange(32, 32 + FRAME))
            flip(path, at)
            with pytest.raises(OSError, match="Input/output"):
                volume.read(entry.position, BLOCK)
            flip(path, at)
            begin = entry.offset + 32
            assert volume.read(entry.position, BLOCK) == whole[begin : begin + BLOCK]


def test_an_image_that_is_cut_short_is_refused(show_map: ShowMap, scratch: Path) -> None:
    scene = Scene(scratch / "scene", 8, [6], 0, 0)
    view_map = scene.mapped(RecoveryPoint(6, None, 0))
    for name in ("wal.img", "wal.sums"):
        path = scene.world.store.image / name
        content = path.read_bytes()
        os.truncate(path, len(content) - 8)
        code, said = show_map(view_map, start=False).refused()
        assert code == 5
        assert f"{path} ends at offset {len(content) - 8} instead of {len(content)}" in said
        path.unlink()
        code, said = show_map(view_map, start=False).refused()
        assert code == 5
        assert f"{path} is missing" in said
        path.write_bytes(content)


def test_an_extent_beyond_its_stream_is_eio(show_map: ShowMap, scratch: Path) -> None:
    """No damage of a file: the map itself is wrong, though its checksum is right."""
    view_map = big_map(scratch, frames=2)
    extents = view_map.extents.copy()
    extents["position"][-1] = 2 * FRAME - 2 * BLOCK
    extents["count"][-1] = 3
    view = show_map(ViewMap(SET_ID, view_map.volumes, (0,), view_map.sources, extents), allowed=["the map names"])
    with Direct(view.device("data")) as volume:
        at = int(extents["block"][-1]) * BLOCK
        assert volume.read(at, 2 * BLOCK) == content_at(2 * FRAME - 2 * BLOCK, 2 * BLOCK)
        with pytest.raises(OSError, match="Input/output"):
            volume.read(at, 3 * BLOCK)
    assert view.status()["errors"][0]["kind"] == "damage"


def mended(raw: bytearray) -> bytes:
    """With the right checksum over whatever it is now."""
    raw[56:64] = bytes(8)
    raw[56:64] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(raw)))
    return bytes(raw)


def test_a_damaged_map_is_exit_5_and_never_a_crash(show_map: ShowMap, scratch: Path, engine_program: Path) -> None:
    """Flipped bytes; and flipped, cut and grown ones under a checksum that fits, which is what a bug would write."""
    scene = Scene(scratch / "scene", 4, [8, 8], 4, 4)
    whole = encode(scene.mapped(RecoveryPoint(12, None, 0)))
    chooser = random.Random(6)
    place = scratch / "map"

    def outcome(raw: bytes) -> int:
        place.write_bytes(raw)
        done = subprocess.run([str(engine_program), "map", str(place)], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1, 5), f"{done.returncode}: {done.stderr}"
        assert done.returncode != 1 or "UTF-8" in done.stderr
        assert done.returncode != 5 or f"{place} has" in done.stderr
        return done.returncode

    assert outcome(whole) == 0
    for _ in range(25):
        raw = bytearray(whole)
        raw[chooser.randrange(len(raw))] ^= 1 << chooser.randrange(8)
        assert outcome(bytes(raw)) == 5
    seen = set()
    for number in range(150):
        raw = bytearray(whole)
        for _ in range(chooser.randrange(1, 4)):
            at = chooser.randrange(8, 700 if number % 2 else len(raw))
            raw[at : at + 1] = chooser.choice([b"\xff", b"\x00", b"\x80", chooser.randbytes(1)])
        if chooser.randrange(4) == 0:
            raw = raw[: chooser.randrange(64, len(raw))] if chooser.randrange(2) else raw + bytes(32)
        if chooser.randrange(2):
            raw[32:40] = struct.pack("<Q", len(raw))
        seen.add(outcome(mended(raw)))
    assert seen >= {0, 5}
    view = show_map(scene.mapped(RecoveryPoint(12, None, 0)), start=False)
    view.map_file.write_bytes(whole[:-1])
    code, said = view.refused()
    assert code == 5
    assert str(view.map_file) in said


def broken_maps(good: ViewMap) -> dict[str, ViewMap]:
    """Maps that break one rule of FORMAT.md 5 each."""

    def extents(column: str, value: int, row: int = 1) -> ViewMap:
        changed = good.extents.copy()
        changed[column][row] = value
        return replace(good, extents=changed)

    def named(name: str) -> ViewMap:
        return replace(good, volumes=(replace(good.volumes[0], name=name),))

    def sized(size: int) -> ViewMap:
        return replace(good, volumes=(replace(good.volumes[0], bytes=size),))

    def at(path: str) -> ViewMap:
        return replace(good, sources=(ImageSource(Path(path)), good.sources[1]))

    twice = (good.volumes[0], replace(good.volumes[0], number=1))
    return {
        "overlaps": extents("block", 1),
        "lies outside": extents("block", 1 << 40, -1),
        "lies outside of its": extents("count", 1 << 31, -1),
        "an extent that": extents("count", 0),
        "wrong volume": extents("volume", 1),
        "extent of an unknown kind": extents("kind", 2),
        "extent without a source": extents("source", 2),
        "an extent without": extents("source", 0),
        "without a source at": extents("position", (1 << 64) - BLOCK),
        "a volume whose name": named(""),
        "whose name cannot be": named("a/b"),
        "name cannot be at": named(".."),
        "cannot be at offset": named("n" * 64),
        "a volume whose name cannot be": replace(good, volumes=twice, images=(0, 0)),
        "a volume whose size": sized(1 << 60),
        "whose size cannot be": sized((1 << 30) + 1),
        "size cannot be": sized(0),
        "a volume without an image": replace(good, images=(1,)),
        "without an image": replace(good, images=(2,)),
        "a path that is none": at("relative/path"),
        "path that is none": at("/with\0nul"),
        "a source whose path": at("/" + "p" * 5000),
        "a wrong number of volumes": replace(good, volumes=(), images=()),
    }


def test_each_rule_of_a_map_is_asked(scratch: Path, engine_program: Path) -> None:
    good = big_map(scratch, 2)
    place = scratch / "map"

    def outcome(view_map: ViewMap) -> tuple[int, str]:
        place.write_bytes(encode(view_map))
        done = subprocess.run([str(engine_program), "map", str(place)], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert outcome(good) == (0, "")
    for said, view_map in broken_maps(good).items():
        code, text = outcome(view_map)
        assert code == 5, said
        assert said in text


def test_the_engine_reads_the_golden_map(engine_program: Path) -> None:
    place = Path(golden.__file__).with_name("view.map")
    done = subprocess.run([str(engine_program), "map", str(place)], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = json.loads(place.with_name("expected.json").read_text("utf-8"))["map"]
    assert [[row["volume"], row["bytes"], row["source"]] for row in rows if "volume" in row] == wanted["volumes"]
    assert [[r["source"], r["content"], r["interval"], r["path"]] for r in rows if "path" in r] == wanted["sources"]
    keys = ("block", "count", "on", "kind", "position", "source")
    assert [[row[key] for key in keys] for row in rows if "block" in row] == wanted["extents"]


def test_the_engine_lists_what_python_wrote(scratch: Path, engine_program: Path) -> None:
    scene = Scene(scratch / "scene", 4, [8, 8], 4, 4)
    view_map = scene.mapped(RecoveryPoint(20, None, 0))
    (scratch / "map").write_bytes(encode(view_map))
    done = subprocess.run(
        [str(engine_program), "map", str(scratch / "map")], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["volume"], row["bytes"]) for row in rows if "volume" in row] == [
        (v.name, v.bytes) for v in view_map.volumes
    ]
    assert [row["path"] for row in rows if "path" in row] == [str(source.path) for source in view_map.sources]
    found = [(r["block"], r["count"], r["on"], r["kind"], r["position"], r["source"]) for r in rows if "block" in r]
    kinds = {EXTENT_DATA: "data", EXTENT_ZEROS: "zeros"}
    assert found == [(b, c, v, kinds[k], p, s) for b, c, v, k, p, s, _ in view_map.extents.tolist()]


# --- writing


def test_what_is_written_is_read_again_and_touches_nothing_else(show_map: ShowMap, scratch: Path) -> None:
    scene = Scene(scratch / "scene", 21, [12, 12], 8, 8)
    write = 20
    before = tree(scratch / "scene")
    view = show_map(scene.mapped(RecoveryPoint(write, None, 0)))
    assert (scratch / "scene" / "patch").exists() == ("patch" in before)
    model = [bytearray(content) for content in scene.at(write)]
    other = show_map(scene.mapped(RecoveryPoint(write, None, 0)))
    for number in range(200):
        which = scene.chooser.randrange(2)
        begin = scene.chooser.randrange(BLOCKS)
        count = scene.chooser.randrange(1, min(BLOCKS - begin, 12) + 1)
        span = slice(begin * BLOCK, (begin + count) * BLOCK)
        with Direct(view.device(NAMES[which])) as volume:
            if number % 4 == 3:
                erase(volume.fd, scene.chooser.choice([2, 3]), span.start, span.stop - span.start, device=False)
                model[which][span] = bytes(span.stop - span.start)
            else:
                data = scene.chooser.randbytes(span.stop - span.start)
                volume.write(span.start, data)
                model[which][span] = data
            assert volume.read(span.start, span.stop - span.start) == bytes(model[which][span])
    assert shown_bytes(view, scene.chooser) == [bytes(volume) for volume in model]
    assert shown_bytes(other, scene.chooser) == scene.at(write), "another view of the same point"
    assert view.stop() == 0
    assert other.stop() == 0
    after = tree(scratch / "scene")
    assert {name: digest for name, digest in after.items() if name in before} == before


READER = """
import mmap, os, random, sys
device, below, size, pieces = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
old = open(below, "rb").read()
fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
own = random.Random(os.getpid())
with mmap.mmap(-1, 4096) as memory:
    print("ready", flush=True)
    seen = 0
    while seen < pieces:  # follow the writer: each piece is watched at its last block until that is the new one
        place = min((seen + 1) * size, len(old)) - 4096 * own.randrange(1, 3)
        os.preadv(fd, [memory], place)
        content = bytes(memory)
        if content == old[place:place + 4096]:
            continue
        if content != bytes(byte ^ 255 for byte in old[place:place + 4096]):
            sys.exit(f"offset {place}: {content[:16]!r}")
        seen += 1
"""


def test_blocks_are_whole_while_others_write(show_map: ShowMap, scratch: Path) -> None:
    """Of a block that is written for the first time one sees what was below or what was written, never a hole."""
    frames, piece = 128, 256 * BLOCK
    view = show_map(big_map(scratch, frames), "--cache=268435456")
    below = content_at(0, frames * FRAME)
    (scratch / "below").write_bytes(below)
    above = bytes(np.frombuffer(below, dtype=np.uint8) ^ 255)
    words = [sys.executable, "-c", READER, str(view.device("data")), str(scratch / "below")]
    words += [str(piece), str(len(below) // piece)]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    with Direct(view.device("data")) as volume:
        for at in range(0, len(below), piece):
            volume.write(at, above[at : at + piece])
            assert volume.read(at, piece) == above[at : at + piece]
    for reader in readers:
        said = reader.communicate(timeout=60)[1]
        assert (reader.returncode, said) == (0, "")


# --- memory, modes, its end

FRAME = 512 * 1024


def content_at(position: int, length: int) -> bytes:
    """What lies in the stream of `big_map`: each block another one, that does not compress to nothing."""
    return b"".join(
        hashlib.sha256(struct.pack("<Q", at)).digest() * (BLOCK // 32)
        for at in range(position, position + length, BLOCK)
    )


def big_map(place: Path, frames: int, content: bytes | None = None) -> ViewMap:
    """1 GiB with `frames` frames of 512 KiB at its beginning, and a block of the last one again at its end."""
    size, blocks = 1 << 30, FRAME // BLOCK
    for name, length in (("data.img", size), ("data.sums", size // BLOCK * 8)):
        with (place / name).open("wb") as file:
            file.truncate(length)
    writer = FrameWriter.create(place / "patch", b"PTCH", SET_ID, 0)
    writer.append(content_at(0, frames * FRAME) if content is None else content)
    writer.finish()
    rows = [(number * blocks, blocks, 0, EXTENT_DATA, number * FRAME, 1, 0) for number in range(frames)]
    rows.append((size // BLOCK - 10000, 9000, 0, EXTENT_ZEROS, 0, 0, 0))
    rows.append((size // BLOCK - 3, 1, 0, EXTENT_DATA, frames * FRAME - BLOCK, 1, 0))
    sources = (ImageSource(place / "data"), FramesSource(place / "patch", b"PTCH", 0))
    return ViewMap(SET_ID, (Volume(0, "data", size),), (0,), sources, np.array(rows, dtype=MAP_EXTENT))


def test_unpacked_frames_are_kept_within_their_bound(show_map: ShowMap, scratch: Path) -> None:
    frames, limit = 40, 4 << 20
    view = show_map(big_map(scratch, frames), f"--cache={limit}")
    chooser = random.Random(2)

    def reader(seed: int) -> None:
        own = random.Random(seed)
        with Direct(view.device("data")) as volume:
            for _ in range(150):
                at = own.randrange(frames * FRAME // BLOCK - 16) * BLOCK
                assert volume.read(at, 16 * BLOCK) == content_at(at, 16 * BLOCK)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = view.status()["cache"]
    assert cache["bytes"] <= limit
    assert cache["most_bytes"] <= limit, "there was always an unused one that could go"
    assert cache["hits"] > 0
    assert cache["misses"] > frames
    with Direct(view.device("data")) as volume:
        at = chooser.randrange(frames) * FRAME
        volume.read(at, BLOCK)
        before = view.status()["cache"]
        for _ in range(20):
            assert volume.read(at + 8 * BLOCK, BLOCK) == content_at(at + 8 * BLOCK, BLOCK)
        after = view.status()["cache"]
        assert (after["hits"] - before["hits"], after["misses"]) == (20, before["misses"])
        end = (1 << 30) - 3 * BLOCK
        assert volume.read(end, 3 * BLOCK) == content_at(frames * FRAME - BLOCK, BLOCK) + bytes(2 * BLOCK)
        assert volume.read((1 << 30) - 10050 * BLOCK, 256 * BLOCK) == bytes(256 * BLOCK)
    if "asan" not in str(view.program):
        assert view.status()["rss_kib"] < 40 * 1024
    assert view.stop() == 0


def test_status_modes_and_refusals(show_map: ShowMap, scratch: Path) -> None:
    view = show_map(big_map(scratch, 1))
    assert view.client.control.stat().st_mode & 0o777 == 0o600
    assert stat.S_IMODE((view.root / "data.cow").stat().st_mode) == 0o600
    assert (view.root / "data.cow").stat().st_blocks == 0
    with Direct(view.device("data")) as volume:
        with pytest.raises(Exception, match="1 files of the view are open"):
            view.client.request("stop")
        assert view.status()["volumes"] == [{"name": "data", "number": 0, "bytes": 1 << 30, "open": True}]
        with pytest.raises(OSError, match="Invalid"):
            os.pread(volume.fd, 100, 0)
        volume.write(BLOCK, bytes(BLOCK))
    with pytest.raises(Exception, match="unknown command"):
        view.client.request("cut")
    status = view.status()
    assert (status["writes"], status["bytes_written"], status["state"]) == (1, BLOCK, "showing")
    assert Path(f"/proc/{status['pid']}/oom_score_adj").read_text() == Path("/proc/self/oom_score_adj").read_text()
    assert "VmLck:\t       0 kB" in Path(f"/proc/{status['pid']}/status").read_text()
    assert view.stop() == 0
    assert not view.client.control.exists()
    for missing in ("--map", "--fuse", "--control", "--overlay"):
        words = [word for word in view.command() if not word.startswith(missing)]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 2


def by_signal(view: ShownView) -> None:
    assert view.process is not None
    view.process.send_signal(signal.SIGTERM)


def by_eof(view: ShownView) -> None:
    assert view.process is not None
    assert view.process.stdin is not None
    view.process.stdin.close()


@pytest.mark.parametrize("end", [by_signal, by_eof])
@pytest.mark.parametrize("used", [False, True], ids=["idle", "open"])
def test_it_ends_at_once(show_map: ShowMap, scratch: Path, end: Callable[[ShownView], None], used: bool) -> None:
    view = show_map(big_map(scratch, 1), "--until-eof")
    fd = os.open(view.device("data"), os.O_RDWR | os.O_DIRECT) if used else -1
    if not used:
        wait_until(lambda: not view.status()["volumes"][0]["open"], what="a closed file")
    end(view)
    assert view.ended() == 0
    if used:
        with pytest.raises(OSError, match=r"not connected|Input/output|abort"):
            os.pread(fd, BLOCK, 0)
        with suppress(OSError):
            os.close(fd)
    assert not view.client.control.exists()
