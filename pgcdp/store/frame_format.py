"""The bytes of frames files (FORMAT.md section 2): headers, frames, directory and trailer, one function each.

Everything here reads or makes bytes at a given place; `pgcdp.store.frames` is what others use. The frames of a file
in an encrypted store are sealed (FORMAT.md 7.3): compressed first, then encrypted, bound to file, position and kind,
and the checksum is that of what lies on the disk.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pgcdp import sealing
from pgcdp.errors import DamageError
from pgcdp.fsio import read_all
from pgcdp.sealing import Cipher

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
SEALED = 256
"""Added to the codec of a frame whose stored bytes are nonce, ciphertext and tag."""

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

    def entry(self) -> dict[str, object]:
        """What a manifest says of it under its name."""
        return {"bytes": self.bytes, "checksum": self.checksum, "length": self.length}


def summary_of(path: Path) -> FileSummary:
    """A finished file that is no frames file."""
    raw = path.read_bytes()
    return FileSummary(path.name, len(raw), xxhash.xxh3_64_hexdigest(raw), len(raw))


Seal = Cipher | None
"""What seals the frames of one file; None: they are plain."""


def file_header(content: bytes, set_id: bytes, interval: int, salt: bytes | None = None) -> bytes:
    """`salt`: 16 bytes of a file whose frames are sealed, None of another one."""
    version, filler = (1, bytes(16)) if salt is None else (2, salt)
    plain = _HEADER.pack(b"PGCDPFRM", version, content, set_id, interval, filler, 0)
    return plain[:56] + struct.pack("<Q", xxhash.xxh3_64_intdigest(plain))


def new_header(path: Path, content: bytes, set_id: bytes, interval: int) -> tuple[bytes, Seal]:
    """The header of a new file at this place, and what seals its frames."""
    sealer = sealing.sealer_of(path)
    if sealer is None:
        return file_header(content, set_id, interval), None
    head = file_header(content, set_id, interval, os.urandom(16))
    return head, sealer.frames(head[8:56])


def frame_header(codec: int, position: int, raw: int, stored: bytes) -> bytes:
    plain = _FRAME.pack(b"FRAM", codec, position, raw, len(stored), 0)
    digest = xxhash.xxh3_64(plain)
    digest.update(stored)
    return plain[:24] + struct.pack("<Q", digest.intdigest())


def closed_frame(seal: Seal, codec: int, position: int, raw: int, stored: bytes) -> tuple[bytes, bytes]:
    """A frame as it lies in a file: header and stored bytes."""
    if seal is not None:
        codec |= SEALED
        stored = sealing.seal(seal, stored, _bound_to(codec, position, raw, len(stored) + sealing.OVERHEAD))
    return frame_header(codec, position, raw, stored), stored


def _bound_to(codec: int, position: int, raw: int, stored: int) -> bytes:
    return _FRAME.pack(b"FRAM", codec, position, raw, stored, 0)[:24]


@dataclass(frozen=True, slots=True)
class Frame:
    codec: int
    position: int
    raw: int
    stored: bytes

    @property
    def kind(self) -> int:
        """The codec, sealed or not."""
        return self.codec & ~SEALED


def opened_frame(seal: Seal, frame: Frame) -> Frame | None:
    """A frame of a file as it was before it was sealed; None when it is not what was sealed there."""
    if (seal is None) == bool(frame.codec & SEALED):
        return None
    if seal is None:
        return frame
    stored = sealing.unseal(seal, frame.stored, _bound_to(frame.codec, frame.position, frame.raw, len(frame.stored)))
    return None if stored is None else Frame(frame.kind, frame.position, frame.raw, stored)


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


def check_header(path: Path, head: bytes, content: bytes, set_id: bytes, interval: int) -> Seal:
    """What the frames behind this header are sealed with. Raises DamageError when it is not that of the file."""
    salt = head[40:56] if head[8:12] == b"\x02\0\0\0" else None
    if len(head) < HEADER_BYTES or head != file_header(content, set_id, interval, salt):
        raise DamageError(f"{path} has a wrong header at offset 0", HINT)
    sealer = sealing.sealer_of(path)
    if sealer is None:
        if salt is not None:
            raise sealing.no_key(path)
        return None
    if salt is None:
        raise DamageError(f"{path} is not encrypted as its store is (offset 0)", HINT)
    return sealer.frames(head[8:56])


def scan(path: Path, fd: int, size: int) -> tuple[list[Entry], int, bool]:
    """Frames of an unfinished file, the offset at which they end, and whether a directory frame follows there."""
    entries: list[Entry] = []
    offset = HEADER_BYTES
    position = 0
    while (frame := read_frame(fd, offset, size)) is not None:
        if frame.kind == CODEC_DIRECTORY:
            return entries, offset, frame.position == position
        if frame.position != position or frame.kind not in (CODEC_PLAIN, CODEC_ZSTD):
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


def read_directory(path: Path, fd: int, size: int, seal: Seal) -> list[Entry]:
    """The frames of a finished file; they must lie one after another and fill it without gaps."""
    tail = read_all(fd, TRAILER_BYTES, max(0, size - TRAILER_BYTES))
    if len(tail) < TRAILER_BYTES:
        raise DamageError(f"{path} has no trailer at offset {size}", HINT)
    magic, place, count, checksum = _TRAILER.unpack(tail)
    if magic != b"PGCDPEND" or xxhash.xxh3_64_intdigest(tail[:24]) != checksum:
        raise DamageError(f"{path} has a damaged trailer at offset {size - TRAILER_BYTES}", HINT)
    stored = read_frame(fd, place, size - TRAILER_BYTES)
    frame = None if stored is None else opened_frame(seal, stored)
    whole = frame is not None and frame.codec == CODEC_DIRECTORY and len(frame.stored) == count * ENTRY.itemsize
    if (
        not whole
        or frame is None
        or stored is None
        or place + FRAME_HEADER_BYTES + len(stored.stored) != size - TRAILER_BYTES
    ):
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
