"""The use cases that the command line and others share. Each returns plain values in the shape of docs/json.md.

All are used as `api.NAME`; the longer ones lie in rooms of their own: `protecting`, `showing`, `restoring`, ... A room
is loaded when one of its use cases is asked for: all of them take 0.65 s to load, that of `pgcdp status` 0.26.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgcdp.config import load_config
from pgcdp.errors import UsageError
from pgcdp.progress import Progress, Report, silent

if TYPE_CHECKING:
    from pgcdp.checking.finding import Finding
    from pgcdp.cloning import clone as clone
    from pgcdp.cloning import clones as clones
    from pgcdp.cloning import destroy as destroy
    from pgcdp.expiring import expire as expire
    from pgcdp.expiring import expire_look as expire_look
    from pgcdp.following import follow as follow
    from pgcdp.looking import info as info
    from pgcdp.looking import status as status
    from pgcdp.marking import mark as mark
    from pgcdp.marking import unkeep as unkeep
    from pgcdp.opening import Announce
    from pgcdp.postgres import session
    from pgcdp.protecting import add_tablespaces as add_tablespaces
    from pgcdp.protecting import cut as cut
    from pgcdp.protecting import down as down
    from pgcdp.protecting import protect as protect
    from pgcdp.protecting import unprotect as unprotect
    from pgcdp.protecting import up as up
    from pgcdp.protecting import wait_baseline as wait_baseline
    from pgcdp.records import Target
    from pgcdp.recovery.salvage import Wanted
    from pgcdp.restoring import resolve as resolve
    from pgcdp.restoring import restore as restore
    from pgcdp.restoring import rewind as rewind
    from pgcdp.showing import show as show
    from pgcdp.verifying import verify as verify
    from pgcdp.verifying import verify_boundaries as verify_boundaries
    from pgcdp.verifying import verify_sample as verify_sample

ROOMS = {
    "cloning": ("clone", "clones", "destroy"),
    "expiring": ("expire", "expire_look"),
    "following": ("follow",),
    "looking": ("info", "status"),
    "marking": ("mark", "unkeep"),
    "protecting": ("add_tablespaces", "cut", "down", "protect", "unprotect", "up", "wait_baseline"),
    "restoring": ("resolve", "restore", "rewind"),
    "showing": ("show",),
    "verifying": ("verify", "verify_boundaries", "verify_sample"),
}
"""The use cases of each room, as the imports above tell type checkers (tests/unit/test_api.py)."""
_ROOM_OF = {name: room for room, names in ROOMS.items() for name in names}

Json = dict[str, Any]


def __getattr__(name: str) -> Any:
    """A use case of a room."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pgcdp.{_ROOM_OF[name]}"), name)


# --- looking


def log(set_name: str | None, store: Path | None = None, **wanted: Any) -> Json:
    """Transactions, newest first; `wanted` as `pgcdp.transactions.log`."""
    from pgcdp import transactions
    from pgcdp.looking import gaps_json
    from pgcdp.opening import open_source

    source = open_source(set_name, store)
    return {**transactions.log(source, **wanted), "gaps": gaps_json(source)}


def find(set_name: str | None, sql: str, store: Path | None = None, **wanted: Any) -> Json:
    """Transactions that did what a statement does; `wanted` as `pgcdp.transactions.find`."""
    from pgcdp import transactions
    from pgcdp.looking import gaps_json
    from pgcdp.opening import open_source

    source = open_source(set_name, store)
    return {**transactions.find(source, sql, **wanted), "gaps": gaps_json(source)}


# --- recovery


def step(name: str, count: int, *, commits: bool = False, progress: Report = silent) -> Json:
    """Move a clone some writes or commits onward or back."""
    from pgcdp import cloning
    from pgcdp.showing import show_in

    set_name = cloning.find(name).set_name
    return cloning.step(name, count, commits=commits, look=partial(show_in, set_name), progress=progress)


def salvage(
    set_name: str | None,
    target: Target,
    wanted: Wanted,
    *,
    store: Path | None = None,
    before: str | None = None,
    into: str | None = None,
    announce: Announce | None = None,
    progress: Report = silent,
    **how: Any,
) -> Json:
    """Bring tables back as they were; `into`: a connection string instead of the set's own cluster.

    `how` are further arguments of `pgcdp.salvaging.run`.
    """
    from pgcdp import opening, salvaging, transactions
    from pgcdp.postgres import session
    from pgcdp.recovery.left import naming_nearest

    salvaging.check_file(how.get("file"))
    source = opening.open_source(set_name, store)
    likely = None
    if before is not None:
        target, likely = transactions.before(source, before, target.branch)
    point = source.resolve(target)
    resolved = opening.between(source, point)
    if announce is not None:
        announce(resolved)

    def connect(database: str) -> session.Connection:
        if into is not None:
            return session.connect_to(into)
        if set_name is None:
            raise UsageError("a store alone has no running database", "say where the rows go: --into DSN or --file F")
        return session.connect_as_client(session.Dsn.of(load_config(set_name)), database)

    with naming_nearest(source, point):
        value = salvaging.run(
            source, point, wanted, below=opening.scratch_place(source), binaries=opening.binaries_of(source, set_name),
            connect=connect, hide=opening.production_places(source, set_name), likely=likely, progress=progress, **how,
        )  # fmt: skip
    result = {**resolved, **value}
    if store is None:
        opening.remember(source, "restore", {**result, "interval": point.interval})
    return result


# --- care


def check(
    set_name: str | None,
    full: bool = False,
    progress: Report = silent,
    *,
    store: Path | None = None,
    rate: int | None = None,
) -> Json:
    """Everything that can be known now about whether the promise holds; with `store`, of a store alone.

    `rate`: bytes a second that `full` reads at most, 0 for as fast as it goes; None: as the set's settings say.
    """
    from pgcdp import doctor, opening, scrubbing
    from pgcdp.store.layout import Store

    if store is not None:
        told = scrubbing.check(Store.open(store), full, rate or 0, progress, remember=False)
        return _checked([doctor.finding_of(each) for each in told])
    assert set_name is not None
    config = load_config(set_name)
    return _checked(doctor.examine(config, opening.engine_status(config), full, progress, rate))


def check_beforehand(
    pgdata: Path, store: Path | None = None, journal: Path | None = None, progress: Report = silent
) -> Json:
    """The same of a cluster that is not protected yet, with store and journal where they would lie."""
    from pgcdp.checking import beforehand

    return _checked(beforehand.examine(pgdata, store, journal, progress))


def _checked(found: Sequence[Finding]) -> Json:
    return {
        "ok": all(each.check.ok for each in found),
        "checks": [each.as_json() for each in found],
    }


def grow(set_name: str, size: int | None, volume: str | None = None, *, progress: Report = silent) -> Json:
    """Give a volume more room, online; `volume` None: that of the data directory."""
    from pgcdp import growing

    done = growing.grow(load_config(set_name), size, volume, progress)
    return {
        "set": set_name,
        "volume": done.volume,
        "bytes": done.after,
        "before": done.before,
        "filesystem": {"before": done.filesystem_before, "after": done.filesystem_after},
    }


def rebuild(set_name: str, progress: Report = silent) -> Json:
    """The catalog anew from the store. Waits while retention lets go of something, which it tells the catalog of."""
    from pgcdp.machine import Place
    from pgcdp.recovery.expiring import AnotherRuns, expiring
    from pgcdp.store.layout import Store
    from pgcdp.store.lease import refuse_other
    from pgcdp.store.rebuild import rebuild as rebuild_catalog
    from pgcdp.store.survey import survey

    config = load_config(set_name)
    store = Store.open(config.store, config.set_id_bytes)
    refuse_other(store, Place.here(config.root))
    with ExitStack() as stack:
        try:
            stack.enter_context(expiring(store))
        except AnotherRuns:
            progress(Progress("waiting until retention has done what it is at"))
            stack.enter_context(expiring(store, wait=True))
        catalog, damages = rebuild_catalog(store)
    try:
        return {
            "set": set_name,
            "intervals": len(catalog.intervals()),
            "unread": [
                {"first": each.interval.first, "last": number} for number, each in survey(store).items() if each.damage
            ],
            "damages": [damage.message for damage in damages],
        }
    finally:
        catalog.close()
