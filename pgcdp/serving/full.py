"""What the agent does when the store's disk is full: retention by the settings, and words when they give nothing.

It comes before the agent goes on, who would else fill what the reserve gives free. Nothing goes that the settings
keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgcdp import log
from pgcdp.config import Config
from pgcdp.errors import PgcdpError
from pgcdp.expiring import bytes_of, is_rewinding, policy_of
from pgcdp.fsio import NO_ROOM, free_space
from pgcdp.machine import Place
from pgcdp.recovery.choosing import Choice, would_go
from pgcdp.recovery.expiring import AnotherRuns, Run, Unreadable, expiring
from pgcdp.recovery.sweeping import waiting_bytes
from pgcdp.setting_values import exact_period
from pgcdp.store.layout import Store
from pgcdp.store.lease import refuse_other
from pgcdp.store.reserve import MOST_BYTES, SPARE_BYTES, Reserve
from pgcdp.store.retention import Policy, plan
from pgcdp.units import format_size

logger = log.get(__name__)

ENOUGH_BYTES = MOST_BYTES + 2 * SPARE_BYTES
"""When so much is free, what else may go can go beside the agent's work."""
KEPT = ("writes", "boundaries", "hourly", "daily")
PERIODS = (30 * 86400.0, 7 * 86400.0, 86400.0, 3600.0, 0.0)
"""What is tried, to tell what a setting would give."""


class Made(NamedTuple):
    """Bytes that came back; if none did, why, in words."""

    bytes: int
    why: str


def of_the_store(config: Config, error: PgcdpError | OSError) -> bool:
    """Whether it is the store's disk that has no room."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM:
        return False
    return error.filename is None or Path(str(error.filename)).is_relative_to(config.store)


def make_room(config: Config, unreadable: Unreadable, stopping: Callable[[], bool]) -> Made:
    """Let go of what the settings say, with the reserve's room where there is none, until enough is free.

    Raises PgcdpError and OSError.
    """
    store, here, policy = Store.open(config.store, config.set_id_bytes), Place.here(config.root), policy_of(config)
    refuse_other(store, here)
    if is_rewinding(config):
        return Made(0, "a rewind in place is not finished, and may need what retention would let go of")
    now = time.time_ns()
    choice = would_go(store, policy, now, avoid=unreadable.steps())
    if not any(choice.stages) and not waiting_bytes(store):
        return Made(0, _nothing_to_give(choice, policy, now))

    def stop() -> bool:
        enough = run.done.bytes and free_space(store.path) >= ENOUGH_BYTES
        return stopping() or is_rewinding(config) or bool(enough)

    run = Run(
        store, policy, level=config.compression_level, unreadable=unreadable, stop=stop, reserve=Reserve(store, here)
    )
    try:
        with expiring(store):
            done = run.run()
    except AnotherRuns:
        return Made(0, "another run of retention goes on")
    finally:
        run.done.tell()
    why = f"what retention let go of comes back later: {done.waiting}" if done.waiting else "retention was stopped"
    return Made(done.bytes, "; ".join(done.failed) or why)


def _nothing_to_give(choice: Choice, policy: Policy, now_ns: int) -> str:
    """What keeps everything, and which settings would give how much."""
    if choice.holding is None:
        return "retention has nothing to give: the first image is not complete"
    keeps = f"the settings and {choice.kept_for} keep" if choice.kept_for else "the settings keep"
    why = f"retention has nothing to give: {keeps} all that is there"
    found = [each for each in (_offer(choice, policy, names, now_ns) for names in (("writes",), KEPT)) if each]
    return why + "".join(f"; {each}" for each in found)


def _offer(choice: Choice, policy: Policy, names: tuple[str, ...], now_ns: int) -> str:
    """What the longest period gives that gives enough; else what the shortest does. "" for nothing."""
    assert choice.holding is not None
    assert choice.pins is not None
    best = 0.0, 0
    for period in PERIODS:
        back = bytes_of(choice.holding, plan(choice.holding, _shorter(policy, names, period), choice.pins, now_ns))
        if back > best[1]:
            best = period, back
        if back >= SPARE_BYTES:
            break
    period, back = best
    if not back:
        return ""
    which = " and ".join(filter(None, (", ".join(f"keep_{name}" for name in names[:-1]), f"keep_{names[-1]}")))
    return f'{which} = "{exact_period(period)}" would give back about {format_size(back)}'


def _shorter(policy: Policy, names: tuple[str, ...], period: float) -> Policy:
    for name in names:
        if getattr(policy, name) is None or getattr(policy, name) > period:
            policy = replace(policy, **{name: period})  # type: ignore[arg-type]
    return policy
