"""A recovery point as volumes that are shown, not copied: the map is made, the engine serves it.

The image is held where it is while a view is opened. From then on it moves under the view: each time the agent first
gives it a map that does not need what the move changes (`make_way`). A view that does not take it is fenced.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.control import EngineBusy, EngineClient, EngineGone
from pgcdp.capture.engine import serving_view, start_view
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import write_all
from pgcdp.intervals.extents import forward_map
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, RecoveryPoint, Span
from pgcdp.recovery import blockmap
from pgcdp.recovery.blockmap import Step
from pgcdp.recovery.mapfile import PATCH, FramesSource, ImageSource, MapSource, ViewMap, encode
from pgcdp.recovery.merged import backward_layers
from pgcdp.recovery.patch import Patch
from pgcdp.recovery.source import Source
from pgcdp.sealing import data_key_of
from pgcdp.store.bundle import CONTENTS, Bundle
from pgcdp.store.open_views import Registered, registered

MAP_FILE, PATCH_FILE = "map", "patch"
FENCED_FILE = "fenced"
"""Beside the control socket of a view that was fenced: why."""


def make_map(source: Source, point: RecoveryPoint, place: Path) -> ViewMap:
    """The map of a recovery point. Call it `held`; `place` gets a patch where one is needed.

    Raises what `materialize` raises, except for damage in what only the view will read.
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
    back = [step.number for step in steps if step.kind == "backward"]
    spans = {interval.number: interval.span for interval in source.intervals()}
    layers = backward_layers(source.store, spans[back[-1]].first, back[0]) if back else []
    others = _Others(max(back, default=0) + 1)
    layers += [others.layer(*_opened(source, step, point)) for step in steps if step.kind != "backward"]
    of_patch = FramesSource(patch.path, PATCH, 0)
    layers += [others.layer(tail, of_patch), others.layer(blank, of_patch)]
    patch.finish()
    volumes = tuple(source.store.volumes)
    sources: list[MapSource] = [ImageSource(source.store.image / volume.name) for volume in volumes]
    extents, named = _numbered(blockmap.flatten(layers), len(sources))
    sources += [others.of(each) or _backward(source, spans.get(each, Span(each, each))) for each in named]
    blockmap.check(extents, [volume.bytes // BLOCK for volume in volumes])
    return ViewMap(source.store.set_id, volumes, tuple(range(len(volumes))), tuple(sources), extents)


class _Others:
    """Sources that are no backward increments, whose number is their interval's: numbered from `first` on."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._found: list[MapSource] = []

    def layer(self, extents: NDArray[np.void], source: MapSource) -> NDArray[np.void]:
        """An array EXTENT as a layer."""
        if source not in self._found:
            self._found.append(source)
        return blockmap.layer(extents, self._first + self._found.index(source))

    def of(self, number: int) -> MapSource | None:
        """None: it is an interval's."""
        return self._found[number - self._first] if number >= self._first else None


def _numbered(extents: NDArray[np.void], first: int) -> tuple[NDArray[np.void], list[int]]:
    """The extents with their sources numbered from `first` on, and which those are: what is hidden is not opened."""
    data = extents["kind"] == EXTENT_DATA
    named, number = np.unique(extents["source"][data], return_inverse=True)
    made = extents.copy()
    made["source"][data] = number + first
    return made, list(named.tolist())


def _backward(source: Source, span: Span) -> MapSource:
    return FramesSource(source.store.place(span) / "backward", CONTENTS["backward"], span.last)


def _opened(source: Source, step: Step, point: RecoveryPoint) -> tuple[NDArray[np.void], MapSource]:
    """What an interval's forward increment, or its writes up to the point, change, and where their bytes are."""
    bundle = source.opened(step.number)
    name = bundle.forward_file if step.kind == "forward" else "writes"
    if step.kind == "writes":
        bundle.need_writes()  # the listing may be of before they went
        index = bundle.index()
        extents = forward_map(index[index["number"] <= point.write])
    else:
        extents = bundle.forward_map()
    return extents, FramesSource(bundle.path / name, CONTENTS[name], step.number)


def moved_on(view: ViewMap, bundle: Bundle) -> ViewMap | None:
    """The map that shows the same when the image has moved by one more interval; None: this one needs nothing of it."""
    found = FramesSource(bundle.path / "backward", CONTENTS["backward"], bundle.number)
    sources = view.sources if found in view.sources else (*view.sources, found)
    backward = blockmap.within(bundle.backward_map(), [volume.bytes // BLOCK for volume in view.volumes])
    extents = blockmap.moved_on(view.extents, backward, sources.index(found))
    if len(extents) == len(view.extents):  # it only ever gets more
        return None
    blockmap.check(extents, [volume.bytes // BLOCK for volume in view.volumes])
    return replace(view, sources=sources, extents=extents)


def exchange(client: EngineClient, before: Path, view: ViewMap, timeout: float | None = None) -> None:
    """Give an open view another map than that in the file `before`. When this returns, nothing is read by that one.

    A map of another recovery point is made and exchanged while the image is held. Raises what the engine says,
    EngineBusy when it shows another map by now, PreconditionError when it does not answer in time; which of the two
    maps it then shows, its status tells.
    """
    file = before.with_name(f"{MAP_FILE}-{time.time_ns()}")
    _write_private(file, encode(view))
    try:
        client.request("reload", timeout=timeout, map=os.fspath(file), before=os.fspath(before))
    except PgcdpError as error:
        if isinstance(error, EngineBusy) or not isinstance(error, PreconditionError):  # else it may still be taken
            file.unlink(missing_ok=True)
        raise
    before.unlink(missing_ok=True)


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
    with ExitStack() as stack:
        with _known(source, point, place, progress) as (map_file, known):
            stack.callback(known.forget)
            key = data_key_of(source.store.path)
            client = stack.enter_context(serving_view(place, map_file, known.descriptor, cache, key))
        try:
            yield _files(source, place)
        except Exception as error:
            raise_found(client, error)
            raise
        if not forgive:
            raise_found(client, None)


def leave_open(
    source: Source, point: RecoveryPoint, place: Path, progress: Report = silent, *, cache: int | None = None
) -> list[Path]:
    """As `shown`, for good: it lives until `end_views` ends it."""
    place = place.resolve()
    with _known(source, point, place, progress) as (map_file, known):
        start_view(place, map_file, known.descriptor, cache, key=data_key_of(source.store.path))
    return _files(source, place)


@contextmanager
def _known(source: Source, point: RecoveryPoint, place: Path, progress: Report) -> Iterator[tuple[Path, Registered]]:
    """The map of a view that is known before the image can move again; start its engine inside."""
    with source.held() as descriptor:
        progress(Progress("opening the recovery point"))
        map_file = place / MAP_FILE
        _write_private(map_file, encode(make_map(source, point, place)))
        if source.journal is None and not source.store.has_agent():  # nothing is written into a store alone
            yield map_file, Registered(descriptor)
            return
        with registered(source.store, place / "control", point.write) as known:
            yield map_file, known


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
        fenced = why_fenced(client)
        if fenced is not None:
            raise PgcdpError(
                fenced,
                "run this again; where the machine is too busy for views, raise fence_after in the set's settings",
            ) from error
        raise PreconditionError(
            "the engine that showed the recovery point was killed", "run this again, and see the kernel's log"
        ) from error
    for found in _damage_first(status["errors"]):
        kind = DamageError if found["kind"] == "damage" else PgcdpError
        raise kind(found["message"], found["hint"] or None) from error


def problem(client: EngineClient) -> str | None:
    """What a view could not read or write, damage first, or why it was ended; None when nothing is known."""
    try:
        found = _damage_first(client.request("status", timeout=5.0)["errors"])
    except EngineGone:
        return why_fenced(client)
    except PreconditionError:  # too busy to answer in time
        return None
    return str(found[0]["message"]) if found else None


def why_fenced(client: EngineClient) -> str | None:
    """Why a view that has ended was fenced; None for one that was not."""
    try:
        return (client.control.parent / FENCED_FILE).read_text()
    except FileNotFoundError:
        return None


def _damage_first(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(errors, key=lambda found: found["kind"] != "damage")
