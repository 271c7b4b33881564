"""What a command names: the source to read from, the recovery point in it, and what is needed to open that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgcdp.around import around_json
from pgcdp.capture.control import EngineClient, EngineGone, EngineStatus
from pgcdp.capture.journal import Journal
from pgcdp.config import Config, load_config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.postgres.cluster import Binaries, find_binaries
from pgcdp.proc import user_named
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery.places import scratch_of
from pgcdp.recovery.source import Source
from pgcdp.store.base import base_outside
from pgcdp.store.catalog import Catalog
from pgcdp.store.layout import Store
from pgcdp.units import format_lsn, format_time

Json = dict[str, Any]


def engine_status(config: Config) -> EngineStatus | None:
    """What the engine says; None when none runs."""
    try:
        return EngineClient(config.paths.control).status()
    except EngineGone:
        return None


def source_of(config: Config, engine: EngineStatus | None, *, trusting: bool = False) -> Source:
    """The set's store with its journal. `trusting`: as `Source` has it."""
    journal = Journal(config.journal, config.set_id_bytes)
    store = Store.open(config.store, config.set_id_bytes)
    durable_write, now_ns = (engine.durable_write, time.time_ns()) if engine else (None, 0)
    return Source(store, journal, durable_write, now_ns, config.pgdata, trusting)


def open_source(set_name: str | None, store: Path | None, *, trusting: bool = False) -> Source:
    """The source that a command names: a set, or a store alone. `trusting`: as `Source` has it."""
    if store is not None:
        return Source(Store.open(store), trusting=trusting)
    assert set_name is not None
    config = load_config(set_name)
    return source_of(config, engine_status(config), trusting=trusting)


def point_json(point: RecoveryPoint) -> Json:
    """A recovery point."""
    return {
        "write": point.write,
        "lsn": None if point.lsn is None else format_lsn(point.lsn),
        "interval": point.interval,
        "boundary": point.boundary,
        "time": format_time(point.time_ns),
        "note": point.note,
    }


Announce = Callable[[Json], None]
"""Is told what a target resolved to, before anything is done: as `resolve` returns it."""


def point_of(source: Source, target: Target, before: str | None) -> RecoveryPoint:
    """The recovery point of a target, or just before the one transaction that did what the SQL `before` does.

    `target.branch`: on which branch that is looked for.
    """
    if before is None:
        return source.resolve(target)
    from pgcdp import transactions  # it loads a parser of SQL

    return source.resolve(transactions.before(source, before, target.branch)[0])


def between(source: Source, point: RecoveryPoint) -> Json:
    """What a point resolved to: {"recovery_point", "last_in", "first_out", "out", "also_out", "outside"}."""
    try:
        told = around_json(source, point)
    except (DamageError, PreconditionError) as error:  # the point itself may be right
        told = {"last_in": None, "first_out": None, "out": None, "also_out": [], "unknown": error.message}
    return {"recovery_point": point_json(point), **told, "outside": lacking(source, point)}


def lacking(source: Source, point: RecoveryPoint) -> list[Json] | None:
    """Data of the cluster that no recovery point has where this one lies: nobody captured it. None: it is not known.

    Of a point in the open interval it is what the last boundary told; at the oldest one, what is said of that.
    """
    intervals = source.intervals()
    known = [each for each in intervals if point.interval is None or each.number == point.interval]
    return outside_json(known[-1].outside if known else base_outside(source.store))


def outside_json(outside: Sequence[tuple[str, str]] | None) -> list[Json] | None:
    """What of the cluster an interval lacks; None: that was not known when it ended."""
    return None if outside is None else [{"name": name, "place": place} for name, place in outside]


def scratch_place(source: Source) -> Path:
    """Where scratch places of a set are."""
    return scratch_of(source.store.set_id)


def production_places(source: Source, set_name: str | None) -> list[Path]:
    """What of the running cluster a sandbox must not see: its volumes, and where its socket is."""
    places = list(source.store.extra["mountpoints"].values())
    if set_name is not None:
        places.append(load_config(set_name).cluster.socket_directory)
    return [Path(place) for place in places if place.startswith("/")]


def binaries_of(source: Source, set_name: str | None) -> Binaries:
    """Postgres's programs of the version of the store; those that run on a set's cluster, as its owner's choice."""
    major = int(source.store.extra["cluster"]["version"])
    if set_name is None:
        return find_binaries(major)
    facts = load_config(set_name).cluster
    return find_binaries(major, facts.bindir, user_named(facts.owner))


def remember(source: Source, kind: Any, content: Json) -> None:
    catalog = Catalog.open(source.store)
    try:
        catalog.remember(kind, time.time_ns(), content)
    finally:
        catalog.close()
