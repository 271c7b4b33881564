"""One journal segment and its batches (FORMAT.md 1.1 and 1.2), read through a window of a few MiB."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

import xxhash

from pgcdp.errors import DamageError
from pgcdp.fsio import read_all
from pgcdp.records import BLOCK

CHUNK_BYTES = 4 * 1024 * 1024
FIRST_WINDOW = 256 * 1024
"""The window grows as reading goes on: what lies behind the last durable batch would be read for nothing."""
SEGMENT_HEADER_BYTES = 4096
BATCH_HEADER_BYTES = 72

_SEGMENT = struct.Struct("<8sII16sQQQQQ")
_BATCH = struct.Struct("<8sQQQIIQQQQ")
_CHECKSUM = struct.Struct("<Q")
_EIGHT_ZEROS = bytes(8)


class Head(NamedTuple):
    """A batch header, as it stands in the file. `previous`: segment and offset where the batch before it ended."""

    number: int
    first: int
    records: int
    header_length: int
    length: int
    previous: tuple[int, int]

    @property
    def last(self) -> int:
        """Number of its last write."""
        return self.first + self.records - 1


class Window:
    """The bytes of a segment that are in memory, aligned as O_DIRECT needs them. `owner` is the segment they are of.

    It is kept from segment to segment: pages that the kernel has to clear and to give back cost more than the reading.
    """

    def __init__(self) -> None:
        self.owner: object = None
        self._make(CHUNK_BYTES)

    def _make(self, length: int) -> None:
        self.buffer = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.buffer)
        self.begin = self.filled = 0

    def empty(self, owner: object, begin: int, length: int) -> None:
        """Nothing is in it any more; `length` bytes of `owner` from `begin` on find room."""
        if len(self.buffer) < length:
            self.view.release()
            self.buffer.close()
            self._make(length)
        self.owner, self.begin, self.filled = owner, begin, 0


class Segment:
    """An open segment. Raises DamageError when its header is not valid, FileNotFoundError when it is gone."""

    def __init__(self, path: Path, sequence: int, set_id: bytes, window: Window) -> None:
        self.path = path
        self.sequence = sequence
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            self.salt, self.size = self._read_header(set_id)
        except DamageError:
            recycled = not path.exists() or os.stat(path).st_ino != os.fstat(self.fd).st_ino
            os.close(self.fd)
            if recycled:
                raise FileNotFoundError(path) from None
            raise
        self._direct = _open_direct(path, self.fd)
        self._window = window
        self._span = FIRST_WINDOW // 2

    def _read_header(self, set_id: bytes) -> tuple[int, int]:
        head = read_all(self.fd, SEGMENT_HEADER_BYTES, 0)
        hint = "the segment cannot be read; everything before its first write can still be restored"
        if len(head) < SEGMENT_HEADER_BYTES:
            raise DamageError(f"{self.path} ends at offset {len(head)}, inside its header", hint)
        magic, version, length, owner, sequence, salt, size, _made, checksum = _SEGMENT.unpack_from(head)
        if xxhash.xxh3_64_intdigest(head[:64] + bytes(8) + head[72:]) != checksum:
            raise DamageError(f"{self.path} has a wrong header checksum at offset 0", hint)
        if magic != b"PGCDPSEG" or version != 1 or length != SEGMENT_HEADER_BYTES:
            raise DamageError(f"{self.path} has a header of an unknown format at offset 0", hint)
        if owner != set_id:
            raise DamageError(f"{self.path} belongs to set {owner.hex()}, not to {set_id.hex()} (offset 16)", hint)
        if sequence != self.sequence:
            raise DamageError(f"{self.path} says at offset 32 that it is segment {sequence}", hint)
        return int(salt), int(size)

    def close(self) -> None:
        """Close the file. Harmless when done twice."""
        for fd in {self.fd, self._direct} - {-1}:
            os.close(fd)
        self.fd = self._direct = -1

    def _fill(self, offset: int, length: int, most: int) -> bool:
        """Have `length` bytes from `offset` in the window; False where the file ends before."""
        window = self._window
        if window.owner is self and window.begin <= offset and offset + length <= window.begin + window.filled:
            return True
        self._span = min(self._span * 2, CHUNK_BYTES)
        span = max(length, min(most, self._span))
        window.empty(self, offset, span)
        want = min(span, self.size - offset)
        while window.filled < want:
            got = os.preadv(self._direct, [window.view[window.filled : want]], offset + window.filled)
            window.filled += got
            if got == 0 or got % BLOCK:  # the file ends here
                break
        return window.filled >= length

    def batch(self, offset: int, *, whole_window: bool = True) -> Head | None:
        """The batch at `offset` if it is valid (FORMAT.md 1.2), else None. Its bytes are then in the window."""
        most = CHUNK_BYTES if whole_window else 0
        if offset + BLOCK > self.size or not self._fill(offset, BLOCK, most):
            return None
        window = self._window
        unpacked = _BATCH.unpack_from(window.buffer, offset - window.begin)
        magic, salt, number, first, records, header_length, length, segment, place, checksum = unpacked
        if (
            magic != b"PGCDPBAT"
            or salt != self.salt
            or records < 1
            or header_length != -(-(BATCH_HEADER_BYTES + 48 * records) // BLOCK) * BLOCK
            or length < header_length
            or length % BLOCK
            or offset + length > self.size
            or not self._fill(offset, length, most)
        ):
            return None
        at = offset - window.begin
        window.view[at + 64 : at + 72] = _EIGHT_ZEROS
        found = xxhash.xxh3_64_intdigest(window.view[at : at + length])
        _CHECKSUM.pack_into(window.buffer, at + 64, checksum)
        if found != checksum:
            return None
        return Head(number, first, records, header_length, length, (segment, place))

    def has_magic(self, offset: int) -> bool:
        """Whether a batch seems to begin at `offset`."""
        return offset + BLOCK <= self.size and os.pread(self.fd, 8, offset) == b"PGCDPBAT"

    def parts(self, offset: int, head: Head) -> tuple[memoryview, memoryview]:
        """Records and data area of the batch that `batch` has just found at `offset`; to be copied before the next."""
        at = offset - self._window.begin
        view = self._window.view
        return (
            view[at + BATCH_HEADER_BYTES : at + BATCH_HEADER_BYTES + 48 * head.records],
            view[at + head.header_length : at + head.length],
        )


def _open_direct(path: Path, fd: int) -> int:
    """The file of `fd` past the page cache, where the filesystem can: `fd` itself otherwise.

    The engine appends with O_DIRECT, and each page that a reader has pulled into the cache would have to be thrown out
    again on production's way to its commit.
    """
    try:
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return fd
    if os.path.sameopenfile(direct, fd):
        return direct
    os.close(direct)  # recycled just now; what is read through `fd` tells
    return fd
