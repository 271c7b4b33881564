"""What a set is now and what its store holds, in the shape of docs/json.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgcdp import forecast, keeping, rewinding, scrubbing, service
from pgcdp.capture import tracking, volumes
from pgcdp.capture.control import EngineStatus
from pgcdp.config import Config, load_config
from pgcdp.errors import DamageError, PgcdpError, PreconditionError, TargetError
from pgcdp.fsio import bytes_in, told
from pgcdp.opening import engine_status, open_source, outside_json, source_of
from pgcdp.postgres import cluster
from pgcdp.records import Gap, Interval, RecoveryPoint
from pgcdp.recovery import named
from pgcdp.recovery.left import damages_of
from pgcdp.recovery.source import Source
from pgcdp.recovery.target import window
from pgcdp.store.agreement import AGAIN, disagreement
from pgcdp.store.catalog import Catalog
from pgcdp.store.damage import Damage, Range
from pgcdp.store.kept import kept_marks
from pgcdp.store.layout import Store
from pgcdp.store.let_go import EXPIRE
from pgcdp.store.mirroring import Mirror
from pgcdp.units import format_lsn, format_time

Json = dict[str, Any]

EVENTS = 1000
"""So many of the newest events are looked through for what retention did."""
EXPIRED = 10
"""So many of these are told."""


def status(set_name: str) -> Json:
    """The state of a set."""
    config = load_config(set_name)
    engine = engine_status(config)
    try:
        agent: Json = service.ask(config.paths, "status")
    except service.AgentGone:
        agent = {}
    stored, opened, damage = None, None, None
    source: Source | None = None
    intervals: list[Interval] = []
    try:
        source = source_of(config, engine)
    except PreconditionError as error:
        if engine is None or engine.released_write:  # else the agent is about to make it
            damage = error.message
    except DamageError as error:
        damage = error.message
    except OSError as error:  # the store's disk fails
        damage = told(error)
    else:
        try:
            try:
                points = source.window()
            except DamageError as error:
                damage, points = error.message, window(source.published())
            except OSError as error:  # the journal's directory is gone
                damage, points = told(error), window(source.published())
            opened = window_json(*points)
            intervals = source.intervals()
            stored = intervals[-1] if intervals else None
        except (PreconditionError, TargetError):
            pass
        except OSError as error:
            damage = told(error)
    # Without the store, what it holds is known from the agent, so that the lag is.
    stored_write = stored.to_write if stored else opened["from_write"] if opened else agent.get("stored_write", 0)
    behind = stored.to_time_ns if stored else agent.get("stored_time_ns")
    return {
        "set": set_name,
        "dsn": service_dsn(config),
        "state": keeping.state_of(config, engine),
        "postgres": _postgres(config, engine),
        "phase": agent.get("phase", "stopped"),
        "error": "; ".join(_wrong(engine, _of_agent(agent) or damage or _interrupted(config))) or None,
        "held": keeping.held_json(config, engine, agent),
        "tracked": tracking.as_json(engine),
        "baseline": agent.get("baseline"),
        "engine": engine.raw if engine else None,
        "agent": agent or None,
        "last_write": engine.last_write if engine else _last(opened),
        "durable_write": engine.durable_write if engine else _last(opened),
        "stored_write": stored_write,
        "intervals": len(intervals),
        "lag_seconds": None if behind is None else max(0.0, (time.time_ns() - behind) / 1e9),
        "journal": {
            "bytes": engine.journal_bytes if engine else journal_bytes(config),
            "limit": config.journal_limit,
        },
        "recovery_window": opened or {"from_time": None, "to_time": None, "from_write": None, "to_write": None},
        "until_full": forecast.as_json(config, engine, agent, intervals),
        "outside": agent.get("outside"),
        "scrub": None if source is None else scrubbing.status_json(source.store, lambda: bool(agent.get("scrubbing"))),
        "volumes": [
            {
                "name": volume.name,
                "device": next((str(d) for d in volumes.loops_over(config.paths.fuse / volume.name)), None),
                "backing": str(volume.backing),
                "mountpoint": str(volume.mountpoint),
                "bytes": volume.bytes,
            }
            for volume in config.volumes
        ],
    }


def _wrong(engine: EngineStatus | None, other: str | None) -> list[str]:
    """What does not work: the disks of journal and volumes first, since production waits for them."""
    return [*(engine.errors if engine else ()), *([other] if other else [])]


def _of_agent(agent: Json) -> str | None:
    """What keeps it from its work, with what mends that."""
    error, hint = agent.get("error"), agent.get("hint")
    return f"{error} ({hint})" if error and hint else error


def _postgres(config: Config, engine: EngineStatus | None) -> str:
    """Whether it runs. While writes wait for a capture process, what lies on the volumes is not looked at."""
    waits = engine is None and keeping.state_of(config, engine) == "stalled"
    found = cluster.find_processes(config.pgdata) if waits else cluster.find_postmaster(config.pgdata)
    return "running" if found else "stopped"


def _interrupted(config: Config) -> str | None:
    if config.paths.extend_state.exists():
        return (
            "taking a tablespace into the set has not ended: unless its command still runs, "
            f"pgcdp up {config.name} finishes it or puts everything back"
        )
    if config.paths.heal_state.exists():
        return (
            "taking in what was changed on the volumes has not ended: unless its command still runs, "
            f"pgcdp up {config.name} finishes it"
        )
    if config.paths.remake_state.exists():
        return f"writing volumes anew has not ended: unless its command still runs, pgcdp up {config.name} finishes it"
    left = rewinding.pending(config.paths)
    if left is None:
        return None
    return (
        f"a rewind in place to write {left.point.write} is not finished: unless its command still runs, "
        f"pgcdp up {config.name} goes on with it"
    )


def _last(opened: Json | None) -> int:
    return int(opened["to_write"]) if opened else 0


def service_dsn(config: Config) -> str:
    """How a client on this machine reaches the protected cluster."""
    return f"host={config.cluster.socket_directory} port={config.cluster.port} dbname=postgres"


def journal_bytes(config: Config) -> int:
    """Bytes of the journal's segments on disk."""
    return bytes_in(config.journal.glob("*.seg"))


def info(set_name: str | None, store: Path | None = None) -> Json:
    """Intervals, sizes, recovery window, what was verified."""
    source = open_source(set_name, store)
    try:
        first, last = source.window()
    except DamageError:  # behind the last boundary: what lies before it can be listed all the same
        first, last = window(source.published())
    listed = source.listed()
    damages = damages_of(source) + ([] if store is None else _of_another_moment(source))
    verified, events = _remembered(source.store, list(listed), catch_up=store is not None)
    known: list[Json] | None = None
    with suppress(DamageError, PreconditionError):  # intervals can be listed all the same
        known = marks(source)
    lost = [each.lost for each in damages if each.lost is not None]
    return {
        "set": source.store.set_name,
        "recovery_window": window_json(first, last),
        "intervals": [
            interval_json(each.interval, verified.get(number), lost, bool(each.damage))
            for number, each in listed.items()
        ],
        "marks": known,
        "gaps": gaps_json(source),
        "restarts": keeping.restarts_json(events),
        "expired": [_expired(each) for each in events if each.get("event") == EXPIRE][:EXPIRED],
        "damages": [damage_json(each) for each in damages],
        "lost": [_lost_json(first, last) for first, last in _joined(lost)],
    }


def _of_another_moment(source: Source) -> list[Damage]:
    """Of a store alone, which may be a copy that was made while it was written: no point is right then."""
    with suppress(DamageError, PreconditionError, OSError):  # what is damaged is told of as that
        found = disagreement(source.store)
        if found is not None:
            return [Damage(found.file, found.offset, found.message, AGAIN, (source.base().write, None))]
    return []


def _remembered(store: Store, numbers: Sequence[int], *, catch_up: bool) -> tuple[dict[int, Json], list[Json]]:
    """The newest verification of each interval, and the newest events; nothing when the catalog cannot be read.

    `catch_up`: no agent of this machine fills it.
    """
    try:
        if catch_up:
            mirror = Mirror(store, make=True)
            try:
                mirror.catch_up()
            finally:
                mirror.close()
        catalog = Catalog.open(store)
    except PgcdpError:
        return {}, []
    try:
        found = {number: catalog.last_verification(number) for number in numbers}
        return {number: each for number, each in found.items() if each is not None}, catalog.history("event", EVENTS)
    except PgcdpError:
        return {}, []
    finally:
        catalog.close()


def damage_json(damage: Damage) -> Json:
    """One damage: what is wrong where, and what it costs."""
    return {
        "file": str(damage.file),
        "offset": damage.offset,
        "message": damage.message,
        "still": damage.still,
        "lost": None if damage.lost is None else _lost_json(*damage.lost),
    }


def _lost_json(first: int, last: int | None) -> Json:
    return {"from_write": first, "to_write": last}


def _joined(lost: Sequence[Range]) -> list[Range]:
    """Ranges of writes in order, those that overlap joined."""
    found: list[Range] = []
    for first, last in sorted(lost, key=lambda each: each[0]):
        if found and (found[-1][1] is None or first <= found[-1][1] + 1):
            before = found[-1][1]
            found[-1] = (found[-1][0], None if before is None or last is None else max(before, last))
        else:
            found.append((first, last))
    return found


def lost_in(first: int, last: int, lost: Sequence[Range]) -> list[Range]:
    """What of writes `first` to `last` is lost."""
    within = [(max(first, begin), last if end is None else min(last, end)) for begin, end in lost]
    return _joined([(begin, end) for begin, end in within if begin <= end])


def gaps_json(source: Source) -> list[Json] | None:
    """Gaps in order of writes, as far as they are known; None when what may tell of them cannot be read."""
    try:
        return [gap_json(gap) for gap in source.gaps()]
    except (DamageError, PreconditionError, TargetError):
        return None


def gap_json(gap: Gap) -> Json:
    """A gap: no recovery point is among its writes, nor between its times."""
    return {
        "from_write": gap.begin,
        "to_write": None if gap.end is None else gap.end - 1,
        "from_time": format_time(gap.since_ns),
        "to_time": None if gap.to_ns is None else format_time(gap.to_ns),
        "reason": gap.reason,
        "blocks": gap.blocks,
    }


def _expired(event: Json) -> Json:
    """What retention let go of, as the history says."""
    return {
        "time": format_time(event["time_ns"]),
        "by": event["by"],
        "oldest": event["base"],
        "joined": [{"first": first, "last": last} for first, last in event["joined"]],
        "thinned": [{"first": first, "last": last} for first, last in event["thinned"]],
    }


def interval_json(interval: Interval, verified: Json | None, lost: Sequence[Range] = (), damaged: bool = False) -> Json:
    """One interval of `info`. `damaged`: it cannot be read, and all that is known of it is what lies beside it."""
    boundary = interval.boundary
    gone = lost_in(interval.from_write, interval.to_write, lost)
    return {
        "number": interval.number,
        "from_write": interval.from_write,
        "to_write": interval.to_write,
        "from_time": format_time(interval.from_time_ns),
        "to_time": format_time(interval.to_time_ns),
        "reason": boundary.reason,
        "checkpoint_lsn": None if damaged else format_lsn(boundary.checkpoint_lsn),
        "redo_lsn": None if damaged else format_lsn(boundary.redo_lsn),
        "timeline": None if damaged else boundary.timeline,
        "next_xid": None if damaged else boundary.next_xid,
        "writes": interval.writes,
        "bytes_written": interval.bytes_written,
        "blocks_changed": interval.blocks_changed,
        "stored": interval.stored,
        "first": interval.first,
        "restorable_by_write": interval.restorable_by_write and not gone,
        "lost": [_lost_json(begin, end) for begin, end in gone],
        "outside": outside_json(interval.outside),
        "verified": None if verified is None else _verified(verified),
    }


def _verified(entry: Json) -> Json:
    """What a verification found, and when."""
    return {**{key: value for key, value in entry.items() if key != "time_ns"}, "time": format_time(entry["time_ns"])}


def window_json(first: RecoveryPoint, last: RecoveryPoint) -> Json:
    """A recovery window."""
    return {
        "from_time": format_time(first.time_ns),
        "to_time": format_time(last.time_ns),
        "from_write": first.write,
        "to_write": last.write,
    }


def marks(source: Source) -> list[Json]:
    """Marks and restore points, newest first: {"name", "kind", "write", "lsn", "kept"}."""

    kept = {each.write for each in kept_marks(source.store)}

    def look() -> list[Json]:
        found = named.marks(source.transactions().everywhere().history())
        return [
            {
                "name": each.event["name"],
                "kind": each.event["kind"],
                "write": each.write,
                "lsn": None if each.event["lsn"] is None else format_lsn(each.event["lsn"]),
                "kept": each.write in kept,
            }
            for each in found
        ]

    return source.again(look)
