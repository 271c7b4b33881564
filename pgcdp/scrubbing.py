"""The use case of scrubbing: all of a store read by a command, or by the agent; and what is known of the last time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pgcdp.errors import PgcdpError
from pgcdp.progress import Progress, Report
from pgcdp.recovery import merged
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.damage import Damage
from pgcdp.store.layout import Store
from pgcdp.store.mirroring import what_differs
from pgcdp.store.scrub import ScrubReport, check_store
from pgcdp.store.scrub_record import Record, read_record
from pgcdp.store.scrubbing import Pace, Pass, scrub
from pgcdp.units import format_duration, format_size, format_time

Json = dict[str, Any]

SCRUB = "scrub"
"""The event in the history: {"event", "by", "began", "damages", "files"}; `files` are at most FILES of the damaged."""
FILES = 20
LATE = 2.0
"""So many periods after the last scrub it is told that none came."""


@dataclass(frozen=True, slots=True)
class Said:
    """A check of a store: a failure is damage. `warning`: nothing is lost, but it should be known."""

    name: str
    ok: bool
    detail: str
    hint: str | None = None
    warning: bool = False


def check(store: Store, full: bool, rate: int, progress: Report, *, remember: bool) -> Iterator[Said]:
    """Everything about a store alone. `full`: every byte is read, going on with a check that was killed.

    `rate`: bytes a second, 0 for as fast as it goes; `remember`: the outcome is kept in the store's history.
    """
    pace = Pace(rate)
    if full:
        done = scrub(store, "check", pace, lambda read, total: progress(Progress("reading the store", read, total)))
        if remember:
            remember_pass(store, done)
        damages, told = list(done.record.damages), _told(done)
    else:
        report = check_store(store, full=False)
        damages, told = report.damages, _read(report)
    for damage in damages:
        yield Said("store", False, f"{damage.file} at offset {damage.offset}: {damage.message}", damage.still)
    if not damages:
        yield Said("store", True, told)
    elif full:
        yield Said("scrub", True, told)
    yield _merged(store, full, pace)
    if full:
        yield from _catalog(store)


def _read(report: ScrubReport) -> str:
    lines = f", {report.timelines} timelines of rewinds" if report.timelines else ""
    return f"{report.files} files, {format_size(report.bytes_read)} read{lines}"


def _told(done: Pass) -> str:
    """What was read; where it went on, when an earlier one was killed."""
    told = _read(done.report)
    if done.gone_on is None:
        return told
    before = done.gone_on
    where = f"behind interval {before.interval}" if not before.block else f"at block {before.block} of the image"
    age = format_duration((time.time_ns() - before.began) / 1e9)
    return f"{told}, gone on {where} where a check was killed: its oldest part was read {age} ago"


def _merged(store: Store, full: bool, pace: Pace) -> Said:
    count, size, wrong = merged.check(store, full, pace)
    if not wrong:
        return Said("merged increments", True, f"{count} files, {format_size(size)} read")
    said = "; ".join(damage.message for damage in wrong)  # expendable: no point is lost by it
    told = f"{len(wrong)} of {count} are damaged and made anew when next needed: {said}"
    return Said("merged increments", True, told, warning=True)


def _catalog(store: Store) -> Iterator[Said]:
    """Whether the catalog says what the store's files say."""
    hint = "nothing is only in it; pgcdp rebuild makes it anew from the store"
    try:
        differs = what_differs(store)
    except PgcdpError as error:
        yield Said("catalog", False, error.message, error.hint or hint)
        return
    if not os.path.exists(catalog_file(store)):
        yield Said("catalog", True, "there is none: pgcdp rebuild makes it anew from the store")
    elif differs:
        yield Said("catalog", False, "; ".join(differs[:FILES]), hint)
    else:
        yield Said("catalog", True, "it says what the store says")


def remember_pass(store: Store, done: Pass) -> None:
    """Keep the outcome with the store."""
    record = done.record
    content: Json = {
        "event": SCRUB,
        "by": record.by,
        "began": format_time(record.began),
        "damages": len(record.damages),
        "files": [f"{each.file} at offset {each.offset}" for each in record.damages[:FILES]],
    }
    with suppress(PgcdpError, OSError):  # what was found is said all the same
        catalog = Catalog.open(store)
        try:
            catalog.remember("event", time.time_ns(), content)
        finally:
            catalog.close()


def is_due(record: Record, every: float | None, now_ns: int, since_ns: int) -> bool:
    """Pure: whether the agent shall scrub now: a pass is under way, or the last whole one began a period ago.

    `since_ns`: when the store began; before that nothing in it can be old.
    """
    if every is None:
        return False
    last = max(record.whole, since_ns)
    return record.under_way or now_ns - last >= every * 1e9 or last > now_ns


def status_json(store: Store, running: Callable[[], bool] = lambda: False) -> Json:
    """What is known of scrubs: docs/json.md, status."""
    record = read_record(store)
    return {
        "state": "running" if running() else "stopped" if record.under_way else "waiting" if record.whole else "never",
        "by": record.by if record.began else None,
        "began": _time(record.began),
        "ended": _time(record.ended),
        "oldest": _time(record.whole),
        "age_seconds": max(0.0, (time.time_ns() - record.whole) / 1e9) if record.whole else None,
        "bytes": record.bytes,
        "total": record.total,
        "interval": record.interval if record.under_way else None,
        "block": record.block if record.under_way else None,
        "damages": len(record.damages),
    }


def _time(ns: int) -> str | None:
    return format_time(ns) if ns else None


def known(store: Store, every: float | None) -> Iterator[Said]:
    """What the last scrub found, without reading anything."""
    record = read_record(store)
    for damage in record.damages:
        yield Said("scrub", False, _found(damage), damage.still)
    if record.damages:
        return
    if not record.whole:
        due = "the agent does it when it is that old" if every is not None else "scrub_every is never"
        yield Said("scrub", True, f"the store was not read as a whole yet: {due}, pgcdp check --full does it now")
        return
    age = (time.time_ns() - record.whole) / 1e9
    told = f"every part was read in the last {format_duration(age)}, and was whole"
    yield Said("scrub", True, told, warning=every is not None and age > LATE * every)


def _found(damage: Damage) -> str:
    return f"{damage.file} at offset {damage.offset}, when it was read last: {damage.message}"
