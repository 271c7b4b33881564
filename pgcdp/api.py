"""The use cases that the command line and others share. Each returns plain values in the shape of docs/json.md."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pgcdp import (
    cloning,
    doctor,
    extending,
    growing,
    healing,
    keeping,
    owning,
    rewinding,
    salvaging,
    scrubbing,
    service,
    transactions,
    verifying,
)
from pgcdp.capture import attach, volumes
from pgcdp.capture import protect as protection
from pgcdp.capture.checks import ProtectRequest
from pgcdp.capture.engine import EngineClient
from pgcdp.capture.filemap import FileMapper, places_of
from pgcdp.capture.planning import Backing
from pgcdp.checking import beforehand
from pgcdp.checking.finding import Finding
from pgcdp.config import Config, load_config
from pgcdp.errors import DamageError, PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.expiring import expire as expire
from pgcdp.expiring import expire_look as expire_look
from pgcdp.following import follow as follow
from pgcdp.intervals.policy import parse_policy
from pgcdp.looking import gap_json, gaps_json, interval_json
from pgcdp.looking import info as info
from pgcdp.looking import status as status
from pgcdp.marking import mark as mark
from pgcdp.marking import unkeep as unkeep
from pgcdp.opening import (
    Announce,
    between,
    binaries_of,
    engine_status,
    open_source,
    point_of,
    production_places,
    remember,
    scratch_place,
)
from pgcdp.postgres import role, session
from pgcdp.postgres.cluster import Binaries
from pgcdp.postgres.followers import followers
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import GAP_BEGIN, GAP_END, REWIND_BEGIN, Kind, RecoveryPoint, Remark, Target
from pgcdp.recovery import clone as cloned
from pgcdp.recovery import restore as writing
from pgcdp.recovery.expiring import AnotherRuns, expiring
from pgcdp.recovery.holds import kind_of, owners_in, owners_now
from pgcdp.recovery.left import naming_nearest
from pgcdp.recovery.places import scratch_of
from pgcdp.recovery.restored_spaces import Restored
from pgcdp.recovery.salvage import Wanted
from pgcdp.recovery.source import Source
from pgcdp.recovery.target import window
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from pgcdp.store.rebuild import rebuild as rebuild_catalog
from pgcdp.store.survey import survey
from pgcdp.units import format_time

Json = dict[str, Any]

FILES_SECONDS = 30.0
"""How long `show` waits for the filesystem to say whose the blocks of a write are that is in no interval yet."""

# --- a set's life


def protect(
    set_name: str,
    pgdata: Path,
    store: Path,
    *,
    volume: Path | None = None,
    size: int | None = None,
    fs: str = "ext4",
    journal: Path | None = None,
    journal_limit: int | None = None,
    cut: Sequence[str] = (),
    initdb: bool = False,
    yes: bool = False,
    progress: Report = silent,
    **more: Any,
) -> Json:
    """Put a cluster behind capture, start it and the agent, and wait for the first backup image.

    `more` are further fields of ProtectRequest. Run again after a kill, it finishes or puts back.
    """
    if cut:
        parse_policy(cut)
    request = ProtectRequest(
        set_name, pgdata, store, volume=volume, size=size, fs=fs, journal=journal, journal_limit=journal_limit,
        cut=tuple(cut) or None, initdb=initdb, yes=yes, **more,
    )  # fmt: skip
    warnings: list[Remark] = []
    config = protection.protect(request, progress, warnings.append)
    attach.up(config, progress)
    service.start(config)
    wait_baseline(config, progress)
    progress(Progress("making the role pgcdp and the function pgcdp.mark"))
    with suppress(PgcdpError):  # protection does not depend on them; pgcdp check says what is missing
        role.install(session.Dsn.of(config))
    told = [{"name": each.name, "detail": each.detail, "hint": each.hint} for each in warnings]
    return {**status(set_name), "warnings": told}


def add_tablespaces(
    set_name: str,
    wanted: Sequence[tuple[str, Backing]],
    *,
    fs: str | None = None,
    yes: bool = False,
    progress: Report = silent,
) -> Json:
    """Take tablespaces, by name or OID, into a set that is protected, and cut a boundary that has them."""
    extending.add_tablespaces(load_config(set_name), wanted, fs, yes, progress)
    progress(Progress("cutting the boundary behind it"))
    service.await_following(load_config(set_name).paths)
    cut(set_name)
    return status(set_name)


def wait_baseline(config: Config, progress: Report) -> None:
    """Wait until the first backup image is complete. Raises what the agent says when it cannot go on."""
    while True:
        state = service.ask(config.paths, "status")
        if state["phase"] == "following":
            return
        if state["error"]:
            raise PreconditionError(
                f"the first backup image is not complete: {state['error']}",
                f"the agent goes on by itself when that is mended; see pgcdp status {config.name}",
            )
        copied = state.get("baseline")
        if copied and state["phase"] == "baseline":
            progress(Progress("copying the first backup image", copied["done"], copied["total"]))
        elif state["phase"] == "checkpoint":
            progress(Progress("waiting for the first boundary"))
        time.sleep(0.2)


def unprotect(set_name: str, progress: Report = silent) -> Json:
    """Bring the cluster back to plain storage; the store stays."""
    config = load_config(set_name)
    try:
        protection.unprotect(config, progress, lambda: service.start(config), lambda: _end_agent(config, progress))
    except BaseException:
        if EngineClient(config.paths.control).alive():  # the cluster goes on behind capture: so must the agent
            service.start(config)
        raise
    return {"set": set_name, "pgdata": str(config.pgdata), "store": str(config.store)}


def _end_agent(config: Config, progress: Report) -> None:
    """Stop the agent when the store has what the journal holds, which will be removed."""
    engine = engine_status(config)
    progress(Progress("storing the last writes"))
    with suppress(service.AgentGone):
        while engine is not None:
            state = service.ask(config.paths, "status")
            if state["error"] or state["phase"] != "following" or state["taken_write"] >= engine.durable_write:
                break
            time.sleep(0.1)
    service.stop(config)


def up(
    set_name: str,
    progress: Report = silent,
    *,
    heal: healing.Agree | None = None,
    take_over: bool = False,
    upgrade: bool = False,
) -> Json:
    """Attach, mount, start Postgres and the agent; with `upgrade` the installed version captures from now on.

    With `take_over` a journal and store that belong to another machine or state root are this one's from now on.
    With `heal` every block is compared before that, and what differs is taken in as a gap ("gap" in what is returned,
    None when nothing differed): it is told what was found, and raises to stop it.
    """
    if upgrade and engine_status(load_config(set_name)) is not None:
        keeping.upgrade(load_config(set_name), progress)
    config = load_config(set_name)
    owning.check(config, take_over, progress)
    below = scratch_of(config.set_id_bytes)
    gap = healing.resume(config, below, progress)
    extending.resume(config, progress)
    config = load_config(set_name)
    rewinding.resume(config, below, progress)
    if heal is not None and gap is None:
        gap = healing.heal(config, below, heal, progress)
    attach.up(config, progress, lambda: service.start(config))
    cloned.clear_dead(config.paths.root, config.name)
    with suppress(PgcdpError):  # databases that were made since; pgcdp check says what is missing
        role.install(session.Dsn.of(config))
    told = {} if heal is None and gap is None else {"gap": None if gap is None else gap_json(gap)}
    return {**status(set_name), **told}


def down(set_name: str, progress: Report = silent) -> Json:
    """Stop the agent and Postgres, unmount, detach."""
    config = load_config(set_name)
    attach.quiesce(config, progress)
    service.stop(config)
    attach.down(config, progress)
    return status(set_name)


def cut(set_name: str) -> Json:
    """Checkpoint now and close the interval; returns it."""
    config = load_config(set_name)
    boundary = service.ask(config.paths, "cut", timeout=None)["boundary"]
    return interval_json(Bundle.open(Store.open(config.store), boundary).interval, None)


# --- looking


def log(set_name: str | None, store: Path | None = None, **wanted: Any) -> Json:
    """Transactions, newest first; `wanted` as `pgcdp.transactions.log`."""
    source = open_source(set_name, store)
    return {**transactions.log(source, **wanted), "gaps": gaps_json(source)}


def find(set_name: str | None, sql: str, store: Path | None = None, **wanted: Any) -> Json:
    """Transactions that did what a statement does; `wanted` as `pgcdp.transactions.find`."""
    source = open_source(set_name, store)
    return {**transactions.find(source, sql, **wanted), "gaps": gaps_json(source)}


def show(set_name: str, write: int) -> Json:
    """One captured write."""
    return _show(set_name, open_source(set_name, None), write)


def _show(set_name: str | None, source: Source, write: int) -> Json:
    point = source.place(Target("write", write))
    try:
        record = source.record(write)
    except DamageError:
        if write != window(source.listing())[0].write:
            raise
        raise TargetError(
            f"write {write} is where the recovery window begins: what it held is in the image, not kept by itself",
            f"pgcdp show {source.store.set_name} {write + 1} shows the next one",
        ) from None
    kind = Kind(int(record["kind"]))
    names = {volume.number: volume.name for volume in source.store.volumes}
    holds: Json = {}
    if kind == Kind.MARK:
        holds = {"mark": _name_of(source, write, point.interval)}
        if record["flags"]:
            holds = _between_json(int(record["flags"]), holds["mark"])
    elif kind == Kind.WRITE:
        holds = _holds(set_name, source, record, point.interval)
    return {
        "write": write,
        "time": format_time(int(record["wall_ns"])),
        "volume": names.get(int(record["volume"])),
        "kind": kind.name.lower(),
        "offset": int(record["offset"]),
        "length": int(record["length"]),
        "interval": point.interval,
        "holds": {"what": kind_of(holds), **holds},
    }


def _between_json(flags: int, name: str | None) -> Json:
    """What the begin or end record of a rewind or gap tells."""
    what = "begin" if flags in (REWIND_BEGIN, GAP_BEGIN) else "end"
    if flags in (GAP_BEGIN, GAP_END):
        return {"gap": what, "reason": (name or "").partition(" ")[0]}
    return {"rewind": what, "to": name}


def _name_of(source: Source, write: int, interval: int | None) -> str | None:
    """The name of a mark, or the point of a rewind's begin or end record; None when it was not written down."""
    try:
        return source.data(write).decode("utf-8", "replace")
    except TargetError:
        return transactions.mark_in(source, write, interval)


def _holds(set_name: str | None, source: Source, record: np.void, interval: int | None) -> Json:
    """What was recognised in the data of a write, and whose its blocks are."""
    write = int(record["number"])
    data = b""
    with suppress(TargetError):  # retention let go of it: what was written down of it is told all the same
        data = source.data(write)
    holds = doctor.describe_data(data) or transactions.wal_in(source, write, interval)
    if interval is not None:
        return {**holds, "files": owners_in(source.store, interval, record)}
    if set_name is None:
        return {**holds, "files": []}
    config = load_config(set_name)
    places = places_of(config.pgdata, {n: each.mountpoint for n, each in enumerate(config.volumes)})
    files = None
    if all(volumes.mount_at(place.mountpoint) is not None for place in places):
        files = FileMapper(places).soon(FILES_SECONDS, 1.0)
    last = max(source.store.interval_numbers(), default=0)
    return {**holds, "files": owners_now(source.store, files, last + 1, record) if files is not None else []}


# --- recovery


def resolve(set_name: str | None, target: Target, store: Path | None = None, *, before: str | None = None) -> Json:
    """What a target resolves to now: {"recovery_point", "last_in", "first_out", "out", "also_out"}."""
    source = open_source(set_name, store)
    return between(source, point_of(source, target, before))


def restore(
    set_name: str | None,
    target: Target,
    *,
    to_image: Path | None = None,
    to_directory: Path | None = None,
    tablespaces: Mapping[str, Path] = MappingProxyType({}),
    store: Path | None = None,
    before: str | None = None,
    announce: Announce | None = None,
    progress: Report = silent,
) -> Json:
    """Write the recovery point to image files or make a startable data directory.

    `tablespaces`: where those of a directory go, by name or OID; the others go beside it.
    """
    started = time.monotonic()
    source = open_source(set_name, store)
    point = point_of(source, target, before)
    resolved = between(source, point)
    if announce is not None:
        announce(resolved)
    spaces: list[Restored] = []
    programs: Binaries | None = None
    if to_image is not None:
        with naming_nearest(source, point):
            place, size = to_image, writing.to_image(source, point, to_image, progress)
    else:
        assert to_directory is not None
        place = to_directory
        with suppress(PreconditionError):  # a store can be restored where there are none, if production is not there
            programs = binaries_of(source, set_name)
        with naming_nearest(source, point):
            size, spaces = writing.to_directory(source, point, to_directory, progress, tablespaces, programs)
    result: Json = {
        **resolved,
        "to": str(place),
        "bytes": size,
        "tablespaces": [{"oid": each.oid, "name": each.name, "directory": str(each.place)} for each in spaces],
        "seconds": round(time.monotonic() - started, 3),
    }
    if store is None:
        remember(source, "restore", {**result, "interval": point.interval})
    return result


def rewind(
    set_name: str,
    target: Target,
    *,
    before: str | None = None,
    agree: Announce,
    prove: bool = True,
    progress: Report = silent,
) -> Json:
    """Bring production itself back to the target, in place. `agree` is told what that costs, and raises to stop it.

    With `prove` the boundary behind it is verified at the end ("verified"; else `null`).
    """
    started = time.monotonic()
    config = load_config(set_name)
    source = open_source(set_name, None)
    point = point_of(source, target, before)
    resolved = {**between(source, point), "lost": _lost(source, point), "followers": []}
    with suppress(PreconditionError), session.connect(session.Dsn.of(config)) as connection:  # it may be down
        resolved["followers"] = followers(connection)
    agree(resolved)
    with naming_nearest(source, point):
        done, down = rewinding.rewind(config, point, scratch_place(source), progress)
    progress(Progress("cutting the boundary behind it"))
    boundary = cut(set_name)
    proven = verify(set_name, Target("boundary", boundary["number"]), progress=progress) if prove else {"ok": None}
    result: Json = {
        **resolved,
        "set": set_name,
        "to": str(config.pgdata),
        "bytes": done.written,
        "undo": None if (target.kind, target.name) == ("name", done.mark) else done.mark,
        "boundary": boundary["number"],
        "timeline": boundary["timeline"],
        "verified": proven["ok"],
        "down_seconds": round(down, 3),
        "seconds": round(time.monotonic() - started, 3),
    }
    remember(source, "restore", {**result, "interval": boundary["number"], "in_place": True})
    return result


def _lost(source: Source, point: RecoveryPoint) -> Json:
    try:
        return transactions.lost_json(source, point)
    except (DamageError, PreconditionError) as error:  # the point itself may be right
        return {"transactions": None, "oldest": None, "newest": None, "tables": [], "unknown": error.message}


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
    result = verifying.prove(source, set_name, point, sql_file, progress)
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
    for point in verifying.at_random(source, count):
        progress(Progress(f"write {point.write}"))
        results.append(verifying.prove(open_source(set_name, store), set_name, point, sql_file, progress))
    return {"ok": all(result["ok"] for result in results), "results": results}


def verify_boundaries(set_name: str, *, sql_file: Path | None = None, progress: Report = silent) -> Iterator[Json]:
    """The newest boundary, then each one as it is cut, without end: elements of "results"."""
    return verifying.each_boundary(set_name, sql_file, progress)


def clone(set_name: str | None, target: Target, **how: Any) -> Json:
    """A running Postgres on the recovery point; `how` as `pgcdp.cloning.clone`."""
    return cloning.clone(set_name, target, **how)


def clones() -> Json:
    """All clones."""
    return cloning.clones()


def destroy(name: str) -> Json:
    """End a clone and remove all of it."""
    return cloning.destroy(name)


def step(name: str, count: int, *, commits: bool = False, progress: Report = silent) -> Json:
    """Move a clone some writes or commits onward or back."""
    set_name = cloning.find(name).set_name
    return cloning.step(name, count, commits=commits, look=partial(_show, set_name), progress=progress)


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
    salvaging.check_file(how.get("file"))
    source = open_source(set_name, store)
    likely = None
    if before is not None:
        target, likely = transactions.before(source, before, target.branch)
    point = source.resolve(target)
    resolved = between(source, point)
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
            source, point, wanted, below=scratch_place(source), binaries=binaries_of(source, set_name), connect=connect,
            hide=production_places(source, set_name), likely=likely, progress=progress, **how,
        )  # fmt: skip
    result = {**resolved, **value}
    if store is None:
        remember(source, "restore", {**result, "interval": point.interval})
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
    if store is not None:
        told = scrubbing.check(Store.open(store), full, rate or 0, progress, remember=False)
        return _checked([doctor.finding_of(each) for each in told])
    assert set_name is not None
    config = load_config(set_name)
    return _checked(doctor.examine(config, engine_status(config), full, progress, rate))


def check_beforehand(
    pgdata: Path, store: Path | None = None, journal: Path | None = None, progress: Report = silent
) -> Json:
    """The same of a cluster that is not protected yet, with store and journal where they would lie."""
    return _checked(beforehand.examine(pgdata, store, journal, progress))


def _checked(found: Sequence[Finding]) -> Json:
    return {
        "ok": all(each.check.ok for each in found),
        "checks": [each.as_json() for each in found],
    }


def grow(set_name: str, size: int | None, volume: str | None = None, *, progress: Report = silent) -> Json:
    """Give a volume more room, online; `volume` None: that of the data directory."""
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
    config = load_config(set_name)
    store = Store.open(config.store, config.set_id_bytes)
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
