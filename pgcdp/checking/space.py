"""Room for journal, store and volumes, and how long it lasts at the present rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pgcdp import forecast, service
from pgcdp.capture.control import EngineStatus
from pgcdp.checking.finding import Finding, failed, passed, warned
from pgcdp.checking.opened import Opened
from pgcdp.config import Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.forecast import Forecast
from pgcdp.fsio import bytes_in, free_space
from pgcdp.horizon import in_words
from pgcdp.records import Interval
from pgcdp.store.published import published
from pgcdp.units import format_size

STORE_LEAST_FREE = 1 << 30
VOLUME_LEAST_FREE = 32 << 20
"""Two segments of WAL."""
JOURNAL_SOON = 3600.0
"""A store that is away for less than that should not stop production."""
DISK_SOON = 7 * 86400.0
"""Time to buy a disk."""


def examine(config: Config, engine: EngineStatus | None, opened: Opened) -> Iterator[Finding]:
    """Raises OSError when a disk is gone."""
    rates: dict[str, Any] = {}
    with suppress(service.AgentGone):
        rates = service.ask(config.paths, "status").get("rates") or {}
    intervals: list[Interval] = []
    store = opened.if_it_opens()
    if store is not None:
        with suppress(PreconditionError, DamageError):  # of it, the step about the store tells
            intervals = [each.interval for each in published(store).values()]
    yield from _journal(config, forecast.of_journal(config, engine, rates, intervals))
    yield from _store(config, forecast.of_store(config, rates, intervals))
    for name, each in forecast.of_volumes(config, rates).items():
        yield from _volume(name, each, config.name)


def _journal(config: Config, ahead: Forecast | None) -> Iterator[Finding]:
    room, limit = free_space(config.journal) + bytes_in(config.journal.iterdir()), config.journal_limit
    if room < limit:
        yield failed(
            "journal space", f"{format_size(room)} for a journal of up to {format_size(limit)}",
            "free space there, or lower journal_limit",
        )  # fmt: skip
        return
    yield _lasting(
        "journal space", f"{format_size(room)} for up to {format_size(limit)}", ahead,
        " if the store took nothing any more, then writes wait", JOURNAL_SOON,
        "raise journal_limit: so long the store may be away, or slower than what is written",
    )  # fmt: skip


def _store(config: Config, ahead: Forecast | None) -> Iterator[Finding]:
    free = free_space(config.store)
    if free < STORE_LEAST_FREE:
        yield failed("store space", f"{format_size(free)} free in {config.store}", "make room or move the store")
        return
    yield _lasting(
        "store space", f"{format_size(free)} free", ahead, " unless something goes", DISK_SOON,
        "a larger disk, or keep_writes and the other settings of retention (docs/operations.md)",
    )  # fmt: skip


def _volume(name: str, ahead: Forecast, set_name: str) -> Iterator[Finding]:
    what, hint = f"space on volume {name}", f"pgcdp grow {set_name} SIZE --volume {name}, or remove what is not needed"
    if ahead.room < VOLUME_LEAST_FREE:
        yield failed(what, f"full, with {format_size(ahead.room)} free: Postgres finds no room, or soon will not", hint)
    else:
        yield _lasting(what, f"{format_size(ahead.room)} free", ahead, "", DISK_SOON, hint)


def _lasting(what: str, told: str, ahead: Forecast | None, unless: str, soon: float, hint: str) -> Finding:
    """How long the room lasts, where that is known; a warning when that is less than `soon` seconds."""
    if ahead is None or ahead.seconds is None:
        return passed(what, told)
    told += f"; {_when(ahead)}{unless}"
    return warned(what, told, hint) if ahead.seconds < soon else passed(what, told)


def _when(ahead: Forecast) -> str:
    assert ahead.seconds is not None
    if ahead.rate is None or not ahead.room:
        return "full"
    return f"full in {in_words(ahead.seconds)} at the present rate ({ahead.rate})"
