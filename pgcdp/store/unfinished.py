"""Frames files that may still grow or have a torn tail: which of their frames are whole, and what is damage."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from pgcdp.errors import DamageError
from pgcdp.fsio import read_all
from pgcdp.sealing import OVERHEAD
from pgcdp.store.frame_format import (
    CODEC_DIRECTORY,
    CODEC_PLAIN,
    CODEC_ZSTD,
    ENTRY,
    FRAME_BYTES,
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    HINT,
    MAX_FRAME_BYTES,
    SEALED,
    Entry,
    Seal,
    check_header,
    frame_after,
    opened_frame,
    read_frame,
    scan,
)


def check_unfinished(path: Path, content: bytes, set_id: bytes, interval: int) -> None:
    """Check a file that may still grow or have a torn tail. Raises DamageError if valid frames follow a broken one."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        check_header(path, read_all(fd, HEADER_BYTES, 0), content, set_id, interval)
        whole_frames(path, fd, size)
    finally:
        os.close(fd)


def whole_frames(path: Path, fd: int, size: int) -> list[Entry]:
    """Frames of a file that may still grow or have a torn tail. DamageError for anything else behind them."""
    entries, end, directory = scan(path, fd, size)
    if not directory and frame_after(fd, end, size) is not None:
        raise DamageError(f"{path} is damaged at offset {end}, valid frames follow", HINT)
    if not directory:
        _refuse_broken(path, fd, end, size)
    return entries


def _refuse_broken(path: Path, fd: int, end: int, size: int) -> None:
    """Behind the last whole frame only the beginning of one may lie. One with all its bytes, but wrong, is damage."""
    head = read_all(fd, min(FRAME_HEADER_BYTES, size - end), end)
    torn = head[:4] == b"FRAM"[: len(head)]
    if torn and len(head) == FRAME_HEADER_BYTES:
        codec, _, raw, stored, _ = struct.unpack("<IQIIQ", head[4:])
        more = OVERHEAD if codec & SEALED else 0
        known = (
            codec & ~SEALED in (CODEC_PLAIN, CODEC_ZSTD, CODEC_DIRECTORY) and stored <= raw + more <= MAX_FRAME_BYTES
        )
        torn = known and end + FRAME_HEADER_BYTES + stored > size
    if not torn:
        raise DamageError(f"{path} is damaged at offset {end}, where its last frame begins", HINT)


def last_frame(path: Path, fd: int, size: int, seal: Seal) -> Entry | None:
    """The last whole data frame of a file that may still grow, found from its end.

    A frame that ends where the file ends is it; only behind a torn tail is it the last valid one. (What looks like a
    frame may be the content of one.)
    """
    span = 2 * (FRAME_BYTES + FRAME_HEADER_BYTES)
    begin = max(HEADER_BYTES, size - span)
    chunk = read_all(fd, size - begin, begin)
    last: Entry | None = None
    found = chunk.rfind(b"FRAM")
    while found >= 0:
        frame = read_frame(fd, begin + found, size)
        if frame is not None and frame.kind == CODEC_DIRECTORY:
            opened = opened_frame(seal, frame)
            if opened is None:
                raise DamageError(f"{path} has a damaged directory at offset {begin + found}", HINT)
            rows = np.frombuffer(opened.stored[: len(opened.stored) // ENTRY.itemsize * ENTRY.itemsize], dtype=ENTRY)
            return Entry(*rows[-1].tolist()) if len(rows) else None
        if frame is not None and frame.kind in (CODEC_PLAIN, CODEC_ZSTD):
            entry = Entry(frame.position, begin + found, frame.raw, len(frame.stored))
            if entry.offset + FRAME_HEADER_BYTES + entry.stored == size:
                return entry
            last = last or entry
        found = chunk.rfind(b"FRAM", 0, found)
    if last is None and begin > HEADER_BYTES:
        entries = whole_frames(path, fd, size)
        return entries[-1] if entries else None
    _refuse_broken(path, fd, last.offset + FRAME_HEADER_BYTES + last.stored if last is not None else HEADER_BYTES, size)
    return last
