"""Intervals that follow each other as one: the boundaries between them go (FORMAT.md 3.10).

The backward increment of the joined one has of each block what the first of them found, the forward increment what the
last of them left. What transactions did stays whole; of single writes nothing is left but which WAL they completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.errors import BugError
from pgcdp.fsio import make_directory, publish_directory, read_file, sync_directory, write_file, write_json
from pgcdp.intervals.indexing import read_events
from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, Interval, Span
from pgcdp.recovery.blockmap import flatten, layer
from pgcdp.store.bundle import CONTENTS, EVENTS, Bundle
from pgcdp.store.frames import DEFAULT_LEVEL, FileSummary, FrameReader, FrameWriter, summary_of
from pgcdp.store.layout import Store
from pgcdp.store.thinning import Commit, Stop, Stopped, never
from pgcdp.store.transactions import (
    RELATIONS,
    TRANSACTIONS,
    WAL,
    read_transactions,
    read_wal,
    write_transactions,
    write_wal,
)

PIECE_BYTES = 1 << 20
_COUNTS = ("inserted", "updated", "deleted")


def join(
    store: Store, span: Span, level: int = DEFAULT_LEVEL, commit: Commit = nullcontext, stop: Stop = never
) -> Bundle:
    """Publish the intervals of a span as one, durably. What they were stays until it is removed, and counts no more.

    One process at a time; nothing may be there under its name in `Store.aside`. Raises DamageError when what it reads
    is damaged, Stopped when `stop` says so, and has changed nothing that counts then. Needs memory for the maps, 32
    bytes an extent.
    """
    parts = [Bundle.at(store, each) for each in store.spans() if span.first <= each.first and each.last <= span.last]
    _check_parts(parts, span)
    work = store.aside / span.file_name
    make_directory(work)
    increments, blocks = _increments(store, parts, work, level, stop)
    files = {made.name: made.entry() for made in increments}
    files |= {made.name: made.entry() for made in _transactions(parts, work)}
    for name, bundle in (("settings.json", parts[-1]), (RELATIONS, _newest_with(parts, RELATIONS))):
        if bundle is not None:
            bundle.check_file(name)
            write_file(work / name, read_file(bundle.path / name))
            files[name] = summary_of(work / name).entry()
    write_json(work / "manifest.json", _manifest(store, parts, files, span, blocks))
    make_directory(store.joined)
    with commit():
        publish_directory(work, store.place(span))
    sync_directory(store.path)
    return Bundle.at(store, span)


def _check_parts(parts: Sequence[Bundle], span: Span) -> None:
    ends = [span.first - 1, *(part.number for part in parts)]
    begins = [*(part.interval.first - 1 for part in parts), span.last]
    if ends != begins:
        raise BugError(f"the intervals {span.file_name} do not follow each other")


def _newest_with(parts: Sequence[Bundle], name: str) -> Bundle | None:
    return next((part for part in reversed(parts) if part.has(name)), None)


# --- increments


def _increments(
    store: Store, parts: Sequence[Bundle], work: Path, level: int, stop: Stop
) -> tuple[list[FileSummary], int]:
    """Contents and maps of both increments, synced, and how many blocks they name."""
    backward = flatten([layer(part.backward_map(), at) for at, part in reversed(list(enumerate(parts)))])
    forward = flatten([layer(part.forward_map(), at) for at, part in enumerate(parts)])
    made = []
    for name, extents, open_of in (("backward", backward, Bundle.backward), ("forward", forward, Bundle.forward)):
        with _writer(store, parts[-1], work, name, level) as writer:
            table = _copy(extents, parts, open_of, writer, stop)
            made.append(writer.finish())
        with _writer(store, parts[-1], work, f"{name}.map", level) as writer:
            writer.append(table.tobytes())
            made.append(writer.finish())
    return made, int(backward["count"].sum())


@contextmanager
def _writer(store: Store, last: Bundle, work: Path, name: str, level: int) -> Iterator[FrameWriter]:
    writer = FrameWriter.create(work / name, CONTENTS[name], store.set_id, last.number, level=level)
    try:
        yield writer
    finally:
        writer.close()


def _copy(
    extents: NDArray[np.void], parts: Sequence[Bundle], open_of: Callable[[Bundle], FrameReader], writer: FrameWriter,
    stop: Stop,
) -> NDArray[np.void]:  # fmt: skip
    """Copy what a map over `parts` names, part by part in the order of each one's stream: each frame is read once.

    Returns the map over the copy.
    """
    table = np.zeros(len(extents), dtype=EXTENT)
    for name in ("block", "count", "volume", "kind"):
        table[name] = extents[name]
    data = np.flatnonzero(extents["kind"] == EXTENT_DATA)
    data = data[np.lexsort((extents["position"][data], extents["source"][data]))]
    at = 0
    while at < len(data):
        source = int(extents["source"][data[at]])
        end = at + int(np.searchsorted(extents["source"][data[at:]], source, side="right"))
        with open_of(parts[source]) as content:
            for row in data[at:end].tolist():
                table["source"][row] = writer.length
                for begin, length in _pieces(int(extents["position"][row]), int(extents["count"][row]) * BLOCK):
                    if stop():
                        raise Stopped
                    writer.append(content.read(begin, length))
        at = end
    return table


def _pieces(begin: int, length: int) -> Iterator[tuple[int, int]]:
    for done in range(0, length, PIECE_BYTES):
        yield begin + done, min(PIECE_BYTES, length - done)


# --- what transactions did


def _transactions(parts: Sequence[Bundle], work: Path) -> list[FileSummary]:
    """Transaction index, WAL and events of all of them, one behind the other; none where they are not indexed."""
    if parts[0].transactions is None:
        return []
    for part in parts:
        for name in (EVENTS, TRANSACTIONS, WAL):
            part.check_file(name)
    table = pa.concat_tables([read_transactions(part.path) for part in parts]).unify_dictionaries().combine_chunks()
    wal = np.concatenate([read_wal(part.path) for part in parts])
    said = [read_events(part.path) for part in parts]
    events = [event for each in said for event in each["events"]]
    write_json(work / EVENTS, {"events": events, "tables": _summed([row for each in said for row in each["tables"]])})
    return [write_transactions(work, table), write_wal(work, wal), summary_of(work / EVENTS)]


def _summed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was done to each table under each of its names."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = repr([row[name] for name in sorted(row) if name not in (*_COUNTS, "flags")])
        if key not in found:
            found[key] = dict(row)
            continue
        for name in _COUNTS:
            found[key][name] += row[name]
        found[key]["flags"] |= row["flags"]
    return list(found.values())


def summed_up(said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the manifests of several intervals say of their transactions, as one."""
    with_some = [each for each in said if each["count"]]
    found: dict[str, Any] = {name: sum(each[name] for each in said) for name in ("marks", "lost", "count")}
    found["wal_to"] = max(each["wal_to"] for each in said)
    if with_some:
        if all("committed" in each for each in with_some):
            found["committed"] = sum(each["committed"] for each in with_some)
        for name in with_some[0]:
            if name.startswith(("min_", "max_")):
                found[name] = (min if name.startswith("min_") else max)(each[name] for each in with_some)
    return found


# --- the manifest


def lacking(parts: Sequence[Interval]) -> list[tuple[str, str]] | None:
    """What any of several intervals lacks; None when that is nothing, but was not known of all."""
    found = sorted({each for part in parts for each in part.outside or ()})
    return None if not found and any(part.outside is None for part in parts) else found


def _manifest(store: Store, parts: Sequence[Bundle], files: dict[str, Any], span: Span, blocks: int) -> dict[str, Any]:
    intervals = [part.interval for part in parts]
    first, last = intervals[0], intervals[-1]
    said = [part.transactions for part in parts if part.transactions is not None]
    return {
        "format": 1,
        "set": store.set_name,
        "set_id": store.set_id.hex(),
        "number": span.last,
        "covers": span.last - span.first + 1,
        "from_write": first.from_write,
        "to_write": last.to_write,
        "from_time_ns": min(each.from_time_ns for each in intervals),
        "to_time_ns": max(each.to_time_ns for each in intervals),
        "boundary": last.boundary._asdict(),
        "writes": sum(each.writes for each in intervals),
        "bytes_written": sum(each.bytes_written for each in intervals),
        "blocks_changed": blocks,
        "restorable_by_write": False,
        "stored": {
            "writes": 0,
            "backward": files["backward"]["bytes"] + files["backward.map"]["bytes"],
            "forward": files["forward"]["bytes"] + files["forward.map"]["bytes"],
            "index": 0,
            "transactions": sum(
                entry["bytes"] for name, entry in files.items() if name.endswith(".parquet") or name == EVENTS
            ),
        },
        "transactions": summed_up(said) if said else None,
        **({"rewinds": [asdict(each) for part in intervals for each in part.rewinds]} if first.rewinds else {}),
        **({"gaps": [asdict(each) for part in intervals for each in part.gaps]} if first.gaps else {}),
        "outside": lacking(intervals),
        "files": files,
        "increments": {
            "backward": files["backward"]["checksum"],
            "backward_map": files["backward.map"]["checksum"],
            "forward": files["forward"]["checksum"],
            "forward_map": files["forward.map"]["checksum"],
            "blocks": blocks,
        },
    }
