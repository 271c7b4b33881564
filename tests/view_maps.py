"""Block maps for tests of views: large ones, mended ones, and what a view of one shows."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
from pathlib import Path

import numpy as np
import xxhash

from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, MAP_EXTENT, Volume
from pgcdp.recovery.mapfile import FramesSource, ImageSource, ViewMap
from pgcdp.store.frames import FrameWriter
from tests.fix_engine import Direct
from tests.fix_views import ShownView
from tests.unit.test_increments import BLOCKS, SET_ID

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


def mended(raw: bytearray) -> bytes:
    """With the right checksum over whatever it is now."""
    raw[56:64] = bytes(8)
    raw[56:64] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(raw)))
    return bytes(raw)


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
