"""Frames files: a stream of raw bytes in frames, each compressed and checksummed on its own (FORMAT.md section 2).

A frame never spans a `sync()`: what was durable ends at the end of a frame. So whatever a restart has to cut in the
middle of a frame was never durable, nobody was told that it was, and the journal still has it.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash
import zstandard

from pgcdp.errors import BugError, DamageError
from pgcdp.fsio import read_all, write_all

FRAME_BYTES = 512 * 1024
DEFAULT_LEVEL = 3
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
_ENTRY = np.dtype([("position", "<u8"), ("offset", "<u8"), ("raw", "<u4"), ("stored", "<u4")])
_EIGHT_ZEROS = bytes(8)
_HINT = "pgcdp check --full tells what else is damaged and what can still be restored"


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


def _header(content: bytes, set_id: bytes, interval: int) -> bytes:
    plain = _HEADER.pack(b"PGCDPFRM", 1, content, set_id, interval, bytes(16), 0)
    return plain[:56] + struct.pack("<Q", xxhash.xxh3_64_intdigest(plain))


def _frame_header(codec: int, position: int, raw: int, stored: bytes) -> bytes:
    plain = _FRAME.pack(b"FRAM", codec, position, raw, len(stored), 0)
    digest = xxhash.xxh3_64(plain)
    digest.update(stored)
    return plain[:24] + struct.pack("<Q", digest.intdigest())


@dataclass(frozen=True, slots=True)
class _Frame:
    codec: int
    position: int
    raw: int
    stored: bytes


def _read_frame(fd: int, offset: int, end: int) -> _Frame | None:
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
    return _Frame(codec, position, raw, stored)


def _check_header(path: Path, head: bytes, content: bytes, set_id: bytes, interval: int) -> None:
    if len(head) < HEADER_BYTES or head != _header(content, set_id, interval):
        raise DamageError(f"{path} has a wrong header at offset 0", _HINT)


def _scan(path: Path, fd: int, size: int) -> tuple[list[Entry], int, bool]:
    """Frames of an unfinished file, the offset at which they end, and whether a directory frame follows there."""
    entries: list[Entry] = []
    offset = HEADER_BYTES
    position = 0
    while (frame := _read_frame(fd, offset, size)) is not None:
        if frame.codec == CODEC_DIRECTORY:
            return entries, offset, frame.position == position
        if frame.position != position or frame.codec not in (CODEC_PLAIN, CODEC_ZSTD):
            break
        entries.append(Entry(position, offset, frame.raw, len(frame.stored)))
        offset += FRAME_HEADER_BYTES + len(frame.stored)
        position += frame.raw
    return entries, offset, False


def _frame_after(fd: int, offset: int, size: int) -> int | None:
    """Offset of a valid frame somewhere behind `offset`: then what lies before it is damage, no torn tail."""
    step = 1 << 20
    at = offset + 1
    while at < size:
        chunk = read_all(fd, step + 3, at)
        found = chunk.find(b"FRAM")
        while found >= 0:
            if _read_frame(fd, at + found, size) is not None:
                return at + found
            found = chunk.find(b"FRAM", found + 1)
        at += step
    return None


class FrameWriter:
    """Writes a frames file. `length` is the length of the stream so far, `file_bytes` what it takes on disk.

    Make one with `create` or `resume`; it ends with `finish()` (complete) or `close()` (taken up later).
    """

    def __init__(self, path: Path, fd: int, content: bytes, set_id: bytes, interval: int, level: int) -> None:
        self.path = path
        self.content = content
        self.set_id = set_id
        self.interval = interval
        self._fd = fd
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._buffer = bytearray()
        self._frame_bytes = FRAME_BYTES
        self.entries: list[Entry] = []
        self.file_bytes = HEADER_BYTES
        self.flushed = 0
        self._digest = xxhash.xxh3_64(_header(content, set_id, interval))
        self.finished = False

    @classmethod
    def create(
        cls,
        path: Path,
        content: bytes,
        set_id: bytes,
        interval: int,
        *,
        level: int = DEFAULT_LEVEL,
        frame_bytes: int = FRAME_BYTES,
    ) -> FrameWriter:
        """A new, empty file (one that exists is replaced); its header is synced, its name is not."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        write_all(fd, _header(content, set_id, interval), 0)
        os.fdatasync(fd)
        writer = cls(path, fd, content, set_id, interval, level)
        writer._frame_bytes = frame_bytes
        return writer

    @classmethod
    def resume(
        cls,
        path: Path,
        content: bytes,
        set_id: bytes,
        interval: int,
        *,
        durable: int | None = None,
        level: int = DEFAULT_LEVEL,
        frame_bytes: int = FRAME_BYTES,
    ) -> FrameWriter:
        """Take up an unfinished file: check all frames and cut the torn tail; or open a finished one (`finished`).

        `durable`: bytes of the stream that somebody relies on. Frames that end before it are damage; None: nothing is
        known, then only a tail without any valid frame behind it is cut. Raises DamageError with file and offset.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            _check_header(path, read_all(fd, HEADER_BYTES, 0), content, set_id, interval)
            entries, end, directory = _scan(path, fd, size)
            position = entries[-1].position + entries[-1].raw if entries else 0
            if durable is not None and position < durable:
                raise DamageError(
                    f"{path} is damaged at offset {end}: {durable} bytes of its stream were durable, "
                    f"{position} are whole",
                    _HINT,
                )
            writer = cls(path, fd, content, set_id, interval, level)
            writer._frame_bytes = frame_bytes
            writer.entries = entries
            writer.file_bytes = end
            writer.flushed = position
            writer._digest = _digest_of(fd, end)
            if directory and _whole_trailer(fd, size):
                writer.finished = True
                writer._digest = _digest_of(fd, size)
                writer.file_bytes = size
                return writer
            if end < size:
                if durable is None and not directory and _frame_after(fd, end, size) is not None:
                    raise DamageError(f"{path} is damaged at offset {end}, valid frames follow", _HINT)
                os.ftruncate(fd, end)
            return writer
        except BaseException:
            os.close(fd)
            raise

    @property
    def length(self) -> int:
        """Bytes of the stream, the partial frame included."""
        return self.flushed + len(self._buffer)

    def append(self, data: bytes | bytearray | memoryview) -> int:
        """Append raw bytes; returns their position in the stream. Nothing is durable before `sync()`."""
        if self.finished:
            raise BugError(f"{self.path} is finished and takes no more bytes")
        position = self.length
        room = self._frame_bytes - len(self._buffer)
        if len(data) < room:
            self._buffer += data
            return position
        view = memoryview(data).cast("B")
        done = 0
        while len(view) - done >= room:
            self._buffer += view[done : done + room]
            self._flush()
            done += room
            room = self._frame_bytes
        self._buffer += view[done:]
        return position

    def _flush(self) -> None:
        if not self._buffer:
            return
        raw = len(self._buffer)
        stored = self._compressor.compress(self._buffer)
        codec = CODEC_ZSTD
        if len(stored) >= raw:
            stored, codec = bytes(self._buffer), CODEC_PLAIN
        self._write(_frame_header(codec, self.flushed, raw, stored), stored)
        self.entries.append(Entry(self.flushed, self.file_bytes, raw, len(stored)))
        self.file_bytes += FRAME_HEADER_BYTES + len(stored)
        self.flushed += raw
        self._buffer = bytearray()

    def _write(self, head: bytes, stored: bytes) -> None:
        write_all(self._fd, head + stored, self.file_bytes)
        self._digest.update(head)
        self._digest.update(stored)

    def flush(self) -> None:
        """Write the partial frame, without making it durable."""
        self._flush()

    def sync(self) -> None:
        """Make all that was appended durable."""
        self._flush()
        os.fdatasync(self._fd)

    def cut(self, length: int) -> None:
        """Give up the stream behind `length`. Only for what was never durable (see the head of this file)."""
        if length > self.length or self.finished:
            raise BugError(f"{self.path} cannot be cut to {length} bytes of its {self.length}")
        self._flush()
        if length == self.flushed:
            return
        keep = bisect_right(self.entries, length, key=lambda entry: entry.position + entry.raw)
        partial = self.entries[keep]
        prefix = b""
        if partial.position < length:
            with FrameReader.of_entries(self.path, os.dup(self._fd), [partial]) as reader:
                prefix = reader.read(partial.position, length - partial.position)
        os.ftruncate(self._fd, partial.offset)
        self.entries = self.entries[:keep]
        self.file_bytes = partial.offset
        self.flushed = partial.position
        self._digest = _digest_of(self._fd, partial.offset)
        self._buffer = bytearray(prefix)

    def finish(self) -> FileSummary:
        """Write directory and trailer, sync, close. Harmless on a finished file, which it only closes."""
        if not self.finished:
            self._flush()
            table = np.array([(e.position, e.offset, e.raw, e.stored) for e in self.entries], dtype=_ENTRY).tobytes()
            place = self.file_bytes
            head = _frame_header(CODEC_DIRECTORY, self.flushed, len(table), table)
            tail = struct.pack("<8sQQ", b"PGCDPEND", place, len(self.entries))
            tail += struct.pack("<Q", xxhash.xxh3_64_intdigest(tail))
            self._write(head, table + tail)
            self.file_bytes = place + len(head) + len(table) + len(tail)
            self.finished = True
        os.fsync(self._fd)
        summary = FileSummary(self.path.name, self.file_bytes, self._digest.hexdigest(), self.flushed)
        self.close()
        return summary

    def reader(self) -> FrameReader:
        """A reader of what was appended so far; what comes later is not in it."""
        self._flush()
        return FrameReader.of_entries(self.path, os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), list(self.entries))

    def close(self) -> None:
        """Close without finishing; the partial frame is lost. Harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _digest_of(fd: int, size: int) -> xxhash.xxh3_64:
    digest = xxhash.xxh3_64()
    for at in range(0, size, 1 << 20):
        digest.update(read_all(fd, min(1 << 20, size - at), at))
    return digest


def _whole_trailer(fd: int, size: int) -> bool:
    tail = read_all(fd, TRAILER_BYTES, size - TRAILER_BYTES)
    return tail[:8] == b"PGCDPEND" and xxhash.xxh3_64_intdigest(tail[:24]) == struct.unpack("<Q", tail[24:])[0]


class FrameReader:
    """Random access to a stream. Every frame is checked when it is read; a bounded number stays decompressed.

    Not for several threads at once. Raises DamageError with file and offset.
    """

    def __init__(self, path: Path, fd: int, entries: list[Entry], cache_bytes: int) -> None:
        self.path = path
        self.entries = entries
        self.length = entries[-1].position + entries[-1].raw if entries else 0
        self._fd = fd
        self._starts = [entry.position for entry in entries]
        self._decompressor = zstandard.ZstdDecompressor()
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached = 0
        self._cache_bytes = cache_bytes

    @classmethod
    def open(
        cls,
        path: Path,
        content: bytes,
        set_id: bytes,
        interval: int,
        *,
        unfinished: bool = False,
        cache_bytes: int = 16 * 1024 * 1024,
    ) -> FrameReader:
        """Open a finished file by its directory, or (`unfinished`) what is whole of one that may still grow."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            _check_header(path, read_all(fd, HEADER_BYTES, 0), content, set_id, interval)
            entries = _scan(path, fd, size)[0] if unfinished else _directory(path, fd, size)
            return cls(path, fd, entries, cache_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_entries(cls, path: Path, fd: int, entries: list[Entry], cache_bytes: int = 16 * 1024 * 1024) -> FrameReader:
        """A reader of frames that are known already; takes the descriptor."""
        return cls(path, fd, entries, cache_bytes)

    def _load(self, number: int) -> bytes:
        raw = self._cache.get(number)
        if raw is not None:
            self._cache.move_to_end(number)
            return raw
        raw = self._decompress(self.entries[number])
        self._cache[number] = raw
        self._cached += len(raw)
        while self._cached > self._cache_bytes and len(self._cache) > 1:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return raw

    def _decompress(self, entry: Entry) -> bytes:
        damage = DamageError(f"{self.path} has a damaged frame at offset {entry.offset}", _HINT)
        frame = _read_frame(self._fd, entry.offset, entry.offset + FRAME_HEADER_BYTES + entry.stored)
        if frame is None or (frame.position, frame.raw, len(frame.stored)) != (entry.position, entry.raw, entry.stored):
            raise damage
        if frame.codec == CODEC_PLAIN:
            raw = frame.stored
        elif frame.codec == CODEC_ZSTD and frame.raw <= MAX_FRAME_BYTES:
            try:
                raw = self._decompressor.decompress(frame.stored, max_output_size=frame.raw)
            except zstandard.ZstdError:
                raise damage from None
        else:
            raise damage
        if len(raw) != frame.raw:
            raise damage
        return raw

    def read(self, position: int, length: int) -> bytes:
        """`length` bytes of the stream from `position`. Outside of the stream is damage of what led here."""
        if length == 0:
            return b""
        if position < 0 or position + length > self.length or not self.entries or position < self._starts[0]:
            raise DamageError(
                f"{self.path} has a stream of {self.length} bytes, bytes {position} to {position + length} are missing",
                _HINT,
            )
        number = bisect_right(self._starts, position) - 1
        begin = position - self._starts[number]
        raw = self._load(number)
        if begin + length <= len(raw):
            return raw[begin : begin + length]
        parts = [raw[begin:]]
        missing = length - len(parts[0])
        while missing > 0:
            number += 1
            part = self._load(number)[:missing]
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Every frame in order as (position, raw bytes), past the cache."""
        for entry in self.entries:
            yield entry.position, self._decompress(entry)

    def read_stream(self) -> bytes:
        """The whole stream; for streams that fit into memory (index, maps)."""
        return b"".join(raw for _, raw in self.frames())

    def close(self) -> None:
        """Close the file. Harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _directory(path: Path, fd: int, size: int) -> list[Entry]:
    """The frames of a finished file; they must lie one after another and fill it without gaps."""
    tail = read_all(fd, TRAILER_BYTES, max(0, size - TRAILER_BYTES))
    if len(tail) < TRAILER_BYTES:
        raise DamageError(f"{path} has no trailer at offset {size}", _HINT)
    magic, place, count, checksum = _TRAILER.unpack(tail)
    if magic != b"PGCDPEND" or xxhash.xxh3_64_intdigest(tail[:24]) != checksum:
        raise DamageError(f"{path} has a damaged trailer at offset {size - TRAILER_BYTES}", _HINT)
    frame = _read_frame(fd, place, size - TRAILER_BYTES)
    whole = frame is not None and frame.codec == CODEC_DIRECTORY and len(frame.stored) == count * _ENTRY.itemsize
    if not whole or frame is None or place + FRAME_HEADER_BYTES + len(frame.stored) != size - TRAILER_BYTES:
        raise DamageError(f"{path} has a damaged directory at offset {place}", _HINT)
    entries = [Entry(*row) for row in np.frombuffer(frame.stored, dtype=_ENTRY).tolist()]
    offset, position = HEADER_BYTES, 0
    for entry in entries:
        if entry.offset != offset or entry.position != position:
            raise DamageError(f"{path} has a directory at offset {place} that does not fit its frames", _HINT)
        offset += FRAME_HEADER_BYTES + entry.stored
        position += entry.raw
    if offset != place or position != frame.position:
        raise DamageError(f"{path} has a directory at offset {place} that does not fit its frames", _HINT)
    return entries
