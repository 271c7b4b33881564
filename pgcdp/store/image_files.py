"""The files of one volume of the backup image: its blocks, and for each what it is judged by (FORMAT.md 3.3).

In a plain store that is a checksum, 8 bytes. In an encrypted one a block is encrypted in place, and its 32 bytes are
the nonce and the tag that this took (FORMAT.md 7.4): a block that was written and its entry that was not do not fit, as
a checksum would not. All zeros are a block of zeros in both.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp import sealing
from pgcdp.errors import DamageError
from pgcdp.fsio import SteadyWrites, naming, read_all, write_all
from pgcdp.records import BLOCK
from pgcdp.sealing import NONCE_BYTES, PIECE_BLOCKS, TAG_BYTES, Cipher, Sealer

ZERO_SUM = np.uint64(xxhash.xxh3_64_intdigest(bytes(BLOCK)))
_PENDING_LIMIT = 1 << 18

_digest = xxhash.xxh3_64_intdigest
_IN_USE = struct.pack("<I", 1)
"""The last bytes of a sealed block's entry: none is all zeros."""
Data = bytes | bytearray | memoryview


def block_sums(data: bytes | bytearray | memoryview) -> NDArray[np.uint64]:
    """The sums of consecutive blocks as `NAME.sums` holds them: XXH3-64 XOR that of a block of zeros."""
    view = memoryview(data)
    count = len(view) // BLOCK
    found = np.fromiter(
        (_digest(view[at : at + BLOCK]) for at in range(0, count * BLOCK, BLOCK)), dtype=np.uint64, count=count
    )
    return found ^ ZERO_SUM


class Guard(Protocol):
    """How blocks lie on the disk, and what they are judged by: `unit` bytes each, all zeros for a block of zeros."""

    unit: int

    def close(self, block: int, data: Data) -> tuple[Data, NDArray[Any]]:
        """Whole blocks from `block` on as they are written, and their entries, an array of `dtype`."""

    def open(self, block: int, data: bytes, entries: NDArray[Any]) -> tuple[bytes, NDArray[np.bool_]]:
        """Blocks as they were, and which of them are damaged; as many as there are both."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of an array of entries."""


class Summed:
    """Plain blocks with a checksum each."""

    unit = 8
    dtype = np.dtype(np.uint64)

    def close(self, block: int, data: Data) -> tuple[Data, NDArray[Any]]:
        """As `Guard`."""
        return data, block_sums(data)

    def open(self, block: int, data: bytes, entries: NDArray[Any]) -> tuple[bytes, NDArray[np.bool_]]:
        """As `Guard`."""
        found = block_sums(data)
        size = min(len(found), len(entries))
        return data, found[:size] != entries[:size]


class Sealed:
    """Encrypted blocks with nonce and tag each, under the keys of one volume."""

    unit = 32
    dtype = np.dtype("V32")

    def __init__(self, sealer: Sealer, volume: int) -> None:
        self._sealer = sealer
        self._volume = volume

    def close(self, block: int, data: Data) -> tuple[Data, NDArray[Any]]:
        """As `Guard`."""
        view = memoryview(data)
        count = len(view) // BLOCK
        zeros = is_zero(np.frombuffer(view, dtype=np.uint64).reshape(count, BLOCK // 8))
        nonces = os.urandom(count * NONCE_BYTES)
        parts, entries = list[bytes](), list[bytes]()
        for at, zero in enumerate(zeros.tolist()):
            plain = view[at * BLOCK : (at + 1) * BLOCK]
            if zero:
                parts.append(bytes(BLOCK))
                entries.append(bytes(self.unit))
                continue
            nonce = nonces[at * NONCE_BYTES : (at + 1) * NONCE_BYTES]
            found = self._cipher(block + at).encrypt(nonce, plain, _bound_to(block + at))
            parts.append(found[:BLOCK])
            entries.append(nonce + found[BLOCK:] + _IN_USE)
        return b"".join(parts), np.frombuffer(b"".join(entries), dtype=self.dtype)

    def open(self, block: int, data: bytes, entries: NDArray[Any]) -> tuple[bytes, NDArray[np.bool_]]:
        """As `Guard`."""
        size = min(len(data) // BLOCK, len(entries))
        wrong = np.zeros(size, dtype=np.bool_)
        parts, told = list[bytes](), entries[:size].tobytes()
        for at in range(size):
            entry = told[at * self.unit : (at + 1) * self.unit]
            stored = data[at * BLOCK : (at + 1) * BLOCK]
            plain = self._open(block + at, stored, entry)
            wrong[at] = plain is None
            parts.append(bytes(BLOCK) if plain is None else plain)
        return b"".join(parts), wrong

    def _open(self, block: int, stored: bytes, entry: bytes) -> bytes | None:
        if entry == bytes(self.unit):
            return stored if stored == bytes(BLOCK) else None
        if entry[-len(_IN_USE) :] != _IN_USE:
            return None
        tag = entry[NONCE_BYTES : NONCE_BYTES + TAG_BYTES]
        return sealing.decrypted(self._cipher(block), entry[:NONCE_BYTES], stored + tag, _bound_to(block))

    def _cipher(self, block: int) -> Cipher:
        return self._sealer.piece(self._volume, block // PIECE_BLOCKS)


def _bound_to(block: int) -> bytes:
    return struct.pack("<Q", block)


def is_zero(entries: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries, or rows of an array, are all zeros: that is the entry of a block of zeros."""
    if not len(entries):  # behind the end of a file that was cut short
        return np.zeros(0, dtype=np.bool_)
    found: NDArray[np.bool_] = np.logical_not(entries.view(np.uint64).reshape(len(entries), -1).any(axis=1))
    return found


class VolumeFiles:
    """Image and sums of one volume."""

    def __init__(self, directory: Path, number: int, name: str, size: int, flags: int) -> None:
        sealer = sealing.sealer_of(directory / name)
        self.guard: Guard = Summed() if sealer is None else Sealed(sealer, number)
        self.path = directory / f"{name}.img"
        self.sums_path = directory / f"{name}.sums"
        self.blocks = size // BLOCK
        self.fd = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        try:
            self.sums_fd = os.open(self.sums_path, flags | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self.fd)
            raise
        self.steady = SteadyWrites(self.fd)
        self.pending: list[tuple[NDArray[np.int64], NDArray[Any]]] = []
        self.pending_blocks = 0

    def used_bytes_in(self, block: int, count: int) -> int:
        """Of some blocks, the bytes that lie in no hole; their number when the filesystem cannot tell."""
        at, end, used = block * BLOCK, (block + count) * BLOCK, 0
        try:
            while at < end:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
                at = min(end, os.lseek(self.fd, data, os.SEEK_HOLE))
                used += max(0, at - min(data, end))
        except OSError:  # nothing but a hole from here on
            return used
        return used

    def check_size(self) -> None:
        """Raises DamageError when a file is shorter than the volume needs; longer it is while the volume grows."""
        for path, fd, size in (
            (self.path, self.fd, self.blocks * BLOCK),
            (self.sums_path, self.sums_fd, self.blocks * self.guard.unit),
        ):
            found = os.fstat(fd).st_size
            if found < size:
                raise DamageError(f"{path} ends at offset {found} instead of {size}")

    def grow(self, size: int) -> None:
        """Longer files, durably: what is new is zeros, also where they are longer than they must be."""
        before, self.blocks = self.blocks, max(self.blocks, size // BLOCK)
        for fd, unit in ((self.fd, BLOCK), (self.sums_fd, self.guard.unit)):
            with naming(fd):
                os.ftruncate(fd, before * unit)
                os.ftruncate(fd, self.blocks * unit)
        self.sync()

    def sync(self) -> None:
        """What was written is durable."""
        for fd in (self.fd, self.sums_fd):
            with naming(fd):
                os.fsync(fd)

    def sums(self, block: int, count: int) -> NDArray[Any]:
        """The entries of some blocks, those not yet written included: an array of `guard.dtype`."""
        self.flush_sums()
        unit = self.guard.unit
        raw = read_all(self.sums_fd, count * unit, block * unit)
        return np.frombuffer(raw[: len(raw) // unit * unit], dtype=self.guard.dtype)

    def put_sums(self, block: int, sums: NDArray[Any]) -> None:
        """Set sums from `block` on; they are written in order of block later."""
        self.pending.append((np.arange(block, block + len(sums)), sums))
        self.pending_blocks += len(sums)
        if self.pending_blocks >= _PENDING_LIMIT:
            self.flush_sums()

    def flush_sums(self) -> None:
        """Write gathered sums, in order of block; a block's last one counts."""
        if not self.pending:
            return
        blocks = np.concatenate([part for part, _ in self.pending])
        sums = np.concatenate([part for _, part in self.pending])
        order = np.argsort(blocks, kind="stable")
        blocks, sums = blocks[order], sums[order]
        last = np.append(blocks[1:] != blocks[:-1], True)
        blocks, sums = blocks[last], sums[last]
        near = np.flatnonzero(np.diff(blocks) > 512) + 1
        unit = self.guard.unit
        for group, values in zip(np.split(blocks, near), np.split(sums, near), strict=True):
            first, count = int(group[0]), int(group[-1] - group[0]) + 1
            if count == len(group):
                table = values
            else:
                raw = bytearray(read_all(self.sums_fd, count * unit, first * unit))
                table = np.frombuffer(raw, dtype=self.guard.dtype)
                table[group - first] = values
            write_all(self.sums_fd, table.tobytes(), first * unit)
        self.pending.clear()
        self.pending_blocks = 0

    def close(self) -> None:
        """Close both files. Harmless when done twice."""
        for fd in (self.fd, self.sums_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.sums_fd = -1
