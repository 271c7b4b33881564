"""The note that a holder keeps (FORMAT.md 6), as tests change it."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

NOTE_BYTES, AGREED, CHECKSUM_AT, ANSWER_AT = 4096, 544, 24, 288


def note_of(door: Path) -> mmap.mmap:
    """The shared page of the holder that listens at `door`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(door))
        _, files, _, _ = socket.recv_fds(client, 64, 4)
    try:
        return mmap.mmap(files[1], NOTE_BYTES)
    finally:
        for file in files:
            os.close(file)


@contextmanager
def other_answer(door: Path, *, whole: bool = True) -> Iterator[None]:
    """Inside, the note tells of another answer to the kernel, as one that was begun with another libfuse would; not
    `whole`: its checksum is wrong."""
    with note_of(door) as note:
        before = note[:AGREED]
        note[ANSWER_AT + 16 + 12] ^= 1  # a flag
        if whole:
            blank = note[:CHECKSUM_AT] + bytes(8) + note[CHECKSUM_AT + 8 : AGREED]
            note[CHECKSUM_AT : CHECKSUM_AT + 8] = xxhash.xxh3_64_intdigest(blank).to_bytes(8, "little")
        try:
            yield
        finally:
            note[:AGREED] = before
