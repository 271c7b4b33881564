"""The backup image: each volume with a checksum for each of its blocks, and the state that says where it is.

Order of syncs (FORMAT.md 3.4): image and sums first, then the state that speaks of them. A move goes

    state "moving to k+1" synced -> blocks and sums written -> both synced -> state "at k+1" synced

so that after a kill the state never claims what the files do not hold, and a move is simply done again.
New sums are gathered and written in order: a move touches blocks all over the volume, and one small write each would
cost more than the hashing. They are never written through a memory map, which would turn a full disk into a SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pgcdp import twice
from pgcdp.errors import BugError, DamageError, PreconditionError
from pgcdp.fsio import naming, punch_hole, read_all, sync_directory, write_all
from pgcdp.records import BLOCK, Volume
from pgcdp.store.image_files import VolumeFiles, is_zero
from pgcdp.store.image_lock import make_lock
from pgcdp.store.layout import Store

PIECE_BLOCKS = 256
"""Blocks read at once: 1 MiB."""
HOLE_BLOCKS = 128 * 1024
"""Blocks of a hole passed over at once: 1 MiB of sums, of an encrypted store 4 MiB of entries."""

_HINT = "pgcdp check --full tells which boundaries can still be restored"

Lost = Callable[[int, int, int, DamageError], None]
"""Is told (volume, first block, blocks, damage) of blocks whose content cannot be read."""


@dataclass(frozen=True, slots=True)
class ImageState:
    """FORMAT.md 3.4. "baseline" uses from_write, journal_write and copied (bytes by volume name), the others
    boundary, write and, while moving, to."""

    state: Literal["baseline", "at", "moving"]
    boundary: int = 0
    write: int = 0
    to: int | None = None
    from_write: int = 0
    journal_write: int = 0
    copied: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The keys that belong to the state."""
        if self.state == "baseline":
            return {
                "state": self.state,
                "from_write": self.from_write,
                "journal_write": self.journal_write,
                "copied": self.copied,
            }
        content: dict[str, object] = {"state": self.state, "boundary": self.boundary, "write": self.write}
        return content if self.to is None else {**content, "to": self.to}


def read_state(store: Store) -> ImageState:
    """Where the image is. DamageError if the file is damaged or lost, PreconditionError if there is no image."""
    path = store.image / "state.json"
    try:
        content: dict[str, Any] = twice.STATE.read(store.image)
    except FileNotFoundError:
        if store.baseline is not None:
            raise DamageError(
                f"{path} is missing (offset 0): it says which boundary the image is at",
                "bring it back from a copy of the store that is as old as the image",
            ) from None
        raise PreconditionError(
            f"{path} is missing, there is no image", "pgcdp protect makes the first image"
        ) from None
    if content.get("state") not in ("baseline", "at", "moving"):
        raise DamageError(f"{path} holds no state of an image (offset 0)")
    return ImageState(**{key: value for key, value in content.items() if key in ImageState.__dataclass_fields__})


class Image:
    """The backup image of a set, by volume number. Not for several threads at once.

    Raises DamageError that names the image file, the offset and the block.
    """

    def __init__(self, store: Store, flags: int, state: ImageState) -> None:
        self.store = store
        self.state = state
        self._files: list[VolumeFiles] = []
        for volume in store.volumes:
            self._files.append(VolumeFiles(store.image, volume.number, volume.name, volume.bytes, flags))

    @classmethod
    def create(cls, store: Store, from_write: int) -> Image:
        """New sparse files that hold zeros, state "baseline" from `from_write` on."""
        image = cls(store, os.O_RDWR | os.O_CREAT | os.O_TRUNC, ImageState("baseline", from_write=from_write))
        for files in image._files:
            for fd, unit in ((files.fd, BLOCK), (files.sums_fd, files.guard.unit)):
                with naming(fd):
                    os.ftruncate(fd, files.blocks * unit)
        make_lock(store)
        sync_directory(store.image)
        image.set_baseline(0, {volume.name: 0 for volume in store.volumes})
        return image

    @classmethod
    def open(cls, store: Store, writable: bool = False, *, cut_short: bool = False) -> Image:
        """Open the image where its state says it is. PreconditionError if there is none, DamageError if cut short.

        With `cut_short` it is opened all the same; what is missing are damaged blocks then.
        """
        state = read_state(store)
        if writable:
            make_lock(store)
        try:
            image = cls(store, os.O_RDWR if writable else os.O_RDONLY, state)
        except FileNotFoundError as error:
            raise DamageError(f"{error.filename} is missing (offset 0)") from None
        for files in image._files if not cut_short else ():
            files.check_size()
        return image

    def _range(self, volume: int, block: int, count: int) -> VolumeFiles:
        if volume >= len(self._files):
            raise DamageError(f"volume {volume} is not one of the {len(self._files)} of {self.store.path}")
        files = self._files[volume]
        if block < 0 or count < 0 or block + count > files.blocks:
            raise DamageError(
                f"{files.path} has {files.blocks} blocks, {block} to {block + count - 1} are not among them"
            )
        return files

    def read_blocks(self, volume: int, block: int, count: int) -> bytes:
        """`count` blocks, each checked against its sum."""
        files = self._range(volume, block, count)
        data = read_all(files.fd, count * BLOCK, block * BLOCK)
        plain, wrong = files.guard.open(block, data, files.sums(block, count))
        wrong = _padded(wrong, count)
        if wrong.any():
            raise _damaged_block(files, block + int(np.flatnonzero(wrong)[0]))
        return plain

    def contents(
        self, volume: int, block: int, count: int, lost: Lost | None = None
    ) -> Iterator[tuple[int, int, bytes | None]]:
        """(first block, blocks, content or None for zeros) in order, in pieces of 1 MiB, all checked.

        Holes are not read: their sums must be zeros, which costs 8 bytes a block. With `lost`, which is told of each
        run of damaged blocks, these are left out.
        """
        files = self._range(volume, block, count)
        end = block + count
        while block < end:
            hole = self._hole(files, block, end) if end - block > PIECE_BLOCKS else 0
            if hole:
                step = min(hole, HOLE_BLOCKS)
                sums = files.sums(block, step)
                wrong = _padded(~is_zero(sums), step)
                for first, size, bad in _runs(wrong):
                    if not bad:
                        yield block + first, size, None
                        continue
                    at = block + first
                    damage = DamageError(
                        f"{files.path} has a hole where block {at} must be, at offset {at * BLOCK}", _HINT
                    )
                    if lost is None:
                        raise damage
                    lost(volume, at, size, damage)
            else:
                step = min(end - block, PIECE_BLOCKS)
                sums = files.sums(block, step)
                data, found = files.guard.open(block, read_all(files.fd, step * BLOCK, block * BLOCK), sums)
                wrong = _padded(found, step)
                for first, size, bad in _runs(wrong):
                    at = block + first
                    if not bad:
                        part = data[first * BLOCK : (first + size) * BLOCK]
                        yield from _split_zeros(at, part, is_zero(sums[first : first + size]))
                        continue
                    if lost is None:
                        raise _damaged_block(files, at)
                    lost(volume, at, size, _damaged_block(files, at))
            block += step

    def _hole(self, files: VolumeFiles, block: int, end: int) -> int:
        """Blocks from `block` on that lie in a hole."""
        try:
            data = os.lseek(files.fd, block * BLOCK, os.SEEK_DATA)
        except OSError:
            return end - block
        return min(end, data // BLOCK) - block

    def files(self, volume: int) -> VolumeFiles:
        """Paths and sizes of a volume's files."""
        return self._range(volume, 0, 0)

    def bad_blocks(self, volume: int, block: int, count: int) -> tuple[int, list[int]]:
        """Look at some blocks from `block` on, at most `count`: how many, and which of them are damaged."""
        files = self._range(volume, block, count)
        end = block + count
        hole = self._hole(files, block, end)
        if hole:
            step = min(hole, HOLE_BLOCKS)
            return step, (np.flatnonzero(_padded(~is_zero(files.sums(block, step)), step)) + block).tolist()
        step = min(count, PIECE_BLOCKS)
        _, wrong = files.guard.open(block, read_all(files.fd, step * BLOCK, block * BLOCK), files.sums(block, step))
        return step, (np.flatnonzero(_padded(wrong, step)) + block).tolist()

    def write_blocks(self, volume: int, block: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole blocks with their sums. Blocks that are all zeros become a hole."""
        if len(data) % BLOCK:
            raise BugError(f"{len(data)} bytes are no whole blocks")
        files = self._range(volume, block, len(data) // BLOCK)
        stored, sums = files.guard.close(block, data)
        if not is_zero(sums).all():
            write_all(files.fd, stored, block * BLOCK)
            files.steady.wrote(len(data))
        else:
            punch_hole(files.fd, block * BLOCK, len(data))
        files.put_sums(block, sums)

    def zero_blocks(self, volume: int, block: int, count: int) -> None:
        """Zeros by holes in image and sums; the memory needed does not depend on `count`."""
        files = self._range(volume, block, count)
        files.flush_sums()
        punch_hole(files.fd, block * BLOCK, count * BLOCK)
        unit = files.guard.unit
        if count >= 4096:
            punch_hole(files.sums_fd, block * unit, count * unit)
        else:
            write_all(files.sums_fd, bytes(count * unit), block * unit)

    def grow(self, volume: int, size: int) -> Store:
        """A volume is to become larger: its image is, durably, before anything can be written there. The store then."""
        if size > self.store.volumes[volume].bytes:
            self._files[volume].grow(size)
            self.store = self.store.with_bytes(volume, size)
        return self.store

    def sync(self) -> None:
        """Make blocks and sums durable."""
        for files in self._files:
            files.flush_sums()
            files.sync()

    def _set(self, state: ImageState) -> None:
        self.sync()
        twice.STATE.write(self.store.image, state.as_json())
        self.state = state

    def set_baseline(self, journal_write: int, copied: dict[str, int]) -> None:
        """Sync, then note how far the first copy is."""
        if self.state.state != "baseline":
            raise BugError(f"the image is at boundary {self.state.boundary}, its first copy is over")
        from_write = self.state.from_write
        self._set(ImageState("baseline", from_write=from_write, journal_write=journal_write, copied=dict(copied)))

    def set_at(self, boundary: int, write: int) -> None:
        """Sync, then say that the image equals production at this boundary."""
        self._set(ImageState("at", boundary=boundary, write=write))

    def set_moving(self, to: int) -> None:
        """Say that the image is on its way from the boundary it is at to the next one."""
        state = self.state
        if state.state == "moving" and state.to == to:
            return
        if state.state != "at" or to != state.boundary + 1:
            raise BugError(f"the image is {state.state} {state.boundary}, it cannot move to boundary {to}")
        self._set(ImageState("moving", boundary=state.boundary, write=state.write, to=to))

    def close(self) -> None:
        """Close the files. What was not synced since the last state is done again by whoever opens the image next.

        Harmless when done twice.
        """
        for files in self._files:
            files.close()


def add_volume(store: Store, volume: Volume) -> Store:
    """The store with one more volume that is all zeros at every boundary so far, durably. No agent may run."""
    files = VolumeFiles(store.image, volume.number, volume.name, volume.bytes, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        files.grow(volume.bytes)
    finally:
        files.close()
    sync_directory(store.image)
    return store.with_volume(volume)


def grow_volume(store: Store, number: int, size: int) -> Store:
    """The store with a larger volume, durably; what is new is zeros. No agent may run."""
    volume = store.volumes[number]
    files = VolumeFiles(store.image, volume.number, volume.name, volume.bytes, os.O_RDWR)
    try:
        files.grow(size)
    finally:
        files.close()
    return store.with_bytes(number, size)


def _damaged_block(files: VolumeFiles, block: int) -> DamageError:
    return DamageError(f"{files.path} has a damaged block {block} at offset {block * BLOCK}", _HINT)


def _padded(wrong: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """What is missing at the end, since a file was cut short, is wrong."""
    return np.concatenate([wrong, np.ones(length - len(wrong), dtype=np.bool_)]) if len(wrong) < length else wrong


def _runs(wrong: NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """(first, how many, whether wrong) of the runs of equal ones."""
    if not wrong.any():  # nearly always
        yield 0, len(wrong), False
        return
    edges = [0, *(np.flatnonzero(wrong[1:] != wrong[:-1]) + 1).tolist(), len(wrong)]
    for begin, end in pairwise(edges):
        yield begin, end - begin, bool(wrong[begin])


def _split_zeros(block: int, data: bytes, zero: NDArray[np.bool_]) -> Iterator[tuple[int, int, bytes | None]]:
    if not zero.any():
        yield block, len(zero), data
        return
    edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), len(zero)]
    for begin, end in pairwise(edges):
        yield block + begin, end - begin, None if zero[begin] else data[begin * BLOCK : end * BLOCK]
