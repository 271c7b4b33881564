"""A damaged byte of what a view needs is EIO to those who need it, or a refusal, and never served."""

from __future__ import annotations

import errno
import os
import random
import re
import struct
from pathlib import Path

import pytest

from pgcdp.records import BLOCK, EXTENT_DATA, RecoveryPoint
from pgcdp.recovery.mapfile import FramesSource, ViewMap
from pgcdp.store.frames import FrameReader
from tests.fix_engine import Direct
from tests.fix_views import ShowMap, ShownView
from tests.unit.test_blockmap import Scene
from tests.unit.test_increments import BLOCKS, SET_ID
from tests.view_maps import FRAME, NAMES, big_map, content_at, shown_bytes


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
