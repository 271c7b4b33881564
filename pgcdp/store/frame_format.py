"""The bytes of frames files (FORMAT.md section 2): headers, frames, directory and trailer, one function each.

Everything here reads or makes bytes at a given place; `pgcdp.store.frames` is what others use.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pgcdp.errors import DamageError
from pgcdp.fsio import read_all

FRAME_BYTES = 512 * 1024
DEFAULT_LEVEL = 1
HEADER_BYTES = 64
FRAME_HEADER_BYTES = 32
TRAILER_BYTES = 32
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""No writer makes frames that long; a reader takes a longer one for damage instead of reserving its memory."""

CODEC_PLAIN = 0
CODEC_ZSTD = 1
CODEC_DIRECTORY = 255

_HEADER = struct.Struct("<8sI4s16sQ16sQ")
_FRAME = struct.Struct("<4sIQIIQ")
_TRAILER = struct.Struct("<8sQQQ")
ENTRY = np.dtype([("position", "<u8"), ("offset", "<u8"), ("raw", "<u4"), ("stored", "<u4")])
_EIGHT_ZEROS = bytes(8)
HINT = "pgcdp check --full tells what else is damaged and what can still be restored"


@dataclass(frozen=True, slots=True)
class Entry:
    """One frame: position of its first raw byte in the stream, its offset in the file, both lengths."""

    position: int
    offset: int
    raw: int
    stored: int


@dataclass(frozen=True, slots=True)
class FileSummary:
    """A finished file: name, bytes on disk, XXH3-64 of the whole file in hex, bytes of the stream."""

    name: str
    bytes: int
    checksum: str
    length: int


def file_header(content: bytes, set_id: bytes, interval: int) -> bytes:
    plain = _HEADER.pack(b"PGCDPFRM", 1, content, set_id, interval, bytes(16), 0)
    return plain[:56] + struct.pack("<Q", xxhash.xxh3_64_intdigest(plain))


def frame_header(codec: int, position: int, raw: int, stored: bytes) -> bytes:
    plain = _FRAME.pack(b"FRAM", codec, position, raw, len(stored), 0)
    digest = xxhash.xxh3_64(plain)
    digest.update(stored)
    return plain[:24] + struct.pack("<Q", digest.intdigest())


@dataclass(frozen=True, slots=True)
class Frame:
    codec: int
    position: int
    raw: int
    stored: bytes


def read_frame(fd: int, offset: int, end: int) -> Frame | None:
    """The frame at `offset` if it is valid and ends at or before `end`, else None."""
    if offset + FRAME_HEADER_BYTES > end:
        return None
    head = read_all(fd, FRAME_HEADER_BYTES, offset)
    if len(head) < FRAME_HEADER_BYTES:
        return None
    magic, codec, position, raw, stored_length, checksum = _FRAME.unpack(head)
    if magic != b"FRAM" or offset + FRAME_HEADER_BYTES + stored_length > end:
        return None
    stored = read_all(fd, stored_length, offset + FRAME_HEADER_BYTES)
    digest = xxhash.xxh3_64(head[:24])
    digest.update(_EIGHT_ZEROS)
    digest.update(stored)
    if digest.intdigest() != checksum or len(stored) != stored_length:
        return None
    return Frame(codec, position, raw, stored)


def check_header(path: Path, head: bytes, content: bytes, set_id: bytes, interval: int) -> None:
    if len(head) < HEADER_BYTES or head != file_header(content, set_id, interval):
        raise DamageError(f"{path} has a wrong header at offset 0", HINT)


def scan(path: Path, fd: int, size: int) -> tuple[list[Entry], int, bool]:
    """Frames of an unfinished file, the offset at which they end, and whether a directory frame follows there."""
    entries: list[Entry] = []
    offset = HEADER_BYTES
    position = 0
    while (frame := read_frame(fd, offset, size)) is not None:
        if frame.codec == CODEC_DIRECTORY:
            return entries, offset, frame.position == position
        if frame.position != position or frame.codec not in (CODEC_PLAIN, CODEC_ZSTD):
            break
        entries.append(Entry(position, offset, frame.raw, len(frame.stored)))
        offset += FRAME_HEADER_BYTES + len(frame.stored)
        position += frame.raw
    return entries, offset, False


def frame_after(fd: int, offset: int, size: int) -> int | None:
    """Offset of a valid frame somewhere behind `offset`: then what lies before it is damage, no torn tail."""
    step = 1 << 20
    at = offset + 1
    while at < size:
        chunk = read_all(fd, step + 3, at)
        found = chunk.find(b"FRAM")
        while found >= 0:
            if read_frame(fd, at + found, size) is not None:
                return at + found
            found = chunk.find(b"FRAM", found + 1)
        at += step
    return None


def digest_of(fd: int, size: int) -> xxhash.xxh3_64:
    digest = xxhash.xxh3_64()
    for at in range(0, size, 1 << 20):
        digest.update(read_all(fd, min(1 << 20, size - at), at))
    return digest


def read_directory(path: Path, fd: int, size: int) -> list[Entry]:
    """The frames of a finished file; they must lie one after another and fill it without gaps."""
    tail = read_all(fd, TRAILER_BYTES, max(0, size - TRAILER_BYTES))
    if len(tail) < TRAILER_BYTES:
        raise DamageError(f"{path} has no trailer at offset {size}", HINT)
    magic, place, count, checksum = _TRAILER.unpack(tail)
    if magic != b"PGCDPEND" or xxhash.xxh3_64_intdigest(tail[:24]) != checksum:
        raise DamageError(f"{path} has a damaged trailer at offset {size - TRAILER_BYTES}", HINT)
    frame = read_frame(fd, place, size - TRAILER_BYTES)
    whole = frame is not None and frame.codec == CODEC_DIRECTORY and len(frame.stored) == count * ENTRY.itemsize
    if not whole or frame is None or place + FRAME_HEADER_BYTES + len(frame.stored) != size - TRAILER_BYTES:
        raise DamageError(f"{path} has a damaged directory at offset {place}", HINT)
    entries = [Entry(*row) for row in np.frombuffer(frame.stored, dtype=ENTRY).tolist()]
    offset, position = HEADER_BYTES, 0
    for entry in entries:
        if entry.offset != offset or entry.position != position:
            raise DamageError(f"{path} has a directory at offset {place} that does not fit its frames", HINT)
        offset += FRAME_HEADER_BYTES + entry.stored
        position += entry.raw
    if offset != place or position != frame.position:
        raise DamageError(f"{path} has a directory at offset {place} that does not fit its frames", HINT)
    return entries
