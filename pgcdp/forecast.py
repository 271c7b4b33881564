"""What gets full next, and when: journal, store, and the filesystems of the volumes, at the present rate."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pgcdp.capture.control import EngineStatus
from pgcdp.capture.volumes import mount_at
from pgcdp.config import Config
from pgcdp.fsio import bytes_in, free_space
from pgcdp.horizon import Piece, Rate, present, until_full
from pgcdp.records import Interval

HOUR, DAY = 3600.0, 86400.0


class Forecast(NamedTuple):
    """`room` bytes are left, `seconds` of it at `rate`; None where that is not known, or it does not fill."""

    room: int
    rate: Rate | None
    seconds: float | None

    def as_json(self) -> dict[str, Any]:
        """{"room", "bytes_per_second", "over_seconds", "seconds"}"""
        return {
            "room": self.room,
            "bytes_per_second": None if self.rate is None else round(self.rate.bytes_per_second, 1),
            "over_seconds": None if self.rate is None else round(self.rate.over_seconds, 1),
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }


def _forecast(room: int, rate: Rate | None) -> Forecast:
    return Forecast(max(0, room), rate, until_full(room, rate))


def of_journal(
    config: Config, engine: EngineStatus | None, rates: Mapping[str, Any] | None, intervals: Iterable[Interval]
) -> Forecast | None:
    """How long capture goes on when the store takes nothing any more. None when no engine runs, so that nothing is
    captured, or its disk cannot be looked at.

    At the rate that the agent saw; without one that of the newest intervals.
    """
    if engine is None:
        return None
    try:
        room = min(engine.journal_limit - engine.journal_bytes, journal_disk(config))
    except OSError:
        return None
    seen = _rate((rates or {}).get("journal"))
    return _forecast(room, seen or present(_pieces(intervals, written=True), time.time(), (HOUR,)))


def journal_disk(config: Config) -> int:
    """Bytes that the journal finds on its disk: what is free, and segment files that wait to be used again."""
    return free_space(config.journal) + bytes_in(config.journal.glob("free-*"))


def of_store(config: Config, rates: Mapping[str, Any] | None, intervals: Iterable[Interval]) -> Forecast | None:
    """When its disk is full unless retention lets go of something. None when it cannot be looked at.

    At the rate of its intervals, or the one at which its disk filled while the agent saw it, which is of the last hour
    and has the image in it: the faster one.
    """
    try:
        free = free_space(config.store)
    except OSError:
        return None
    kept, seen = present(_pieces(intervals, written=False), time.time(), (HOUR, DAY)), _rate((rates or {}).get("store"))
    return _forecast(free, max((rate for rate in (kept, seen) if rate is not None), default=None))


def of_volumes(config: Config, rates: Mapping[str, Any] | None) -> dict[str, Forecast]:
    """When Postgres finds no room any more, by volume; those that are not mounted are left out."""
    found = {}
    for volume in config.volumes:
        if mount_at(volume.mountpoint) is not None:
            seen = ((rates or {}).get("volumes") or {}).get(volume.name)
            with suppress(OSError):  # its filesystem has failed
                found[volume.name] = _forecast(_free(volume.mountpoint), _rate(seen))
    return found


def as_json(
    config: Config, engine: EngineStatus | None, agent: Mapping[str, Any], intervals: list[Interval]
) -> dict[str, Any]:
    """The key "until_full" of `status`."""
    rates = agent.get("rates")
    journal, store = of_journal(config, engine, rates, intervals), of_store(config, rates, intervals)
    return {
        "journal": None if journal is None else journal.as_json(),
        "store": None if store is None else store.as_json(),
        "volumes": [{"name": name, **each.as_json()} for name, each in of_volumes(config, rates).items()],
    }


def _free(mountpoint: Path) -> int:
    usage = os.statvfs(mountpoint)
    return usage.f_bavail * usage.f_frsize


def _rate(told: Mapping[str, float] | None) -> Rate | None:
    return None if told is None else Rate(float(told["bytes_per_second"]), float(told["over_seconds"]))


def _pieces(intervals: Iterable[Interval], *, written: bool) -> list[Piece]:
    return [
        Piece(
            each.from_time_ns / 1e9,
            each.to_time_ns / 1e9,
            each.bytes_written if written else sum(each.stored.values()),
        )
        for each in intervals
    ]
