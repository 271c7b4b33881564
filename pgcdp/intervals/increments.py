"""Closing an interval: its two increments, and the image brought to its end.

The forward increment is a map into the interval's own writes; the backward increment is the content that the same
blocks have in the image, which stands at boundary n-1 until `move_image`. Everything here may be killed at any point
and done again: increments are made anew until the interval is published, and a move writes contents that do not
depend on what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.filemap import FileMap
from pgcdp.errors import BugError
from pgcdp.intervals.applying import apply_forward, replay_writes
from pgcdp.intervals.extents import forward_map, spans
from pgcdp.intervals.indexing import Behind, Start, index_files, index_interval
from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, EXTENT_ZEROS, Boundary
from pgcdp.store.bundle import Bundle, Increments, publish
from pgcdp.store.frames import FileSummary, FrameWriter
from pgcdp.store.image import Image
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval

Mode = Literal["optimal", "replay"]
_MAX_COUNT = 1 << 31


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
