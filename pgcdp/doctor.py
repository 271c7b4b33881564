"""What can be known now about whether the promise holds: `pgcdp check`, and what a captured write holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from pgcdp import rewinding, service
from pgcdp.capture.engine import EngineStatus, run_engine
from pgcdp.capture.outside import all_mounted, find_outside, takes_in
from pgcdp.config import Config, exact_period
from pgcdp.errors import DamageError, PgcdpError
from pgcdp.expiring import policy_of
from pgcdp.fsio import free_space
from pgcdp.postgres import role, session
from pgcdp.postgres.control import describe, find_control_blocks
from pgcdp.progress import Progress, Report
from pgcdp.records import BLOCK, Check
from pgcdp.recovery import merged
from pgcdp.store.base import base_outside
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store
from pgcdp.store.published import published
from pgcdp.store.scrub import check_store
from pgcdp.units import format_duration, format_size

STORE_LEAST_FREE = 1 << 30
RATE_SECONDS = 86400
"""The time whose intervals tell how fast the store grows."""
LOOK_LATE_SECONDS = 300
"""Age of the last look at all catalogs from which on it is told."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A check, of which kind a failure is, and what mends it."""

    check: Check
    kind: str | None = None
    hint: str | None = None


def examine(config: Config, engine: EngineStatus | None, full: bool, progress: Report) -> list[Finding]:
    """All checks of a set. `full` reads all of journal and store. Raises nothing: what is wrong is in the list."""
    steps: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("rewind", lambda: _rewind(config)),
        ("capture", lambda: _capture(config, engine)),
        ("agent", lambda: _agent(config)),
        ("settings", lambda: _settings(config)),
        ("data outside the set", lambda: _outside(config)),
        ("role", lambda: _role(config, engine)),
        ("space", lambda: _space(config)),
        ("retention", lambda: _retention(config)),
        ("journal", lambda: _journal(config, engine, full)),
        ("store", lambda: _store(config, full, progress)),
    ]
    found: list[Finding] = []
    for name, step in steps:
        progress(Progress(f"checking {name}"))
        started = time.monotonic()
        try:
            found.extend(step())
        except PgcdpError as error:
            found.append(_failed(name, error.message, error.hint, error.kind, started))
        except OSError as error:  # a disk that is gone
            found.append(_failed(name, str(error), "see whether it is mounted", started=started))
    return found


def _passed(name: str, detail: str) -> Finding:
    return Finding(Check(name, True, 0.0, detail))


def _failed(
    name: str, detail: str, hint: str | None, kind: str = "precondition", started: float | None = None
) -> Finding:
    seconds = 0.0 if started is None else time.monotonic() - started
    return Finding(Check(name, False, seconds, detail), kind, hint)


def _rewind(config: Config) -> Iterator[Finding]:
    left = rewinding.pending(config.paths)
    if left is None:
        yield _passed("rewind", "none under way")
        return
    ends = "puts everything back" if left.step == "stop" else "finishes it"
    hint = f"unless its command still runs: pgcdp up {config.name} {ends}"
    if left.step != "stop":
        hint += f"; pgcdp restore {config.name} --in-place --target-name {left.mark} goes back to where it began"
    yield _failed("rewind", f"one in place to write {left.point.write} has not ended, its step is {left.step}", hint)


def _capture(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    if engine is None:
        yield _failed("capture", "no engine runs: nothing is captured", f"pgcdp up {config.name}")
    elif engine.state == "stalled":
        yield _failed(
            "capture", "the journal is full: writes wait",
            "see that the agent runs and the store has space, or raise journal_limit",
        )  # fmt: skip
    elif engine.raw.get("errors"):
        yield _failed("capture", "; ".join(engine.raw["errors"]), f"look at {config.paths.engine_log}")
    else:
        yield _passed("capture", f"write {engine.durable_write} is durable")


def _agent(config: Config) -> Iterator[Finding]:
    state = service.ask(config.paths, "status")
    if state["error"]:
        yield _failed("agent", state["error"], f"look at {config.paths.agent_log}")
    else:
        yield _passed("agent", state["phase"])
    age = state.get("look_seconds", 0)
    if state.get("no_look") or age > LOOK_LATE_SECONDS:
        why = state.get("no_look") or "postgres was not asked"
        yield _passed(
            "look at the catalogs", f"warning: the last whole one is {age // 60} min old, names may be lost: {why}"
        )


def _settings(config: Config) -> Iterator[Finding]:
    with session.connect(session.Dsn.of(config)) as connection:
        values = {row["name"]: row["setting"] for row in session.settings(connection)["settings"]}
    for name, why in (
        ("fsync", "a crash image of such a cluster need not be consistent"),
        ("full_page_writes", "pages torn in a crash image cannot be repaired"),
    ):
        if values.get(name) == "off":
            yield _failed(f"setting {name}", f"{name} is off: {why}", f"set {name} = on in postgresql.conf and reload")
        else:
            yield _passed(f"setting {name}", "on")
    if values.get("wal_init_zero") == "off":
        yield _passed(
            "setting wal_init_zero", "warning: off; a commit can be found one or two writes later than it was"
        )


def _outside(config: Config) -> Iterator[Finding]:
    """What nobody captures now, and which intervals lack what nobody captured then (truth 8)."""
    name = "data outside the set"
    mountpoints = [volume.mountpoint for volume in config.volumes]
    attached = all_mounted(mountpoints)
    found = find_outside(config.pgdata, mountpoints) if attached else []
    if found:
        places = ", ".join(f"{each.name} in {each.place}" for each in found)
        yield _failed(name, f"not captured: {places}", takes_in(config.name, found))
    store = Store.open(config.store, config.set_id_bytes)
    told = {number: each.interval.outside for number, each in published(store).items()}
    lacking = [number for number, outside in told.items() if outside]
    unknown = [number for number, outside in told.items() if outside is None]
    if not attached:
        yield _passed(name, "not looked for: the volumes are not mounted")
    if lacking:
        yield _passed(name, f"warning: {len(lacking)} intervals are incomplete, the last one is {lacking[-1]}")
    elif base_outside(store):
        yield _passed(name, "warning: the oldest boundary is incomplete")
    if unknown:
        yield _passed(name, f"warning: of {len(unknown)} intervals it is not known, the last one is {unknown[-1]}")
    if attached and not (found or lacking or unknown or base_outside(store)):
        yield _passed(name, "none")


def _role(config: Config, engine: EngineStatus | None) -> Iterator[Finding]:
    """The role and its function are a convenience: without them marks are set by `pgcdp mark` alone.

    While writes wait, whatever is asked of Postgres may wait with them.
    """
    if engine is None or engine.state == "stalled":
        yield _passed("role pgcdp", "not looked at: " + ("nothing is captured" if engine is None else "writes wait"))
        return
    lacking = role.missing(session.Dsn.of(config))
    if lacking:
        yield _passed("role pgcdp", f"warning: missing: {', '.join(lacking)}; pgcdp up {config.name} makes them")
    else:
        yield _passed("role pgcdp", "least privilege, and pgcdp.mark in every database")


def _space(config: Config) -> Iterator[Finding]:
    used = 0
    for file in config.journal.iterdir():
        with suppress(FileNotFoundError):  # renamed by the engine just now
            used += file.stat().st_size
    room = free_space(config.journal) + used
    if room < config.journal_limit:
        yield _failed(
            "journal space", f"{format_size(room)} for a journal of up to {format_size(config.journal_limit)}",
            "free space there, or lower journal_limit",
        )  # fmt: skip
    else:
        yield _passed("journal space", f"{format_size(room)} for up to {format_size(config.journal_limit)}")
    free = free_space(config.store)
    if free < STORE_LEAST_FREE:
        yield _failed("store space", f"{format_size(free)} free in {config.store}", "make room or move the store")
    else:
        yield _passed("store space", f"{format_size(free)} free{_until_full(config, free)}")
    disks = {os.stat(place).st_dev for place in (config.store, config.journal)}
    if len(disks) == 1:
        yield _passed("store and journal", "warning: on one disk; what takes that disk takes both")


def _until_full(config: Config, free: int) -> str:
    """When the store is full at the rate of the last day, in words; "" when too little is known."""
    known = list(published(Store.open(config.store, config.set_id_bytes)).values())
    newest = known[-1].interval.to_time_ns if known else 0
    recent = [each.interval for each in known if each.interval.to_time_ns > newest - RATE_SECONDS * 10**9]
    seconds = (newest - min((each.from_time_ns for each in recent), default=newest)) / 1e9
    stored = sum(sum(each.stored.values()) for each in recent)
    if seconds < 60 or not stored:
        return ""
    until = free / (stored / seconds)
    grows = f"{format_size(int(stored / seconds * 86400))} a day at the rate of the last {format_duration(seconds)}"
    if until > 365 * 86400:
        return f"; {grows}"
    warn = "" if until > 7 * 86400 else "warning: "
    return f"; {warn}{grows}: full in {format_duration(until)} unless something goes (docs/operations.md, retention)"


def _retention(config: Config) -> Iterator[Finding]:
    policy = policy_of(config)
    if policy.keeps_all:
        yield _passed("retention", "everything is kept; the settings keep_writes and so on would say for how long")
        return
    problem = ""
    with suppress(service.AgentGone):
        problem = service.ask(config.paths, "status").get("not_expired", "")
    told = ", ".join(
        f"{name} {exact_period(getattr(config, name))}"
        for name in ("keep_writes", "keep_boundaries", "keep_hourly", "keep_daily")
    )
    if problem:
        yield _failed("retention", problem, "pgcdp expire --dry-run tells what would go and what is kept")
    else:
        least = f", least_free {format_size(policy.least_free)}" if policy.least_free else ""
        yield _passed("retention", told + least)


def _journal(config: Config, engine: EngineStatus | None, full: bool) -> Iterator[Finding]:
    if not full:
        return
    run_engine(["check", "--journal", os.fspath(config.journal)])
    yield _passed("journal", "every batch is as it was written")


def _store(config: Config, full: bool, progress: Report) -> Iterator[Finding]:
    store = Store.open(config.store, config.set_id_bytes)
    with image_held(store):
        report = check_store(store, full, lambda done, total: progress(Progress("reading the store", done, total)))
    for damage in report.damages:
        message = f"{damage.file} at offset {damage.offset}: {damage.message}"
        yield _failed("store", message, damage.still, DamageError.kind)
    if not report.damages:
        told = f", {report.timelines} timelines of rewinds" if report.timelines else ""
        yield _passed("store", f"{report.files} files, {format_size(report.bytes_read)} read{told}")
    count, size, wrong = merged.check(store, full)
    told = f"{count} files, {format_size(size)} read"
    if wrong:  # expendable: no point is lost by it
        said = "; ".join(damage.message for damage in wrong)
        told = f"warning: {len(wrong)} of {count} are damaged and made anew when they are next needed: {said}"
    yield _passed("merged increments", told)


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
