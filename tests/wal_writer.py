"""A small writer of WAL, as PostgreSQL 15 lays it out, and of interval directories that hold given writes of it.

The pages lie where a test says: a filesystem may put the two halves of a page (of 4096 bytes) far from each other.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import google_crc32c
import numpy as np

from pgcdp.records import BLOCK, INDEX, Kind
from pgcdp.store.frames import FrameWriter

SYSTEM = 0x1122334455667788
SEGMENT = 1 << 20
PAGE = 8192
_MAGIC, _CONTINUED, _LONG = 0xD110, 1, 2


class Wal:
    """Records one after another, from the beginning of segment 1 on. They say nothing (XLOG_NOOP)."""

    def __init__(self, seed: int = 1) -> None:
        self.chooser = random.Random(seed)
        self.pages: dict[int, bytearray] = {}
        self.at = SEGMENT
        self.previous = 0
        self.ends: list[int] = []

    def record(self, length: int, zeros: int = 0) -> None:
        """One of `length` bytes, its header of 24 included. It ends with `zeros` bytes 0."""
        assert length > 24 + 256 + 5
        body = b"\xfe" + struct.pack("<I", length - 29) + self.chooser.randbytes(length - 29 - zeros) + bytes(zeros)
        if self.at % PAGE == 0:
            self.at += self._page(0)
        head = struct.pack("<IIQBBxx", length, 0, self.previous, 0x20, 0)
        crc = google_crc32c.value(body + head)
        self.previous = self.at
        self._put(head + struct.pack("<I", crc) + body)
        self.at += -self.at % 8
        self.ends.append(self.at)

    def half(self, page: int, which: int) -> bytes:
        """The first (0) or second half of the page at an address."""
        return bytes(self.pages[page][which * BLOCK : (which + 1) * BLOCK])

    def _put(self, raw: bytes) -> None:
        while raw:
            if self.at % PAGE == 0:
                self.at += self._page(len(raw))
            within = self.at % PAGE
            some = raw[: PAGE - within]
            self.pages[self.at - within][within : within + len(some)] = some
            self.at += len(some)
            raw = raw[len(some) :]

    def _page(self, rest: int) -> int:
        """Begins a page; the length of its header."""
        first = self.at % SEGMENT == 0
        flags = (_CONTINUED if rest else 0) | (_LONG if first else 0)
        head = struct.pack("<HHIQII", _MAGIC, flags, 1, self.at, rest, 0)
        if first:
            head += struct.pack("<QII", SYSTEM, SEGMENT, PAGE)
        self.pages[self.at] = bytearray(head.ljust(PAGE, b"\0"))
        return len(head)


def write_interval(place: Path, writes: list[tuple[int, bytes]]) -> Path:
    """An interval's directory with those writes (offset on the volume, data), numbered from 1 on."""
    place.mkdir()
    index = np.zeros(len(writes), INDEX)
    position = 0
    for row, (offset, data) in zip(index, writes, strict=True):
        row["kind"], row["offset"], row["length"], row["data_length"] = Kind.WRITE, offset, len(data), len(data)
        row["position"] = position
        position += len(data)
    index["number"] = np.arange(1, len(writes) + 1)
    for name, content, raw in (
        ("writes", b"WRIT", b"".join(data for _, data in writes)),
        ("index", b"INDX", index.tobytes()),
    ):
        writer = FrameWriter.create(place / name, content, bytes(16), 1)
        writer.append(raw)
        writer.finish()
    return place
