"""A small writer of journals, from FORMAT.md section 1 alone: what the engine leaves on disk, and what crashes leave.

It imports nothing of the reader, so that both can only agree by agreeing with the specification.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK = 4096
WRITE, ZERO, DISCARD, MARK = 1, 2, 3, 5


@dataclass
class Op:
    """One captured write: kind, volume, offset and length in bytes, data (a mark's name for a mark)."""

    kind: int
    volume: int = 0
    offset: int = 0
    length: int = 0
    data: bytes = b""
    wall_ns: int = 0
    flags: int = 0


@dataclass
class Placed:
    """Where a batch lies."""

    segment: int
    offset: int
    length: int
    number: int
    first: int
    last: int


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def with_checksum(raw: bytes, at: int) -> bytes:
    plain = raw[:at] + bytes(8) + raw[at + 8 :]
    return plain[:at] + struct.pack("<Q", xxhash.xxh3_64_intdigest(plain)) + plain[at + 8 :]


def encode_batch(salt: int, number: int, first: int, ops: list[Op], previous: tuple[int, int]) -> bytes:
    records = b""
    data = b""
    for i, op in enumerate(ops):
        length = 0 if op.kind == MARK else op.length
        volume = 65535 if op.kind == MARK else op.volume
        offset = 0 if op.kind == MARK else op.offset
        size = len(op.data) if op.kind in (WRITE, MARK) else 0
        records += struct.pack(
            "<BBHIQqqQQ",
            op.kind,
            op.flags,
            volume,
            size,
            first + i,
            op.wall_ns or 10**18 + first + i,
            first + i,
            offset,
            length,
        )
        data += padded(op.data) if size else b""
    header_length = -(-(72 + len(records)) // BLOCK) * BLOCK
    total = header_length + len(data)
    head = struct.pack(
        "<8sQQQIIQQQQ", b"PGCDPBAT", salt, number, first, len(ops), header_length, total, previous[0], previous[1], 0
    )
    return with_checksum((head + records).ljust(header_length, b"\0") + data, 64)


class JournalWriter:
    """Appends batches; `placed` says where they lie."""

    def __init__(self, directory: Path, set_id: bytes, segment_bytes: int = 1 << 18) -> None:
        self.directory = directory
        self.set_id = set_id
        self.segment_bytes = segment_bytes
        self.placed: list[Placed] = []
        self.segment = 0
        self.offset = 0
        self.previous = (0, 0)
        self.number = 1
        self.write = 1
        self.salts: dict[int, int] = {}
        directory.mkdir(exist_ok=True)

    def path(self, segment: int) -> Path:
        return self.directory / f"{segment:016d}.seg"

    def new_segment(self, old: bytes = b"") -> None:
        """A segment made ready; `old` is what an earlier use left behind its header."""
        self.segment += 1
        salt = struct.unpack("<Q", os.urandom(8))[0]
        self.salts[self.segment] = salt
        head = struct.pack(
            "<8sII16sQQQQQ", b"PGCDPSEG", 1, 4096, self.set_id, self.segment, salt, self.segment_bytes, 1, 0
        )
        raw = with_checksum(head.ljust(BLOCK, b"\0"), 64) + old
        ready = self.directory / f"free-{self.segment:016d}"
        ready.write_bytes(raw.ljust(self.segment_bytes, b"\0"))
        ready.rename(self.path(self.segment))
        self.offset = BLOCK

    def poke(self, segment: int, offset: int, raw: bytes) -> None:
        with self.path(segment).open("r+b") as file:
            file.seek(offset)
            file.write(raw)

    def append(self, ops: list[Op]) -> Placed:
        """A batch, in a new segment when it does not fit."""
        size = -(-(72 + 48 * len(ops)) // BLOCK) * BLOCK + sum(len(padded(op.data)) for op in ops)
        if self.segment == 0 or self.offset + size > self.segment_bytes:
            self.new_segment()
        raw = encode_batch(self.salts[self.segment], self.number, self.write, ops, self.previous)
        self.poke(self.segment, self.offset, raw)
        placed = Placed(self.segment, self.offset, len(raw), self.number, self.write, self.write + len(ops) - 1)
        self.placed.append(placed)
        self.offset += len(raw)
        self.previous = (self.segment, self.offset)
        self.number += 1
        self.write += len(ops)
        return placed

    def given_up(self, ops: list[Op]) -> None:
        """A batch whose sync failed: it may be whole on disk, but its segment is sealed and it is written again."""
        raw = encode_batch(self.salts[self.segment], self.number, self.write, ops, self.previous)
        self.poke(self.segment, self.offset, raw)
        self.new_segment()

    def torn(self, ops: list[Op], keep: int) -> None:
        """The first `keep` bytes of a batch that a crash cut off."""
        raw = encode_batch(self.salts[self.segment], self.number, self.write, ops, self.previous)
        self.poke(self.segment, self.offset, raw[:keep])

    def mark(self, applied: int, released: int, durable: int, sequence: int = 1, clean: bool = False) -> None:
        """The applied mark, both slots."""
        raw = struct.pack(
            "<8sII16sQQQQQQQQ",
            b"PGCDPAPL",
            1,
            int(clean),
            self.set_id,
            sequence,
            applied,
            released,
            durable,
            self.number - 1,
            self.previous[0],
            self.previous[1],
            0,
        )
        slot = with_checksum(raw.ljust(BLOCK, b"\0"), 88)
        (self.directory / "applied").write_bytes(slot + slot)
