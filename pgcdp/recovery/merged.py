"""Merged increments: the backward increments of 16, 256, 4096, ... intervals as one map each (FORMAT.md 3.9).

A point n intervals back needs n backward increments; with these it reads at most thirty maps for each digit that n has
to the base of 16. They only say in which interval's increment a block's content is, so nothing is copied, and all of
them are expendable: what is missing or damaged is made of what lies below it. The agent makes them in the background.

What retention has joined is one interval and a layer of its own: what is merged never reaches over one. A merged
increment of the intervals that it was made of names files that go, and is of no use any more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

import numpy as np

from pgcdp.errors import DamageError
from pgcdp.fsio import make_directory, sync_directory
from pgcdp.records import MAP_EXTENT, Span
from pgcdp.recovery.blockmap import Extents, flatten, layer
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameReader, FrameWriter
from pgcdp.store.layout import Store, spans_in

log = logging.getLogger(__name__)

FANOUT = 16
CONTENT = b"MRGD"
_FIRST = np.dtype("<u8")


def cover(first: int, last: int, merged: Collection[Span], fanout: int) -> list[Span]:
    """Pure: spans that together are intervals `first` to `last`, the last ones first; each single or among `merged`."""
    found = []
    while last >= first:
        chosen, size = Span(last, last), fanout
        while last % size == 0 and last - size + 1 >= first:
            if Span(last - size + 1, last) in merged:
                chosen = Span(last - size + 1, last)
            size *= fanout
        found.append(chosen)
        last = chosen.first - 1
    return found


def due(oldest: int, newest: int, merged: Collection[Span], fanout: int) -> Iterator[Span]:
    """Pure: the spans that should be merged of what is stored and are not, small ones first."""
    size = fanout
    while size <= newest:
        for last in range(size, newest + 1, size):
            span = Span(last - size + 1, last)
            if span.first >= oldest and span not in merged:
                yield span
        size *= fanout


def known(store: Store) -> set[Span]:
    """The spans that were merged."""
    return spans_in(store.merged)


def stale(store: Store, merged: Collection[Span]) -> set[Span]:
    """Of merged spans those that hold an interval which retention joined or let go of."""
    base = store.base_number()
    gone = [*([Span(1, base)] if base else []), *store.joined_spans()]
    return {span for span in merged if any(span.first <= each.last and each.first <= span.last for each in gone)}


def backward_layers(store: Store, first: int, last: int) -> list[Extents]:
    """The backward increments of intervals `first` to `last` as layers, the lowest first; `source` is the interval.

    `last` ends an interval and `first` is the first one of one. Raises what `Bundle` raises.
    """
    joined = {span.last: span for span in store.joined_spans()}
    ends = sorted(number for number, span in joined.items() if first <= number <= last)
    merged, found = known(store), list[Extents]()
    while last >= first:
        single = ends[-1] if ends else first - 1
        found += _layers(store, single + 1, last, merged)
        if ends:
            span = joined[ends.pop()]
            found.append(layer(Bundle.at(store, span).backward_map(), span.last))
            single = span.first - 1
        last = single
    return found


def _layers(store: Store, first: int, last: int, merged: Collection[Span]) -> list[Extents]:
    """The same of single intervals."""
    found: list[Extents] = []
    for span in cover(first, last, merged, FANOUT):
        if span.first == span.last:
            found.append(layer(Bundle.at(store, span).backward_map(), span.last))
            continue
        try:
            found.append(_read(store, span))
        except (DamageError, OSError) as error:
            log.warning("a merged increment is made anew: %s", getattr(error, "message", error))
            with suppress(OSError):
                (store.merged / span.file_name).unlink()
            found += _layers(store, span.first, span.last, set(merged) - {span})
    return found


def _read(store: Store, span: Span) -> Extents:
    path = store.merged / span.file_name
    with FrameReader.open(path, CONTENT, store.set_id, span.last) as reader:
        content = reader.read_stream()
    told = Span(int.from_bytes(content[: _FIRST.itemsize], "little"), span.last)
    if told != span or (len(content) - _FIRST.itemsize) % MAP_EXTENT.itemsize:
        raise DamageError(f"{path} is not of the intervals in its name")
    return np.frombuffer(content, dtype=MAP_EXTENT, offset=_FIRST.itemsize)


def check(
    store: Store, full: bool, pace: Callable[[int], None] = lambda size: None
) -> tuple[int, int, list[DamageError]]:
    """How many merged increments there are, the bytes that were read of them, and what is wrong with them.

    Without `full` only that their frames are where they should be. `pace` is told of the bytes of each frame.
    """
    count, size, damages = 0, 0, []
    for span in sorted(known(store)):
        path = store.merged / span.file_name
        try:
            with FrameReader.open(path, CONTENT, store.set_id, span.last) as reader:
                for _, raw in reader.frames() if full else ():
                    size += len(raw)
                    pace(len(raw))
        except FileNotFoundError:  # a reader found it damaged just now
            continue
        except DamageError as damage:
            damages.append(damage)
        count += 1
    return count, size, damages


def merge(store: Store, span: Span) -> None:
    """Merge the backward increments of a span, durably. Needs memory for its map, 32 bytes an extent."""
    make_directory(store.merged)
    extents = flatten(_layers(store, span.first, span.last, known(store) - {span}))
    path = store.merged / span.file_name
    fresh = path.with_name(f".{path.name}.new")
    writer = FrameWriter.create(fresh, CONTENT, store.set_id, span.last)
    try:
        writer.append(np.array([span.first], dtype=_FIRST).tobytes() + extents.tobytes())
        writer.finish()
    finally:
        writer.close()
    os.rename(fresh, path)
    sync_directory(store.merged)


def merge_due(store: Store, stop: Callable[[], bool] = lambda: False) -> int:
    """Merge what is due until it is done or `stop` says so; how many.

    Raises DamageError for what could not be merged, after all the rest.
    """
    spans = store.spans()
    done, damages = 0, []
    wanted = list(due(spans[0].first, spans[-1].last, known(store), FANOUT)) if spans else []
    without = stale(store, wanted)
    for span in wanted:
        if stop():
            break
        if span in without:
            continue
        try:
            merge(store, span)
            done += 1
        except DamageError as damage:
            damages.append(damage)
    if damages:
        raise damages[0]
    return done
