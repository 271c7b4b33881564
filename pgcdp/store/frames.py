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
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash
import zstandard

from pgcdp.errors import BugError, DamageError
from pgcdp.fsio import SteadyWrites, naming, read_all, write_all
from pgcdp.store.frame_format import (
    CODEC_DIRECTORY,
    CODEC_PLAIN,
    CODEC_ZSTD,
    DEFAULT_LEVEL,
    ENTRY,
    FRAME_BYTES,
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    HINT,
    MAX_FRAME_BYTES,
    Entry,
    FileSummary,
    Frame,
    Seal,
    check_header,
    closed_frame,
    digest_of,
    frame_after,
    new_header,
    opened_frame,
    read_directory,
    read_frame,
    scan,
    summary_of,
)
from pgcdp.store.unfinished import check_unfinished, last_frame, whole_frames

__all__ = [
    "DEFAULT_LEVEL",
    "FRAME_BYTES",
    "HEADER_BYTES",
    "Entry",
    "FileSummary",
    "Frame",
    "FrameReader",
    "FrameWriter",
    "check_unfinished",
    "summary_of",
]


CACHE_BYTES = 16 * 1024 * 1024
"""Bytes that a reader keeps decompressed."""


class FrameWriter:
    """Writes a frames file. `length` is the length of the stream so far, `file_bytes` what it takes on disk.

    Make one with `create` or `resume`; it ends with `finish()` (complete) or `close()` (taken up later).
    """

    def __init__(self, path: Path, fd: int, head: bytes, seal: Seal, level: int) -> None:
        self.path = path
        self._fd = fd
        self._seal = seal
        self._steady = SteadyWrites(fd)
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._buffer = bytearray()
        self._frame_bytes = FRAME_BYTES
        self.entries: list[Entry] = []
        self.file_bytes = HEADER_BYTES
        self.flushed = 0
        self._digest = xxhash.xxh3_64(head)
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
        try:
            head, seal = new_header(path, content, set_id, interval)
            write_all(fd, head, 0)
            with naming(fd):
                os.fdatasync(fd)
        except BaseException:
            os.close(fd)
            raise
        writer = cls(path, fd, head, seal, level)
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
        """Take up an unfinished file: check its frames and cut off the rest; one that was finished is taken up as well.

        `durable`: bytes of the stream that somebody relies on. Frames that end before it are damage, and what lies
        behind the frame that ends it is cut off, whole or not: a sync of it may have failed, and the kernel tells of
        that once; read again, the bytes come from memory. None: nothing is known, then only a tail without any valid
        frame behind it is cut. Raises DamageError with file and offset.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            head = read_all(fd, HEADER_BYTES, 0)
            seal = check_header(path, head, content, set_id, interval)
            entries, end, directory = scan(path, fd, size)
            position = entries[-1].position + entries[-1].raw if entries else 0
            if durable is not None and position < durable:
                raise DamageError(
                    f"{path} is damaged at offset {end}: {durable} bytes of its stream were durable, "
                    f"{position} are whole",
                    HINT,
                )
            if durable is None and not directory and frame_after(fd, end, size) is not None:
                raise DamageError(f"{path} is damaged at offset {end}, valid frames follow", HINT)
            if durable is not None:
                keep = sum(1 for entry in entries if entry.position < durable)
                end = entries[keep].offset if keep < len(entries) else end
                entries = entries[:keep]
            writer = cls(path, fd, head, seal, level)
            writer._frame_bytes = frame_bytes
            writer.entries = entries
            writer.file_bytes = end
            writer.flushed = entries[-1].position + entries[-1].raw if entries else 0
            writer._digest = digest_of(fd, end)
            with naming(fd):
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
            if self._buffer:
                self._buffer += view[done : done + room]
                self._flush()
            else:  # a whole frame: not copied first
                self._write_frame(view[done : done + room])
            done += room
            room = self._frame_bytes
        self._buffer += view[done:]
        return position

    def _flush(self) -> None:
        if self._buffer:
            self._write_frame(self._buffer)
            self._buffer = bytearray()

    def _write_frame(self, content: bytearray | memoryview) -> None:
        raw = len(content)
        stored = self._compressor.compress(content)
        codec = CODEC_ZSTD
        if len(stored) >= raw:
            stored, codec = bytes(content), CODEC_PLAIN
        self._write_stored(codec, raw, stored)

    def adopt(self, frame: Frame) -> int:
        """Append a frame of another file (`FrameReader.frame`) as it is compressed; its position in this stream."""
        if self.finished:
            raise BugError(f"{self.path} is finished and takes no more bytes")
        self._flush()
        self._write_stored(frame.codec, frame.raw, frame.stored)
        return self.entries[-1].position

    def _write_stored(self, codec: int, raw: int, stored: bytes) -> None:
        head, stored = closed_frame(self._seal, codec, self.flushed, raw, stored)
        self._write(head, stored)
        self.entries.append(Entry(self.flushed, self.file_bytes, raw, len(stored)))
        self.file_bytes += FRAME_HEADER_BYTES + len(stored)
        self.flushed += raw

    def _write(self, head: bytes, stored: bytes) -> None:
        write_all(self._fd, head + stored, self.file_bytes)
        self._steady.wrote(len(head) + len(stored))
        self._digest.update(head)
        self._digest.update(stored)

    def flush(self) -> None:
        """Write the partial frame, without making it durable."""
        self._flush()

    def sync(self) -> None:
        """Make all that was appended durable."""
        self._flush()
        with naming(self._fd):
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
            with FrameReader(self.path, os.dup(self._fd), [partial], 0, self._seal) as reader:
                prefix = reader.read(partial.position, length - partial.position)
        with naming(self._fd):
            os.ftruncate(self._fd, partial.offset)
        self.entries = self.entries[:keep]
        self.file_bytes = partial.offset
        self.flushed = partial.position
        self._digest = digest_of(self._fd, partial.offset)
        self._buffer = bytearray(prefix)

    def finish(self) -> FileSummary:
        """Write directory and trailer, sync, close. Harmless on a finished file, which it only closes."""
        if not self.finished:
            self._flush()
            table = np.array([(e.position, e.offset, e.raw, e.stored) for e in self.entries], dtype=ENTRY).tobytes()
            place = self.file_bytes
            head, stored = closed_frame(self._seal, CODEC_DIRECTORY, self.flushed, len(table), table)
            tail = struct.pack("<8sQQ", b"PGCDPEND", place, len(self.entries))
            tail += struct.pack("<Q", xxhash.xxh3_64_intdigest(tail))
            self._write(head, stored + tail)
            self.file_bytes = place + len(head) + len(stored) + len(tail)
            self.finished = True
        with naming(self._fd):
            os.fsync(self._fd)
        summary = FileSummary(self.path.name, self.file_bytes, self._digest.hexdigest(), self.flushed)
        self.close()
        return summary

    def reader(self) -> FrameReader:
        """A reader of what was appended so far; what comes later is not in it."""
        self._flush()
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return FrameReader(self.path, fd, list(self.entries), CACHE_BYTES, self._seal)

    def close(self) -> None:
        """Close without finishing; the partial frame is lost. Harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FrameReader:
    """Random access to a stream. Every frame is checked when it is read; a bounded number stays decompressed.

    Not for several threads at once. Raises DamageError with file and offset.
    """

    def __init__(self, path: Path, fd: int, entries: list[Entry], cache_bytes: int, seal: Seal) -> None:
        self.path = path
        self._seal = seal
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
        cache_bytes: int = CACHE_BYTES,
    ) -> FrameReader:
        """Open a finished file by its directory, or (`unfinished`) what is whole of one that may still grow.

        Only a torn tail is left out: valid frames behind a broken one are DamageError.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            seal = check_header(path, read_all(fd, HEADER_BYTES, 0), content, set_id, interval)
            entries = whole_frames(path, fd, size) if unfinished else read_directory(path, fd, size, seal)
            return cls(path, fd, entries, cache_bytes, seal)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open_end(cls, path: Path, content: bytes, set_id: bytes, interval: int) -> FrameReader:
        """The last whole frame alone of a file that may still grow; `length` is that of the whole stream.

        Found from the end of the file: costs the same however long it is, and damage before that frame is not seen.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            seal = check_header(path, read_all(fd, HEADER_BYTES, 0), content, set_id, interval)
            last = last_frame(path, fd, size, seal)
            return cls(path, fd, [last] if last is not None else [], 0, seal)
        except BaseException:
            os.close(fd)
            raise

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

    def frame(self, entry: Entry) -> Frame:
        """A frame, compressed as it is stored and not sealed any more; its checksum is checked."""
        frame = read_frame(self._fd, entry.offset, entry.offset + FRAME_HEADER_BYTES + entry.stored)
        if frame is None or (frame.position, frame.raw, len(frame.stored)) != (entry.position, entry.raw, entry.stored):
            raise self._damaged(entry)
        opened = opened_frame(self._seal, frame)
        if opened is None:
            raise self._damaged(entry)
        return opened

    def _damaged(self, entry: Entry) -> DamageError:
        return DamageError(f"{self.path} has a damaged frame at offset {entry.offset}", HINT)

    def _decompress(self, entry: Entry) -> bytes:
        frame, damage = self.frame(entry), self._damaged(entry)
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
                HINT,
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

    def check(self, entry: Entry) -> None:
        """Read one frame and check it. Raises DamageError with its offset."""
        self._decompress(entry)

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
