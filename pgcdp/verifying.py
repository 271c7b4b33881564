"""Prove recovery points: one, some at random, or each boundary as it is cut."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pgcdp.background import give_way
from pgcdp.errors import DamageError, PgcdpError, TargetError, UsageError
from pgcdp.opening import (
    Announce,
    between,
    binaries_of,
    open_source,
    point_json,
    point_of,
    production_places,
    remember,
    scratch_place,
)
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery import verify as proving
from pgcdp.recovery.left import naming_nearest
from pgcdp.recovery.scratch import elsewhere, mounted
from pgcdp.recovery.source import Source

Json = dict[str, Any]

LOOK_SECONDS = 1.0
"""How often a new boundary is looked for."""
TRIES = 3
RETRY_SECONDS = 10.0
"""Between them: a view that was fenced, or room that was lacking, is no verdict on the boundary."""


def verify(
    set_name: str | None,
    target: Target,
    *,
    sql_file: Path | None = None,
    store: Path | None = None,
    before: str | None = None,
    announce: Announce | None = None,
    progress: Report = silent,
) -> Json:
    """Start Postgres on the recovery point in a sandbox and run all checks."""
    source = open_source(set_name, store)
    point = point_of(source, target, before)
    if announce is not None:
        announce(between(source, point))
    result = prove(source, set_name, point, sql_file, progress)
    return {"ok": result["ok"], "results": [result]}


def verify_sample(
    set_name: str | None,
    count: int,
    *,
    sql_file: Path | None = None,
    store: Path | None = None,
    progress: Report = silent,
) -> Json:
    """The same for `count` writes chosen at random."""
    source = open_source(set_name, store)
    results = []
    for point in at_random(source, count):
        progress(Progress(f"write {point.write}"))
        results.append(prove(open_source(set_name, store), set_name, point, sql_file, progress))
    return {"ok": all(result["ok"] for result in results), "results": results}


def verify_boundaries(set_name: str, *, sql_file: Path | None = None, progress: Report = silent) -> Iterator[Json]:
    """The newest boundary, then each as it is cut, without end and giving way to all other work: parts of "results".

    A boundary that cannot be opened is tried `TRIES` times, then told as {"boundary", "not_proven": why}, and the next
    one's turn comes. One that retention let go of meanwhile is passed over. Raises PgcdpError when the store cannot be
    read.
    """
    give_way()
    done = max(open_source(set_name, None).store.interval_numbers(), default=0) - 1
    while True:
        behind = [number for number in open_source(set_name, None).store.interval_numbers() if number > done]
        if not behind:
            time.sleep(LOOK_SECONDS)
        for number in behind:
            told = _prove_boundary(set_name, number, sql_file, progress)
            if told is not None:
                yield told
            done = number


def _prove_boundary(set_name: str, number: int, sql_file: Path | None, progress: Report) -> Json | None:
    """An element of "results", or why there is none; None when there is no such boundary any more."""
    for tried in range(1, TRIES + 1):
        try:
            source = open_source(set_name, None)
            return prove(source, set_name, source.resolve(Target("boundary", number)), sql_file, progress)
        except TargetError as error:
            progress(Progress(f"boundary {number} is passed over: {error.message}"))
            return None
        except PgcdpError as error:
            problem = error
        if isinstance(problem, UsageError | DamageError) or tried == TRIES:
            break
        progress(Progress(f"boundary {number}: {problem.message}; trying again"))
        time.sleep(RETRY_SECONDS)
    return {"boundary": number, "not_proven": problem.message}


def prove(
    source: Source,
    set_name: str | None,
    point: RecoveryPoint,
    sql_file: Path | None = None,
    progress: Report = silent,
) -> Json:
    """Start Postgres on the point in a sandbox and run all checks: an element of "results" of `verify`.

    It is remembered with the set's store, unless the source is a store alone.
    """
    started = time.monotonic()
    settings = source.settings(point)
    binaries = binaries_of(source, set_name)
    with naming_nearest(source, point), mounted(source, point, scratch_place(source), progress) as pgdata:
        progress(Progress("starting postgres on it"))
        checks = proving.verify_directory(
            pgdata,
            settings,
            parent=pgdata.parent,
            sql=sql_file,
            checks=proving.own_checks(),
            binaries=binaries,
            elsewhere=elsewhere(source, point, pgdata),
            hide=production_places(source, set_name),
            report=lambda name: progress(Progress(name)),
        )
    result: Json = {
        "recovery_point": point_json(point),
        "ok": all(check.ok for check in checks),
        "seconds": round(time.monotonic() - started, 3),
        "checks": [asdict(replace(check, seconds=round(check.seconds, 3))) for check in checks],
    }
    if set_name is not None:
        remember(source, "verification", {**result, "interval": point.interval})
    return result


def at_random(source: Source, count: int) -> list[RecoveryPoint]:
    """`count` writes that can be restored, in order. Those inside of a rewind in place are no points.

    Raises TargetError when there is none.
    """
    ranges = _restorable(source)
    sizes = [last - first + 1 for first, last in ranges]
    chosen: dict[int, RecoveryPoint] = {}
    wanted = min(count, sum(sizes))
    for _ in range(100 * wanted):
        write = random.randint(*random.choices(ranges, sizes)[0])
        try:
            chosen[write] = source.resolve(Target("write", write))
        except TargetError:
            continue
        if len(chosen) == wanted:
            break
    if not chosen:
        raise TargetError("no write that was tried is a recovery point", "pgcdp info lists the boundaries")
    return [chosen[write] for write in sorted(chosen)]


def _restorable(source: Source) -> list[tuple[int, int]]:
    """The writes of the recovery window that retention did not let go of: first and last ones, not overlapping."""
    listing = source.listing()
    done = listing.base.write
    found = [(done, done)]
    for interval in listing.intervals:
        found.append((interval.from_write if interval.restorable_by_write else interval.to_write, interval.to_write))
        done = interval.to_write
    return [*found, *([(done + 1, listing.newest_write)] if listing.newest_write > done else [])]
