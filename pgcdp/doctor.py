"""What can be known now about whether the promise holds: `pgcdp check`, and what a captured write holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from pgcdp import keeping, keys, rewinding, scrubbing, service
from pgcdp.capture import backings, clocks, disks, holder, kernel, modes, tracking, volumes
from pgcdp.capture.control import EngineStatus
from pgcdp.capture.engine import run_engine
from pgcdp.capture.outside import all_mounted, find_outside, takes_in
from pgcdp.checking import space
from pgcdp.checking.finding import Finding, Step, failed, of_remarks, passed, run, warned
from pgcdp.checking.opened import Opened
from pgcdp.config import Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.expiring import policy_of
from pgcdp.postgres import promise, role, session
from pgcdp.postgres.control import describe, find_control_blocks
from pgcdp.progress import Report
from pgcdp.records import BLOCK
from pgcdp.setting_values import exact_period
from pgcdp.store.base import base_outside, read_base
from pgcdp.store.catalog import Catalog
from pgcdp.store.kept import wrong_boundaries
from pgcdp.store.layout import Store
from pgcdp.store.published import published
from pgcdp.units import format_size

ON_VOLUMES = frozenset({"settings", "data outside the set", "role", "places"})
"""Checks that look at the volumes or ask Postgres: left out while those wait for a capture process."""
NOT_OPENED = "what the intervals lack is not known: the store does not open"
INCOMPLETE_HINT = "pgcdp info tells which points lack what; once all is in the set, later ones are whole"
LOOK_HINT = "see whether Postgres takes connections, and what locks its catalogs: the agent looks again by itself"
SYNC_HINT = "the volume's disk fails, look at dmesg; what it may have lost is written again as soon as it takes that"
EVENTS = 1000
"""So many of the newest events are looked through for jumps of the clock."""
LOOK_LATE_SECONDS = 300
"""Age of the last look at all catalogs from which on it is told."""


def examine(
    config: Config, engine: EngineStatus | None, full: bool, progress: Report, rate: int | None = None
) -> list[Finding]:
    """All checks of a set. `full` reads all of journal and store, of this `rate` bytes a second (None: as set).

    Raises nothing: what is wrong is in the list.
    """
    opened = Opened(config.store, config.set_id_bytes)
    rate = config.scrub_rate if rate is None else rate
    steps: list[Step] = [
        ("rewind", lambda: _rewind(config)),
        ("capture", lambda: _capture(config, engine)),
        ("volumes", lambda: _volumes(config, engine)),
        ("holder", lambda: _holder(config, engine)),
        ("agent", lambda: _agent(config)),
        ("settings", lambda: _settings(config, engine)),
        ("data outside the set", lambda: _outside(config, engine, opened)),
        ("role", lambda: _role(config, engine)),
        ("places", lambda: _places(config)),
        ("space", lambda: space.examine(config, engine, opened)),
        ("retention", lambda: _retention(config)),
        ("proofs", lambda: _proofs(config, opened)),
        ("machine", lambda: _machine(config)),
        ("clock", lambda: _clock(config, opened)),
        ("journal", lambda: _journal(config, full, rate)),
        ("store", lambda: _store(opened, config, full, rate, progress)),
    ]
    if engine is None and keeping.state_of(config, engine) == "stalled":
        steps = [step for step in steps if step[0] not in ON_VOLUMES]
    return run(steps, progress)


def _rewind(config: Config) -> Iterator[Finding]:
    left = rewinding.pending(config.paths)
    if left is None:
        yield passed("rewind", "none under way")
        return
    ends = "puts everything back" if left.step == "stop" else "finishes it"
    hint = f"unless its command still runs: pgcdp up {config.name} {ends}"
    if left.step != "stop":
        hint += f"; pgcdp restore {config.name} --in-place --target-name {left.mark} goes back to where it began"
    yield failed("rewind", f"one in place to write {left.point.write} has not ended, its step is {left.step}", hint)


def _capture(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    if engine is None:
        yield failed("capture", "no engine runs: nothing is captured", f"pgcdp up {config.name}")
    elif engine.state == "stalled":
        hint = "see that the agent runs and that store, journal and volumes have space, or raise journal_limit"
        if _sync_failed(engine):
            hint = SYNC_HINT
        yield failed("capture", f"{'; '.join(engine.errors) or 'the journal is full'}: writes wait", hint)
    elif engine.tracked is not None:
        yield failed(
            "capture", f"{'; '.join(engine.errors) or 'the journal could not grow'}: {tracking.told(engine.tracked)}",
            "see that the agent runs and that store and journal have space, or raise journal_limit: the set heals then",
        )  # fmt: skip
    elif engine.errors:
        hint = f"look at {config.paths.engine_log}"
        if _sync_failed(engine):
            hint = SYNC_HINT
        yield failed("capture", "; ".join(engine.errors), hint)
    else:
        yield passed("capture", f"write {engine.durable_write} is durable")


def _volumes(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    """Whether the backings are where they belong: what capture has open is lost with it when its name is gone."""
    pid = None if engine is None else holder.pid_at(config.paths.control)
    wrong = list(backings.problems(config, pid))
    for volume, what in wrong:
        hint = backings.way_on(config, volume)
        yield failed("volumes", what, hint if pid is None else f"it goes on as long as capture runs. Then: {hint}")
    if not wrong:
        yield passed("volumes", ", ".join(f"{each.name} on {each.backing}" for each in config.volumes))


def _wait(engine: EngineStatus | None) -> bool:
    """Whether writes wait, and with them may whatever reads the volumes or asks Postgres."""
    return engine is not None and engine.state == "stalled"


def _sync_failed(engine: EngineStatus) -> bool:
    """Whether a volume may lack what it had, until it is written again from the journal."""
    return any("sync failed" in each for each in engine.errors)


def _holder(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    """Whether capture would outlive its process."""
    missing, problem = holder.missing(), keeping.problem(config, engine)
    if missing is not None:
        yield warned(
            "holder", f"none: if capture dies, Postgres sees I/O errors and panics: {missing}",
            f"run Linux 6.9 or newer, then pgcdp down and pgcdp up {config.name}; until then pgcdp up mends it",
        )  # fmt: skip
    elif problem is not None:
        yield failed("holder", problem, f"pgcdp up {config.name}")
    elif engine is None:
        yield passed("holder", "none: nothing is captured")
    else:
        found = holder.find(config.paths)
        yield passed("holder", f"pid {found.pid if found else 0} keeps the connection when capture dies")


def _agent(config: Config) -> Iterator[Finding]:
    state = service.ask(config.paths, "status")
    if state["error"]:
        yield failed("agent", state["error"], state.get("hint") or f"look at {config.paths.agent_log}")
    else:
        yield passed("agent", state["phase"])
    metrics = state.get("metrics") or {}
    if metrics.get("error"):
        hint = "end what has that address, or set metrics_listen to another; the agent tries again each minute"
        yield failed("metrics", metrics["error"], hint)
    elif metrics.get("listen", "off") != "off":
        yield passed("metrics", metrics["listen"])
    age = state.get("look_seconds", 0)
    if state.get("no_look") or age > LOOK_LATE_SECONDS:
        why = state.get("no_look") or "postgres was not asked"
        told = f"the last whole one is {age // 60} min old, names may be lost: {why}"
        yield warned("look at the catalogs", told, LOOK_HINT)


def _settings(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    """Settings and states that void the promise. While writes wait, what is asked of Postgres may wait with them."""
    if _wait(engine):
        yield passed("settings", "not looked at: writes wait")
        return
    yield from of_remarks(promise.running(session.Dsn.of(config), config.pgdata))


def _outside(config: Config, engine: EngineStatus | None, opened: Opened) -> Iterator[Finding]:
    """What nobody captures now, and which intervals lack what nobody captured then (truth 8).

    While writes wait, the walk of a directory may wait with them: xfs then holds its lock.
    """
    name = "data outside the set"
    mountpoints = [volume.mountpoint for volume in config.volumes]
    waits = _wait(engine)
    attached = not waits and all_mounted(mountpoints)
    found = find_outside(config.pgdata, mountpoints) if attached else []
    if found:
        places = ", ".join(f"{each.name} in {each.place}" for each in found)
        yield failed(name, f"not captured: {places}", takes_in(config.name, found))
    store = opened.if_it_opens()
    if not attached:
        yield passed(name, "not looked for: " + ("writes wait" if waits else "the volumes are not mounted"))
    if store is None:
        if attached and not found:
            yield passed(name, f"none now; {NOT_OPENED}")
        return
    told = {number: each.interval.outside for number, each in published(store).items()}
    lacking = [number for number, outside in told.items() if outside]
    unknown = [number for number, outside in told.items() if outside is None]
    if lacking:
        yield warned(name, f"{len(lacking)} intervals are incomplete, the last one is {lacking[-1]}", INCOMPLETE_HINT)
    elif base_outside(store):
        yield warned(name, "the oldest boundary is incomplete", INCOMPLETE_HINT)
    if unknown:
        what = f"of {len(unknown)} intervals it is not known, the last one is {unknown[-1]}"
        yield warned(name, what, "of points behind it that is known again; those in it may lack such data")
    if attached and not (found or lacking or unknown or base_outside(store)):
        yield passed(name, "none")


def _role(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    """The role and its function are a convenience: without them marks are set by `pgcdp mark` alone.

    While writes wait, whatever is asked of Postgres may wait with them.
    """
    if engine is None or _wait(engine):
        yield passed("role pgcdp", "not looked at: " + ("nothing is captured" if engine is None else "writes wait"))
        return
    dsn = session.Dsn.of(config)
    lacking = role.missing(dsn)
    if lacking:
        yield warned("role pgcdp", f"missing: {', '.join(lacking)}", f"pgcdp up {config.name} makes them")
    more, takes_away = role.excess(dsn)
    if more:
        yield failed("role pgcdp", f"it has more than it needs: {', '.join(more)}", f"as a superuser: {takes_away}")
    if not (lacking or more):
        yield passed("role pgcdp", "least privilege, and pgcdp.mark in every database")


def _places(config: Config) -> Iterator[Finding]:
    """Where store and journal lie, who may read them, and whether one disk takes all with it."""
    backings = {volume.name: volume.backing for volume in config.volumes}
    yield from of_remarks(disks.apart(config.store, config.journal, backings))
    mounted = [volume.mountpoint for volume in config.volumes if volumes.mount_at(volume.mountpoint) is not None]
    yield from of_remarks(disks.inside({"store": config.store, "journal": config.journal}, mounted))
    for what, place in (("store", config.store), ("journal", config.journal)):
        yield from of_remarks(modes.private(what, place))
    try:
        key = keys.source(config.encrypt_key_file, config.encrypt_key_command)
        keys.refuse_captured(key, [volume.mountpoint for volume in config.volumes])
    except PreconditionError as error:
        yield failed("place of the key", error.message, error.hint)


def _machine(config: Config) -> Iterator[Finding]:
    yield from of_remarks(kernel.release_remarks(os.uname().release))
    yield from of_remarks(kernel.doors())
    yield from of_remarks(kernel.loops(config.paths.fuse))


def _clock(config: Config, opened: Opened) -> Iterator[Finding]:
    """As the journal shows it to the agent, and the intervals to everybody."""
    seen: list[clocks.Jump] = []
    with suppress(service.AgentGone):
        told = service.ask(config.paths, "status").get("clock_jumps") or []
        seen = [clocks.Jump(each["write"], each["to_ns"], each["seconds"]) for each in told]
    store = opened.if_it_opens()
    known = [] if store is None else [each.interval for each in published(store).values()]
    before = [] if store is None else clocks.remembered(_events(store))
    base = None if store is None else read_base(store)
    jumps = {each.write: each for each in (*before, *seen) if base is None or each.write > base.write}
    newest = [jumps[write] for write in sorted(jumps)][-clocks.KEPT :]
    yield from of_remarks(clocks.told(newest, clocks.turned_back(known)))


def _events(store: Store) -> list[dict[str, Any]]:
    """The newest of the store's history."""
    catalog = Catalog.open(store)
    try:
        return catalog.history("event", EVENTS)
    finally:
        catalog.close()


def _retention(config: Config) -> Iterator[Finding]:
    policy = policy_of(config)
    if policy.keeps_all:
        yield passed("retention", "everything is kept; the settings keep_writes and so on would say for how long")
        return
    problem = ""
    with suppress(service.AgentGone):
        problem = service.ask(config.paths, "status").get("not_expired", "")
    told = ", ".join(
        f"{name} {exact_period(getattr(config, name))}"
        for name in ("keep_writes", "keep_boundaries", "keep_hourly", "keep_daily")
    )
    if problem:
        yield failed("retention", problem, "pgcdp expire --dry-run tells what would go and what is kept")
    else:
        least = f", least_free {format_size(policy.least_free)}" if policy.least_free else ""
        yield passed("retention", told + least)


def _proofs(config: Config, opened: Opened) -> Iterator[Finding]:
    """What proofs have found, whoever asked for them, and whether boundaries are proven that shall be."""
    store = opened.if_it_opens()
    wrong = [] if store is None else wrong_boundaries(store)
    if wrong:
        yield failed(
            "proofs", f"boundaries that are NOT right: {', '.join(map(str, wrong))}",
            "pgcdp verify --target-boundary N tells what is wrong with one, pgcdp check --full what is damaged",
        )  # fmt: skip
    if not config.verify_boundaries:
        return
    told = service.ask(config.paths, "status").get("proving") or {}
    if told.get("problem"):
        yield failed("proofs", told["problem"], "pgcdp info tells which boundaries were proven, pgcdp verify tries one")
    elif told.get("boundary") is None:
        yield passed("proofs", "each boundary is proven as it is cut; none yet since the agent has begun")
    else:
        yield passed("proofs", f"each boundary is proven as it is cut, the last one {told['boundary']}")


def _journal(config: Config, full: bool, rate: int) -> Iterator[Finding]:
    if not full:
        return
    run_engine(["check", "--journal", os.fspath(config.journal), "--rate", str(rate)])
    yield passed("journal", "every batch is as it was written")


def _store(opened: Opened, config: Config, full: bool, rate: int, progress: Report) -> Iterator[Finding]:
    store = opened.store()
    for said in scrubbing.check(store, full, rate, progress, remember=True):
        yield finding_of(said)
    for said in () if full else scrubbing.known(store, config.scrub_every):
        yield finding_of(said)


def finding_of(said: scrubbing.Said) -> Finding:
    """What was said of a store, as a check."""
    if not said.ok:
        return failed(said.name, said.detail, said.hint, DamageError.kind)
    return warned(said.name, said.detail, said.hint) if said.warning else passed(said.name, said.detail)


def describe_data(data: bytes) -> dict[str, object]:
    """What a write's bytes tell by themselves: pg_control, or nothing yet."""
    blocks = np.frombuffer(data[: len(data) // BLOCK * BLOCK], dtype=np.uint8)
    if not len(blocks):
        return {}
    identifier = int.from_bytes(data[:8], "little")
    for position, control in find_control_blocks(blocks, identifier):
        if position == 0:
            return {"pg_control": describe(control)}
    return {}
