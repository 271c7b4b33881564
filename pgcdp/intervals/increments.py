"""Closing an interval: its two increments, and the image brought to its end.

The forward increment is a map into the interval's own writes; the backward increment is the content that the same
blocks have in the image, which stands at boundary n-1 until `move_image`. Everything here may be killed at any point
and done again: increments are made anew until the interval is published, and a move writes contents that do not
depend on what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.filemap import FileMap
from pgcdp.capture.journal import BatchRun
from pgcdp.errors import BugError
from pgcdp.fsio import punch_hole, write_all
from pgcdp.intervals.extents import forward_map, spans
from pgcdp.intervals.indexing import Behind, Start, index_files, index_interval
from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, EXTENT_ZEROS, INDEX, Boundary, Kind
from pgcdp.store.bundle import Bundle, Increments, publish
from pgcdp.store.frames import FileSummary, FrameReader, FrameWriter
from pgcdp.store.image import Image
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval

__all__ = [
    "BlockTarget",
    "FileTarget",
    "Mode",
    "apply_backward",
    "apply_extents",
    "apply_forward",
    "apply_run",
    "apply_writes",
    "close_interval",
    "forward_map",
    "move_image",
    "replay_writes",
    "spans",
]

Mode = Literal["optimal", "replay"]
PIECE_BLOCKS = 256
_MAX_COUNT = 1 << 31


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


class _MapBuilder:
    """Extents of a backward map as they come, joined where they follow each other."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int, int, int]] = []

    def add(self, volume: int, block: int, count: int, kind: int, source: int) -> None:
        if self.rows:
            begin, size, last_volume, last_kind, last_source, _ = self.rows[-1]
            follows = begin + size == block and last_volume == volume and last_kind == kind
            if (
                follows
                and size + count <= _MAX_COUNT
                and (kind == EXTENT_ZEROS or last_source + size * BLOCK == source)
            ):
                self.rows[-1] = (begin, size + count, volume, kind, last_source, 0)
                return
        self.rows.append((block, count, volume, kind, source, 0))

    def table(self) -> NDArray[np.void]:
        return np.array(self.rows, dtype=EXTENT)


def _write_map(path_of: OpenInterval, name: str, content: bytes, set_id: bytes, table: NDArray[np.void]) -> FileSummary:
    writer = FrameWriter.create(path_of.path / name, content, set_id, path_of.number)
    writer.append(table.tobytes())
    return writer.finish()


def build_increments(interval: OpenInterval, image: Image) -> Increments:
    """Write `forward.map`, `backward` and `backward.map` beside the interval's writes, finished and synced.

    The image must be at the boundary where the interval begins; every block is checked on its way. Needs memory for
    the map (32 bytes an extent) and 1 MiB of content.
    """
    state = image.state
    if state.state != "at" or state.boundary != interval.number - 1 or state.write != interval.from_write - 1:
        raise BugError(
            f"the image is {state.state} {state.boundary} (write {state.write}), "
            f"interval {interval.number} begins with write {interval.from_write}"
        )
    set_id = image.store.set_id
    forward = forward_map(interval.index())
    forward_file = _write_map(interval, "forward.map", b"FMAP", set_id, forward)
    content = FrameWriter.create(interval.path / "backward", b"BWRD", set_id, interval.number)
    built = _MapBuilder()
    blocks = 0
    try:
        for volume, block, count in spans(forward):
            blocks += count
            for first, size, data in image.contents(volume, block, count):
                if data is None:
                    built.add(volume, first, size, EXTENT_ZEROS, 0)
                else:
                    built.add(volume, first, size, EXTENT_DATA, content.append(data))
        backward_file = content.finish()
    finally:
        content.close()
    map_file = _write_map(interval, "backward.map", b"BMAP", set_id, built.table())
    return Increments(backward_file, map_file, forward_file, blocks, forward)


def close_interval(
    store: Store,
    interval: OpenInterval,
    image: Image,
    boundary: Boundary,
    settings: dict[str, Any],
    start: Callable[[], Start] | None = None,
    behind: Behind | None = None,
    maps: tuple[FileMap | None, FileMap] | None = None,
) -> Bundle:
    """End an interval at its last write: finish its streams, build both increments, index it, publish it (truth 5).

    `start`: where its WAL is read from; None: it gets no transaction index. `behind`: as `index_interval`. `maps`: of
    files, as the filesystems were at the boundary before (None: not known) and at this one; None: nothing is said of
    files.
    The image is read, not moved. After a kill open the interval again and call this again with its `boundary`.
    """
    if interval.boundary is None:
        interval.set_boundary(boundary)
    streams = interval.finish()
    increments = build_increments(interval, image)
    indexed = index_interval(interval, boundary, start, behind) if start else None
    owned = index_files(interval, increments.forward, *maps) if maps else None
    return publish(store, interval, boundary, streams, increments, settings, indexed, owned)


def move_image(image: Image, bundle: Bundle, mode: Mode = "optimal", said: Callable[[], None] = lambda: None) -> None:
    """Bring the image from boundary n-1 to n with interval n, durably; nothing happens if it is there already.

    "optimal" writes each block once with its last content, "replay" every write in order; same bytes. Restartable.
    `said` is called when the image's state says durably that it is moving.
    """
    boundary = bundle.interval.boundary
    if image.state.state == "at" and image.state.boundary == boundary.number:
        return
    image.set_moving(boundary.number)
    said()
    if mode == "optimal":
        apply_forward(image, bundle)
    else:
        with bundle.writes() as writes:
            replay_writes(image, bundle.index(), writes, boundary.write)
    image.set_at(boundary.number, boundary.write)


def apply_backward(target: BlockTarget, bundle: Bundle) -> None:
    """Take the changed blocks of a state at boundary n back to boundary n-1."""
    with bundle.backward() as content:
        apply_extents(target, bundle.backward_map(), content)


def apply_forward(target: BlockTarget, bundle: Bundle) -> None:
    """Bring the changed blocks of a state at boundary n-1 forward to boundary n."""
    with bundle.writes() as content:
        apply_extents(target, bundle.forward_map(), content)


def apply_writes(target: BlockTarget, index: NDArray[np.void], writes: FrameReader, upto_write: int) -> None:
    """Bring a state before the first write of `index` to just behind `upto_write`, each block once."""
    apply_extents(target, forward_map(index[index["number"] <= upto_write]), writes)


def replay_writes(target: BlockTarget, index: NDArray[np.void], writes: FrameReader, upto_write: int) -> None:
    """The same by every write in order."""
    rows = index[(index["number"] <= upto_write) & (index["length"] > 0)]
    columns = [rows[name].tolist() for name in ("kind", "volume", "offset", "length", "position")]
    for kind, volume, offset, length, position in zip(*columns, strict=True):
        if kind == Kind.WRITE:
            target.write_blocks(volume, offset // BLOCK, writes.read(position, length))
        elif kind in (Kind.ZERO, Kind.DISCARD):
            target.zero_blocks(volume, offset // BLOCK, length // BLOCK)


def apply_extents(target: BlockTarget, extents: NDArray[np.void], content: FrameReader) -> None:
    """Write what a map says: zeros first, then data in the order of its stream, so that each frame is read once."""
    zeros = extents[extents["kind"] == EXTENT_ZEROS]
    for volume, block, count in spans(zeros):
        target.zero_blocks(volume, block, count)
    data = extents[extents["kind"] == EXTENT_DATA]
    for volume, block, count, source in _pieces(data[np.argsort(data["source"], kind="stable")]):
        target.write_blocks(volume, block, content.read(source, count * BLOCK))


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
