"""Clones as the commands have them: opened at a target, listed, moved by writes or commits, destroyed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pgcdp.around import end_json
from pgcdp.capture.control import EngineClient
from pgcdp.errors import DamageError, PreconditionError, TargetError, UsageError
from pgcdp.opening import (
    Announce,
    between,
    binaries_of,
    open_source,
    point_json,
    point_of,
    production_places,
    scratch_place,
)
from pgcdp.postgres.cluster import Binaries
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery import clone as cloned
from pgcdp.recovery import clone_opening, stepping, view
from pgcdp.recovery.branches import beyond, branch_at
from pgcdp.recovery.clone import Access, Clone, Damaged
from pgcdp.recovery.left import naming_nearest
from pgcdp.recovery.sandbox import Recovery
from pgcdp.recovery.source import Source
from pgcdp.recovery.target import window
from pgcdp.sets import list_sets, root_directory
from pgcdp.units import format_lsn, format_time

Json = dict[str, Any]
SHOWN = 20
"""How many of the writes and of the transactions that a step passes are told."""


def clone(
    set_name: str | None,
    target: Target,
    *,
    name: str | None = None,
    access: Access | None = None,
    ttl: float | None = None,
    store: Path | None = None,
    before: str | None = None,
    announce: Announce | None = None,
    progress: Report = silent,
) -> Json:
    """Open the recovery point as a running Postgres that accepts writes; nothing is copied.

    `ttl`: seconds until it is destroyed by itself (the agent does it, and the next command about clones). `announce`
    is told which recovery point it is, {"recovery_point"}, before anything is made.
    """
    started = time.monotonic()
    root = root_directory()
    if name is not None:
        cloned.check_name(name)
    cloned.expire(root)
    source = open_source(set_name, store, trusting=True)
    point = point_of(source, target, before)
    if announce is not None:
        announce({"recovery_point": point_json(point)})
    # What lies on both sides is read in the WAL behind the last boundary, which may be long: the clone opens meanwhile.
    with ThreadPoolExecutor(2) as beside:
        binaries = beside.submit(binaries_of, source, set_name)
        looked = beside.submit(between, source.copy(), point)
        made, recovery = _open(source, root, set_name, point, binaries.result, name, access, ttl, progress)
        try:
            if not looked.done():
                progress(Progress("reading which transactions are in and out"))
            resolved = looked.result()
        except BaseException:  # nobody was told its name
            cloned.destroy(made.place)
            raise
    return {"name": made.name, "dsn": made.dsn, **_last(resolved), **resolved, **_took(started, recovery)}


def _open(
    source: Source,
    root: Path,
    set_name: str | None,
    point: RecoveryPoint,
    binaries: Callable[[], Binaries],
    name: str | None,
    access: Access | None,
    ttl: float | None,
    progress: Report,
) -> tuple[Clone, Recovery]:
    now = time.time_ns()
    below = scratch_place(source)
    wanted = Clone(
        place=below / f"clone-{name or _free_name(root, below, source.store.set_name)}",
        root=root,
        set_name=set_name,
        store=source.store.path,
        point=point,
        access=access or Access(),
        created_ns=now,
        expires_ns=None if ttl is None else now + round(ttl * 1e9),
        boot_id=cloned.boot_id(),
    )
    if any(each.name == wanted.name and each.place != wanted.place for each in cloned.find_every(root)):
        raise UsageError(f"another set has a clone {wanted.name}", "choose another --name")
    hide = production_places(source, set_name)
    while True:
        try:
            with naming_nearest(source, point):
                return clone_opening.create(source, wanted, binaries, hide, progress)
        except clone_opening.NameTaken:
            if name is not None:
                raise
            wanted = replace(wanted, place=below / f"clone-{_free_name(root, below, source.store.set_name)}")


def clones() -> Json:
    """All clones: {"clones": [...]}, oldest first, behind them those that are damaged."""
    root = root_directory()
    cloned.expire(root)
    listed = []
    for each in cloned.find_every(root):
        with suppress(FileNotFoundError):  # another command has just destroyed it
            listed.append(_damaged(each) if isinstance(each, Damaged) else _listed(each))
    return {"clones": listed}


def destroy(name: str) -> Json:
    """End a clone and remove all of it, also one that is damaged."""
    cloned.destroy(_find(name).place)
    return {"name": name, "destroyed": True}


def step(
    name: str,
    count: int,
    *,
    commits: bool = False,
    look: Callable[[Source, int], Json],
    progress: Report = silent,
) -> Json:
    """Move a clone `count` writes (or commits) onward, or back when negative; what was written to it is dropped.

    `look` tells what a captured write holds.
    """
    started = time.monotonic()
    if count == 0:
        raise UsageError("a step of 0 leads nowhere", "give the number of writes or commits, negative to go back")
    found = find(name)
    source = _source_of(found)
    target = source.again(lambda: _target(source, found.point, count, commits))
    point = source.resolve(target)
    first, last = sorted((found.point, point), key=lambda each: (each.write, each.lsn is None, each.lsn or 0))
    passed = range(first.write + (first.lsn is None), last.write + 1)
    came, went = source.again(lambda: (_beyond(source, point, found.point), _beyond(source, found.point, point)))
    rewinds = [rewind for rewind in source.rewinds() if first.write < (rewind.end or 0) <= last.write]
    onward = point == last
    binaries = binaries_of(source, found.set_name)  # before anything is taken down
    hide = production_places(source, found.set_name)
    with naming_nearest(source, point):
        moved, recovery = clone_opening.move(source, found, point, lambda: binaries, hide, progress)
    resolved = between(source, point)
    return {
        "name": moved.name,
        "dsn": moved.dsn,
        **_last(resolved),
        **resolved,
        "from": point_json(found.point),
        "writes_passed": len(passed),
        "writes": _looked_at(source, passed[:SHOWN] if onward else passed[-SHOWN:], look),
        "rewinds_passed": len(rewinds),
        "transactions_in": [end_json(end) for end in came[0]],
        "transactions_out": [end_json(end) for end in went[0]],
        "transactions": {"in": came[1], "out": went[1]},
        **_took(started, recovery),
    }


def find(name: str) -> Clone:
    """The clone of that name. Raises TargetError, naming what there is, and DamageError."""
    found = _find(name)
    if isinstance(found, Damaged):
        raise DamageError(found.problem, f"pgcdp destroy {name} takes it away all the same")
    return found


def _find(name: str) -> Clone | Damaged:
    every = cloned.find_every(root_directory())
    found = [each for each in every if each.name == name]
    if not found:
        names = ", ".join(each.name for each in every)
        raise TargetError(f"there is no clone {name}", f"there are: {names}" if names else "pgcdp clone makes one")
    if len(found) > 1:
        damaged = next(each.place for each in reversed(found) if isinstance(each, Damaged))
        raise TargetError(
            f"{len(found)} clones are called {name}: {', '.join(str(each.place) for each in found)}",
            f"give one that is damaged another name: mv {damaged} {damaged}-2",
        )
    return found[0]


def _free_name(root: Path, below: Path, set_name: str) -> str:
    """One that no clone has, nor one that was made of the same store with another root of pgcdp's state."""
    taken = {each.name for each in cloned.find_every(root)}
    taken |= {place.name.removeprefix("clone-") for place in below.glob("clone-*")}
    return next(name for number in range(1, len(taken) + 2) if (name := f"{set_name}-{number}") not in taken)


def _looked_at(source: Source, writes: Sequence[int], look: Callable[[Source, int], Json]) -> list[Json]:
    """The writes that were passed, without those of which retention let go."""
    found = []
    for write in writes:
        with suppress(TargetError):
            found.append(look(source, write))
    return found


def _target(source: Source, point: RecoveryPoint, count: int, commits: bool) -> Target:
    if commits:
        here = source.resolve(Target("write", point.write))  # it may have been stored since, in an interval by now
        boundary = here.boundary if point.lsn is None else None
        branch = source.branch_of(point)
        history = source.transactions(branch=branch).history()
        return stepping.by_commits(replace(point, interval=here.interval, boundary=boundary), count, history, branch)
    target = stepping.by_writes(point, count)
    first, last = window(source.listing())
    if not first.write <= (target.value or 0) <= last.write:
        raise TargetError(
            f"{abs(count)} writes {'onward' if count > 0 else 'back'} from write {point.write} lie outside of the "
            f"recovery window, which is write {first.write} to {last.write}",
            f"at most {last.write - point.write} onward, or {point.write - first.write} back",
        )
    return target


def _source_of(found: Clone) -> Source:
    """What a clone was opened from. Raises PreconditionError when its set is gone, or has another store by now."""
    other = f"pgcdp clone --store {found.store} --target-write {found.point.write} opens another clone from the store"
    if found.set_name is not None and found.set_name not in list_sets():
        raise PreconditionError(
            f"set {found.set_name}, which clone {found.name} was opened from, is not protected any more", other
        )
    source = open_source(found.set_name, None if found.set_name else found.store)
    if scratch_place(source) != found.place.parent:
        raise PreconditionError(
            f"{source.store.path} is not the store that clone {found.name} was opened from, {found.store}",
            other,
        )
    return source


def _beyond(source: Source, point: RecoveryPoint, other: RecoveryPoint) -> tuple[list[np.void], int]:
    """The first transactions that a point has and another has not, and how many; their branches may be different."""
    rewinds = source.rewinds()
    ours, theirs = (branch_at(each.write, each.lsn, rewinds) for each in (point, other))
    return stepping.committed(source.transactions().on(beyond(ours, theirs)).history(), SHOWN)


def _listed(each: Clone) -> Json:
    return {
        "name": each.name,
        "set": each.set_name,
        "store": str(each.store),
        "state": cloned.state(each),
        "dsn": each.dsn or None,
        "recovery_point": point_json(each.point),
        "created": format_time(each.created_ns),
        "expires": None if each.expires_ns is None else format_time(each.expires_ns),
        "written_bytes": cloned.written_bytes(each.place),
        "memory_bytes": cloned.memory_bytes(each.place, (pid for pid, _ in each.processes)),
        "problem": view.problem(EngineClient(each.place / "control")),
    }


def _damaged(each: Damaged) -> Json:
    unknown = dict.fromkeys(("set", "store", "dsn", "recovery_point", "created", "expires"))
    return {
        **unknown,
        "name": each.name,
        "state": "damaged",
        "written_bytes": cloned.written_bytes(each.place),
        "memory_bytes": cloned.memory_bytes(each.place),
        "problem": each.problem,
    }


def _last(resolved: Json) -> Json:
    side = resolved["last_in"]
    return {"last_transaction": None if side is None else {"xid": side["xid"], "time": side["time"]}}


def _took(started: float, recovery: Recovery) -> Json:
    replayed = {
        "from_lsn": None if recovery.from_lsn is None else format_lsn(recovery.from_lsn),
        "to_lsn": None if recovery.to_lsn is None else format_lsn(recovery.to_lsn),
        "seconds": round(recovery.seconds, 3),
        "defaults": list(recovery.defaults),
    }
    return {"recovery": replayed, "seconds": round(time.monotonic() - started, 3)}
