"""The use case of retention: what would go, and letting it go. As in `pgcdp.api`, in the shape of docs/json.md."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable
from typing import Any

from pgcdp.config import Config, load_config
from pgcdp.errors import PreconditionError
from pgcdp.machine import Place
from pgcdp.progress import Report, silent
from pgcdp.records import Interval
from pgcdp.recovery.choosing import Choice, holding_of, would_go
from pgcdp.recovery.expiring import Run, expiring
from pgcdp.recovery.sweeping import waiting_bytes
from pgcdp.store.kept import kept_marks
from pgcdp.store.layout import Store
from pgcdp.store.lease import refuse_other
from pgcdp.store.open_views import seen_views
from pgcdp.store.reserve import Reserve
from pgcdp.store.retention import Holding, Plan, Policy, thinned_bytes
from pgcdp.units import format_time

Json = dict[str, Any]


def policy_of(config: Config) -> Policy:
    """What the settings of a set say."""
    return Policy(config.keep_writes, config.keep_boundaries, config.keep_hourly, config.keep_daily, config.least_free)


def is_rewinding(config: Config) -> bool:
    """Whether a rewind in place is under way, or was left: nothing is let go of then."""
    return config.paths.rewind_state.exists()


def expire_look(set_name: str) -> Json:
    """What `expire` would begin with: nothing is done."""
    config = load_config(set_name)
    store = Store.open(config.store, config.set_id_bytes)
    return _look(config, store)[0]


def _look(config: Config, store: Store) -> tuple[Json, Choice]:
    policy = policy_of(config)
    choice = would_go(store, policy, time.time_ns())
    found = choice.together()
    return {
        **_told(config, store, policy),
        "dry_run": True,
        **plan_json(choice.holding, found),
        "bytes": waiting_bytes(store) + bytes_of(choice.holding, found),
        "waiting": None,
        "failed": [],
    }, choice


def expire(set_name: str, agree: Callable[[Json], None] = lambda told: None, progress: Report = silent) -> Json:
    """Let go of what the policy says. `agree` is told what `expire_look` tells, and raises to stop it.

    What it was told goes, and nothing else, though more may be old enough by then or too little have come back.
    """
    config = load_config(set_name)
    store = Store.open(config.store, config.set_id_bytes)
    told, choice = _look(config, store)
    agree(told)
    if is_rewinding(config):
        raise PreconditionError(
            "a rewind in place is not finished: it needs its recovery point",
            f"unless its command still runs: pgcdp up {set_name} finishes it",
        )
    here = Place.here(config.root)
    refuse_other(store, here)
    with expiring(store):
        before = holding_of(store)
        done = Run(
            store, policy_of(config), level=config.compression_level, progress=progress,
            stop=lambda: is_rewinding(config), by=f"pgcdp expire, {_who()}", shown=choice.stages,
            reserve=Reserve(store, here),
        ).run()  # fmt: skip
    did = plan_json(before, Plan(done.base, tuple(done.joins), tuple(done.thin)))
    return {
        **_told(config, store, policy_of(config)),
        "dry_run": False,
        **did,
        "bytes": done.bytes,
        "waiting": done.waiting or None,
        "failed": done.failed,
    }


def _who() -> str:
    """Who runs this command, as the history says it."""
    name = os.environ.get("SUDO_USER")
    if not name:
        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = str(os.getuid())
    return f"user {name}"


def _told(config: Config, store: Store, policy: Policy) -> Json:
    return {
        "set": config.name,
        "policy": {
            "keep_writes": policy.writes,
            "keep_boundaries": policy.boundaries,
            "keep_hourly": policy.hourly,
            "keep_daily": policy.daily,
            "least_free": policy.least_free,
        },
        "kept": [{"name": each.name, "write": each.write} for each in kept_marks(store)],
        "views": [{"write": each.write} for each in seen_views(store)],
    }


def plan_json(holding: Holding | None, found: Plan) -> Json:
    """What a plan lets go of, of what there was: the keys `oldest`, `joined`, `thinned`, `boundaries` and `writes`."""
    intervals = [] if holding is None else list(holding.intervals)
    by_number = {each.number: each for each in intervals}
    oldest = None if found.base is None else by_number[found.base].boundary
    gone = [each for each in intervals if _goes(each, found)]
    return {
        "oldest": None if oldest is None else {"boundary": oldest.number, "time": format_time(oldest.time_ns)},
        "joined": [{"first": span.first, "last": span.last} for span in found.joins],
        "thinned": list(found.thin),
        "boundaries": _boundaries_that_go(holding, found),
        "writes": [
            {
                "from_write": run[0].from_write,
                "to_write": run[-1].to_write,
                "from_time": format_time(min(each.from_time_ns for each in run)),
                "to_time": format_time(max(each.to_time_ns for each in run)),
            }
            for run in _runs([each for each in gone if each.restorable_by_write])
        ],
    }


def _goes(interval: Interval, found: Plan) -> bool:
    """Whether something of an interval goes."""
    return (
        interval.number <= (found.base or 0)
        or interval.number in found.thin
        or any(span.first <= interval.number <= span.last for span in found.joins)
    )


def _boundaries_that_go(holding: Holding | None, found: Plan) -> list[int]:
    numbers = [] if holding is None else [each.number for each in holding.boundaries()]
    return [
        number for number in numbers
        if number < (found.base or 0) or any(span.first <= number < span.last for span in found.joins)
    ]  # fmt: skip


def _runs(intervals: list[Interval]) -> list[list[Interval]]:
    """Intervals that follow each other, together."""
    found: list[list[Interval]] = []
    for each in intervals:
        if found and found[-1][-1].number == each.first - 1:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def bytes_of(holding: Holding | None, found: Plan) -> int:
    """About how many bytes a plan gives back, at least: what joining saves is not known before."""
    back = 0
    for each in holding.intervals if holding is not None else ():
        if each.number <= (found.base or 0):
            back += sum(each.stored.values())
        elif _goes(each, found):
            back += thinned_bytes(each)
    return back
