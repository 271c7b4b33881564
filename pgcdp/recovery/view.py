"""A recovery point as volumes that are shown, not copied: the map is made, the engine serves it.

While a view is open the image is held where it is, by this process and by the engine, so that it is let go when the
last of the two has ended, however it ends. Intervals go on being published meanwhile; they do not change what the map
names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.engine import EngineClient, EngineGone, serving_view, start_view
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import write_all
from pgcdp.intervals.extents import forward_map
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import BLOCK, EXTENT, RecoveryPoint
from pgcdp.recovery import blockmap
from pgcdp.recovery.blockmap import Step
from pgcdp.recovery.mapfile import PATCH, FramesSource, ImageSource, MapSource, ViewMap, encode
from pgcdp.recovery.patch import Patch
from pgcdp.recovery.source import Source
from pgcdp.store.bundle import CONTENTS, Bundle

MAP_FILE, PATCH_FILE = "map", "patch"


def make_map(source: Source, point: RecoveryPoint, place: Path) -> ViewMap:
    """The map of a recovery point. Call it `held`; `place` gets a patch where one is needed.

    Raises what `Source.materialize` raises, except for damage in what only the view will read.
    """
    state = source.image_state()
    patch = Patch(place / PATCH_FILE, source.store.set_id)

    def look() -> tuple[list[Step], NDArray[np.void]]:
        steps, reached = blockmap.plan(state.boundary, state.write, state.to, source.intervals(), point.write)
        if reached < point.write:
            return steps, patch.take_tail(source, reached, point.write)
        return steps, np.empty(0, dtype=EXTENT)

    steps, tail = source.again(look)
    blank = patch.take_blank(source, point)
    sources: list[MapSource] = [ImageSource(source.store.image / volume.name) for volume in source.store.volumes]
    layers = [_layer(source, step, point, sources) for step in steps]
    layers += [blockmap.layer(tail, len(sources)), blockmap.layer(blank, len(sources))]
    if patch.finish():
        sources.append(FramesSource(patch.path, PATCH, 0))
    extents = blockmap.flatten(layers)
    volumes = tuple(source.store.volumes)
    blockmap.check(extents, [volume.bytes // BLOCK for volume in volumes])
    return ViewMap(source.store.set_id, volumes, tuple(range(len(volumes))), tuple(sources), extents)


def _layer(source: Source, step: Step, point: RecoveryPoint, sources: list[MapSource]) -> NDArray[np.void]:
    bundle = Bundle.open(source.store, step.number)
    name = "backward" if step.kind == "backward" else "writes"
    found = FramesSource(bundle.path / name, CONTENTS[name], step.number)
    if found not in sources[-1:]:
        sources.append(found)
    if step.kind == "backward":
        extents = bundle.backward_map()
    elif step.kind == "forward":
        extents = bundle.forward_map()
    else:
        index = bundle.index()
        extents = forward_map(index[index["number"] <= point.write])
    return blockmap.layer(extents, len(sources) - 1)


@contextmanager
def shown(
    source: Source,
    point: RecoveryPoint,
    place: Path,
    progress: Report = silent,
    *,
    forgive: bool = False,
    cache: int | None = None,
) -> Iterator[list[Path]]:
    """The volumes at a recovery point, one file each in order of volume number; they can be written to.

    `place` is an empty directory of the caller's that has the map and what is written. Raises DamageError at the end
    when a byte that was read is not what was stored, whatever else was raised inside; with `forgive` only when
    something was.
    """
    place = place.resolve()
    with source.held() as descriptor:
        map_file = _write_map(source, point, place, progress)
        with serving_view(place, map_file, descriptor, cache) as client:
            try:
                yield _files(source, place)
            except Exception as error:
                raise_found(client, error)
                raise
            if not forgive:
                raise_found(client, None)


def leave_open(
    source: Source, point: RecoveryPoint, place: Path, progress: Report = silent, *, cache: int | None = None
) -> tuple[int, list[Path]]:
    """As `shown`, for good: the engine's process id, and the files. It lives until `end_views` ends it."""
    place = place.resolve()
    with source.held() as descriptor:
        _, pid = start_view(place, _write_map(source, point, place, progress), descriptor, cache)
    return pid, _files(source, place)


def _write_map(source: Source, point: RecoveryPoint, place: Path, progress: Report) -> Path:
    progress(Progress("opening the recovery point"))
    map_file = place / MAP_FILE
    _write_private(map_file, encode(make_map(source, point, place)))
    return map_file


def _files(source: Source, place: Path) -> list[Path]:
    return [place / "fuse" / volume.name for volume in source.store.volumes]


def _write_private(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, content, 0)
    finally:
        os.close(fd)


def raise_found(client: EngineClient, error: Exception | None) -> None:
    """Raise for what the engine could not read or write, or for its death: what failed above it failed for that."""
    try:
        status = client.request("status")
    except EngineGone:
        raise PreconditionError(
            "the engine that showed the recovery point was killed", "run this again, and see the kernel's log"
        ) from error
    for found in sorted(status["errors"], key=lambda found: found["kind"] != "damage"):
        kind = DamageError if found["kind"] == "damage" else PgcdpError
        raise kind(found["message"], found["hint"] or None) from error
