"""Increments, writes and runs of the journal applied to an image or to plain files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.journal import BatchRun
from pgcdp.errors import DamageError
from pgcdp.fsio import punch_hole, write_all
from pgcdp.intervals.extents import forward_map, spans
from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, INDEX, Kind
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import Lost

PIECE_BLOCKS = 256
"""So many blocks are read and written at once."""


class BlockTarget(Protocol):
    """What increments and writes can be applied to: an `Image`, or a `FileTarget`."""

    def write_blocks(self, volume: int, block: int, data: bytes) -> None:
        """Write whole blocks."""

    def zero_blocks(self, volume: int, block: int, count: int) -> None:
        """Make blocks read back as zeros."""


class FileTarget:
    """Plain files or devices, one open descriptor a volume in order of volume number. The caller syncs and closes."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds

    def write_blocks(self, volume: int, block: int, data: bytes) -> None:
        """Write whole blocks."""
        write_all(self._fds[volume], data, block * BLOCK)

    def zero_blocks(self, volume: int, block: int, count: int) -> None:
        """Make blocks read back as zeros, by a hole where that can be."""
        punch_hole(self._fds[volume], block * BLOCK, count * BLOCK)


def apply_backward(target: BlockTarget, bundle: Bundle, lost: Lost | None = None) -> None:
    """Take the changed blocks of a state at boundary n back to boundary n-1. `lost`: as of `apply_extents`."""
    with bundle.backward() as content:
        apply_extents(target, bundle.backward_map(), content, lost)


def apply_forward(target: BlockTarget, bundle: Bundle, lost: Lost | None = None) -> None:
    """Bring the changed blocks of a state at boundary n-1 forward to boundary n. `lost`: as of `apply_extents`."""
    with bundle.forward() as content:
        apply_extents(target, bundle.forward_map(), content, lost)


def apply_writes(
    target: BlockTarget, index: NDArray[np.void], writes: FrameReader, upto_write: int, lost: Lost | None = None
) -> None:
    """Bring a state before the first write of `index` to just behind `upto_write`, each block once.

    `lost`: as of `apply_extents`.
    """
    apply_extents(target, forward_map(index[index["number"] <= upto_write]), writes, lost)


def replay_writes(target: BlockTarget, index: NDArray[np.void], writes: FrameReader, upto_write: int) -> None:
    """The same by every write in order."""
    rows = index[(index["number"] <= upto_write) & (index["length"] > 0)]
    columns = [rows[name].tolist() for name in ("kind", "volume", "offset", "length", "position")]
    for kind, volume, offset, length, position in zip(*columns, strict=True):
        if kind == Kind.WRITE:
            target.write_blocks(volume, offset // BLOCK, writes.read(position, length))
        elif kind in (Kind.ZERO, Kind.DISCARD):
            target.zero_blocks(volume, offset // BLOCK, length // BLOCK)


def apply_extents(
    target: BlockTarget, extents: NDArray[np.void], content: FrameReader, lost: Lost | None = None
) -> None:
    """Write what a map says: zeros first, then data in the order of its stream, so that each frame is read once.

    With `lost`, which is told of each block whose data is damaged, these are left out instead of raising.
    """
    zeros = extents[extents["kind"] == EXTENT_ZEROS]
    for volume, block, count in spans(zeros):
        target.zero_blocks(volume, block, count)
    data = extents[extents["kind"] == EXTENT_DATA]
    for volume, block, count, source in _pieces(data[np.argsort(data["source"], kind="stable")]):
        try:
            target.write_blocks(volume, block, content.read(source, count * BLOCK))
        except DamageError:
            if lost is None:
                raise
            _apply_whole(target, volume, block, count, source, content, lost)


def _apply_whole(
    target: BlockTarget, volume: int, block: int, count: int, source: int, content: FrameReader, lost: Lost
) -> None:
    """Of a piece that lies in several frames, one of them damaged, what is in the others."""
    for at in range(count):
        try:
            data = content.read(source + at * BLOCK, BLOCK)
        except DamageError as damage:
            lost(volume, block + at, 1, damage)
        else:
            target.write_blocks(volume, block + at, data)


def apply_run(target: BlockTarget, run: BatchRun, limits: Sequence[int] | None = None) -> None:
    """Apply a run of the journal, each block once; of volume v only the blocks before `limits[v]`, if given."""
    for extent in forward_map(run_index(run)):
        volume, block, count = int(extent["volume"]), int(extent["block"]), int(extent["count"])
        if limits is not None:
            count = min(count, limits[volume] - block)
        if count <= 0:
            continue
        if extent["kind"] == EXTENT_ZEROS:
            target.zero_blocks(volume, block, count)
        else:
            begin = int(extent["source"])
            target.write_blocks(volume, block, run.data[begin : begin + count * BLOCK].tobytes())


def run_index(run: BatchRun) -> NDArray[np.void]:
    """An array INDEX of a run, with positions in its `data`."""
    index = np.zeros(len(run), dtype=INDEX)
    for name in run.records.dtype.names or ():
        index[name] = run.records[name]
    index["position"] = run.data_offsets
    return index


def _pieces(extents: NDArray[np.void]) -> Iterator[tuple[int, int, int, int]]:
    columns = [extents[name].tolist() for name in ("volume", "block", "count", "source")]
    for volume, block, count, source in zip(*columns, strict=True):
        for done in range(0, count, PIECE_BLOCKS):
            yield volume, block + done, min(PIECE_BLOCKS, count - done), source + done * BLOCK
