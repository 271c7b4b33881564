"""What keeps a set's connection while its capture process dies or is upgraded, as it is told; and the upgrade."""

from __future__ import annotations

from typing import Any

from pgcdp import service
from pgcdp.capture import attach, held, holder
from pgcdp.capture.control import EngineStatus
from pgcdp.config import Config
from pgcdp.progress import Progress, Report, silent
from pgcdp.serving.keeping import CAPTURE
from pgcdp.units import format_time

Json = dict[str, Any]

TOLD = 10
"""So many of the newest restarts are told."""


def state_of(config: Config, engine: EngineStatus | None) -> str:
    """The set's state. Without an engine, writes wait for the next one ("stalled") where a holder keeps its place."""
    if engine is not None:
        return engine.state
    return "stopped" if holder.find(config.paths) is None else "stalled"


def held_json(config: Config, engine: EngineStatus | None, agent: Json) -> Json:
    """The holder's part of `pgcdp status`; `agent` is what the agent says, {} without one."""
    found = holder.find(config.paths)
    return {
        "holder": found.pid if found else None,
        "restarts": found.restarts if found else 0,
        "resent": found.resent if found else 0,
        "problem": agent.get("not_kept") or problem(config, engine),
    }


def problem(config: Config, engine: EngineStatus | None) -> str | None:
    """Why capture would not outlive its process now, or has not; None when it would, and when nothing is captured."""
    found = holder.find(config.paths)
    if engine is None:
        if found is None:
            return None
        return f"no capture process serves the volumes: writes wait for one; pgcdp up {config.name} starts it"
    if found is not None:
        return None
    if engine.raw.get("held"):
        return (
            f"the holder is gone: if capture dies, too, Postgres sees I/O errors; pgcdp up {config.name} starts another"
        )
    why = (
        holder.missing()
        or f"it was started without one; pgcdp down {config.name} and pgcdp up {config.name} change that"
    )
    return f"if capture dies, Postgres sees I/O errors: no holder: {why}"


def restarts_json(events: list[Json]) -> list[Json]:
    """The newest restarts of capture, out of the events of a history."""
    return [
        {
            "time": format_time(each["time_ns"]),
            "why": each["why"],
            "pid": each["pid"],
            "seconds": each["seconds"],
        }
        for each in events
        if each.get("event") == CAPTURE
    ][:TOLD]


def upgrade(config: Config, progress: Report = silent) -> Json:
    """Agent and capture process are those of the installed version; Postgres runs on, its writes wait meanwhile.

    {"pid", "seconds"} of the new capture process. Raises PreconditionError, with nothing changed, where that cannot be.
    """
    with attach.hold(config.paths):
        held.refuse_swap(config)
        progress(Progress("restarting the agent"))
        service.stop(config)
        service.start(config)
        progress(Progress("swapping the capture process"))
        return service.ask(config.paths, "swap", timeout=None)
