"""Makes the golden files, and hand-made journals for tests: a writer of engine/FORMAT.md without pgcdp's code.

    python -m tests.golden.make_golden      writes journal/, writes.frames, view.map and expected.json beside this file

The golden journal has three segments: batches of every kind of record on two volumes, a segment that was given up after
a failed sync, and a torn batch at its end. `expected.json` says what a reader must find.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
import zstandard

BLOCK = 4096
SET_ID = bytes(range(16))
WALL_NS = 1_764_000_000_123_456_789
BOOT_NS = 5_000_000_000
WRITE, ZERO, DISCARD, MARK = 1, 2, 3, 5
HERE = Path(__file__).resolve().parent


def _zeroed(data: bytes, at: int) -> bytes:
    """`data` with its checksum put into the eight bytes at `at`."""
    whole = data[:at] + bytes(8) + data[at + 8 :]
    return whole[:at] + struct.pack("<Q", xxhash.xxh3_64_intdigest(whole)) + whole[at + 8 :]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


@dataclass(frozen=True)
class Item:
    """A record to be: `data` of a write or a mark's name; `length` of a zero or discard."""

    kind: int
    volume: int = 0
    offset: int = 0
    data: bytes = b""
    length: int = 0
    flags: int = 0


def write(volume: int, offset: int, data: bytes) -> Item:
    return Item(WRITE, volume, offset, data, len(data))


def mark(name: str) -> Item:
    return Item(MARK, 65535, 0, name.encode())


@dataclass
class JournalMaker:
    """Writes segments and batches. Each method leaves the numbers ready for the next batch."""

    directory: Path
    segment_bytes: int = 12 * BLOCK
    set_id: bytes = SET_ID
    sequence: int = 0
    offset: int = 0
    end: tuple[int, int] = (0, 0)
    next_batch: int = 1
    next_write: int = 1
    salts: dict[int, int] = field(default_factory=dict)

    def path(self, sequence: int) -> Path:
        return self.directory / f"{sequence:016}.seg"

    def segment(self) -> None:
        """A fresh segment becomes the current one."""
        self.sequence += 1
        self.offset = BLOCK
        salt = self.salts[self.sequence] = 0x5A17_0000_0000_0000 + self.sequence
        header = struct.pack(
            "<8sII16sQQQQQ",
            b"PGCDPSEG",
            1,
            BLOCK,
            self.set_id,
            self.sequence,
            salt,
            self.segment_bytes,
            WALL_NS,
            0,
        )
        content = _zeroed(_padded(header), 64)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path(self.sequence).write_bytes(content + bytes(self.segment_bytes - BLOCK))

    def encode(self, items: list[Item]) -> bytes:
        """The bytes of the next batch."""
        header_length = -(-(72 + 48 * len(items)) // BLOCK) * BLOCK
        records, data = b"", b""
        for i, item in enumerate(items):
            number = self.next_write + i
            length = 0 if item.kind == MARK else item.length
            place = (WALL_NS + number * 1000, BOOT_NS + number * 1000, item.offset, length)
            records += struct.pack("<BBHIQQQQQ", item.kind, item.flags, item.volume, len(item.data), number, *place)
            data += _padded(item.data)
        head = struct.pack(
            "<8sQQQIIQQQQ",
            b"PGCDPBAT",
            self.salts[self.sequence],
            self.next_batch,
            self.next_write,
            len(items),
            header_length,
            header_length + len(data),
            *self.end,
            0,
        )
        return _zeroed(_padded(head + records) + data, 64)

    def put(self, sequence: int, offset: int, content: bytes) -> None:
        """Bytes into a segment file, whatever they mean."""
        with self.path(sequence).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def batch(self, *items: Item) -> int:
        """Appends a durable batch, to a fresh segment when it does not fit. Returns its offset."""
        if not self.sequence:
            self.segment()
        content = self.encode(list(items))
        if self.offset + len(content) > self.segment_bytes:
            self.segment()
            content = self.encode(list(items))
        self.put(self.sequence, self.offset, content)
        at = self.offset
        self.offset += len(content)
        self.end = (self.sequence, self.offset)
        self.next_batch += 1
        self.next_write += len(items)
        return at

    def torn(self, *items: Item) -> None:
        """A batch that a crash cut: its last block is not what was written."""
        self.put(self.sequence, self.offset, self.encode(list(items))[:-BLOCK] + b"\x77" * BLOCK)

    def applied(self, applied: int, *, released: int = 0, clean: bool = False, slots: tuple[int, ...] = (0, 1)) -> None:
        """The applied mark, as it is when the journal ends where it ends now."""
        numbers = (7, applied, released, self.next_write - 1, self.next_batch - 1, *self.end, 0)
        slot = _zeroed(_padded(struct.pack("<8sII16s8Q", b"PGCDPAPL", 1, int(clean), self.set_id, *numbers)), 88)
        (self.directory / "applied").write_bytes(b"".join(slot if i in slots else bytes(BLOCK) for i in range(2)))


def frames(content: bytes, interval: int, pieces: list[tuple[int, bytes]]) -> bytes:
    """A finished frames file (section 2) of (codec, raw bytes) pieces."""
    out = _zeroed(struct.pack("<8sI4s16sQ16sQ", b"PGCDPFRM", 1, content, SET_ID, interval, bytes(16), 0), 56)
    directory, position = b"", 0

    def frame(codec: int, where: int, raw: bytes) -> bytes:
        stored = zstandard.ZstdCompressor(3).compress(raw) if codec == 1 else raw
        return _zeroed(struct.pack("<4sIQIIQ", b"FRAM", codec, where, len(raw), len(stored), 0) + stored, 24)

    for codec, raw in pieces:
        encoded = frame(codec, position, raw)
        directory += struct.pack("<QQII", position, len(out), len(raw), len(encoded) - 32)
        out += encoded
        position += len(raw)
    place = len(out)
    out += frame(255, position, directory)
    trailer = struct.pack("<8sQQ", b"PGCDPEND", place, len(pieces))
    return out + trailer + struct.pack("<Q", xxhash.xxh3_64_intdigest(trailer))


def block(number: int) -> bytes:
    """A block whose every word is `number`."""
    return struct.pack("<Q", number) * (BLOCK // 8)


GOLDEN_BATCHES: list[list[Item]] = [
    [write(0, 0, block(1)), write(1, 8 * BLOCK, block(2) + block(3))],
    [Item(ZERO, 0, 4 * BLOCK, length=4 * BLOCK), mark("before the bad DELETE: größer"), write(0, 4 * BLOCK, block(4))],
    [Item(DISCARD, 1, 0, length=16 * BLOCK), write(1, 15 * BLOCK, block(5))],
    [write(0, BLOCK, block(6)), write(0, BLOCK, block(7))],
    [mark("last")],
]


def make_journal(directory: Path) -> JournalMaker:
    """The golden journal in a fresh directory."""
    maker = JournalMaker(directory)
    for items in GOLDEN_BATCHES[:3]:
        maker.batch(*items)
    # A sync failed: the batch went to segment 2, was torn there too, and at last to segment 3.
    maker.put(maker.sequence, maker.offset, maker.encode(GOLDEN_BATCHES[3])[:BLOCK])
    maker.segment()
    maker.torn(*GOLDEN_BATCHES[3])
    maker.segment()
    for items in GOLDEN_BATCHES[3:]:
        maker.batch(*items)
    maker.applied(4, released=2)
    maker.torn(write(0, 0, block(99)), write(0, 0, block(100)))
    return maker


def expected(maker: JournalMaker) -> dict[str, object]:
    """What a reader must find."""
    items = [item for batch in GOLDEN_BATCHES for item in batch]
    return {
        "set_id": SET_ID.hex(),
        "records": [
            {
                "number": number,
                "kind": item.kind,
                "volume": item.volume,
                "offset": item.offset,
                "length": 0 if item.kind == MARK else item.length,
                "wall_ns": WALL_NS + number * 1000,
                "boot_ns": BOOT_NS + number * 1000,
                "data_xxh3": f"{xxhash.xxh3_64_intdigest(item.data):016x}",
            }
            for number, item in enumerate(items, 1)
        ],
        "batches": [len(items) for items in GOLDEN_BATCHES],
        "end": {"segment": maker.end[0], "offset": maker.end[1], "last_write": maker.next_write - 1, "torn": True},
        "mark": {"applied": 4, "released": 2, "durable": maker.next_write - 1, "clean": False},
        "map": GOLDEN_MAP,
        "frames": {"content": "WRIT", "interval": 3, "raw_lengths": [8192, 12288, 4096]},
    }


GOLDEN_MAP: dict[str, list[list[object]]] = {
    # name, bytes, image
    "volumes": [["data", 64 * BLOCK, 0], ["größer", 16 * BLOCK, 1]],
    # kind, content, interval, path
    "sources": [
        ["image", "", 0, "/store/image/data"],
        ["image", "", 0, "/store/image/größer"],
        ["frames", "BWRD", 7, "/store/intervals/0000000007/backward"],
        ["frames", "PTCH", 0, "/scratch/patch"],
    ],
    # block, blocks, volume, kind, position, source
    "extents": [
        [0, 3, 0, "data", 5 * BLOCK, 2],
        [3, 1, 0, "data", 0, 3],
        [10, 50, 0, "zeros", 0, 0],
        [15, 1, 1, "data", BLOCK, 3],
    ],
}


def view_map(content: dict[str, list[list[Any]]]) -> bytes:
    """The map of a view (section 5)."""
    volumes, sources, extents = content["volumes"], content["sources"], content["extents"]
    at = 64 + 80 * len(volumes) + 32 * len(sources)
    head, paths = b"", b""
    for name, size, image in volumes:
        head += struct.pack("<64sQII", name.encode(), size, image, 0)
    for kind, code, interval, path in sources:
        raw = path.encode()
        number = {"image": 0, "frames": 1}[kind]
        head += struct.pack("<I4sQQII", number, code.encode(), interval, at + len(paths), len(raw), 0)
        paths += raw
    body = head + paths + bytes(-len(paths) % 8)
    for block, count, volume, kind, position, source in extents:
        body += struct.pack("<QIHHQII", block, count, volume, {"data": 0, "zeros": 1}[kind], position, source, 0)
    counts = (64 + len(body), len(extents), len(sources), 0, 0)
    return _zeroed(struct.pack("<8sII16sQQIIQ", b"PGCDPMAP", 1, len(volumes), SET_ID, *counts) + body, 56)


GOLDEN_FRAMES: list[tuple[int, bytes]] = [(0, block(1) + block(2)), (1, block(3) * 3), (1, bytes(BLOCK))]


def main() -> None:
    directory = HERE / "journal"
    for old in directory.glob("*"):
        old.unlink()
    maker = make_journal(directory)
    (HERE / "writes.frames").write_bytes(frames(b"WRIT", 3, GOLDEN_FRAMES))
    (HERE / "view.map").write_bytes(view_map(GOLDEN_MAP))
    text = json.dumps(expected(maker), indent=1, ensure_ascii=False)
    (HERE / "expected.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
