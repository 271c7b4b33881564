"""How fast journal, store and volumes fill, as the agent sees it while it runs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pgcdp.capture.control import EngineStatus
from pgcdp.capture.volumes import mount_at
from pgcdp.config import Config
from pgcdp.horizon import Meter, Rate

JOURNAL_SECONDS = 600.0
STORE_SECONDS = 3600.0
"""Its intervals tell of longer ones (`pgcdp.forecast`), but not of what the image takes."""
VOLUME_SECONDS = 86400.0
"""A filesystem's use goes up and down with vacuum and sorts: a day of it tells where it goes."""


class Rates:
    """Reads now and then; never waits for anything but the kernel's own count of free blocks."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._journal = Meter(JOURNAL_SECONDS, 15)
        self._store = Meter(STORE_SECONDS, 15)
        self._volumes = {volume.name: Meter(VOLUME_SECONDS, 60) for volume in config.volumes}

    def read(self, status: EngineStatus) -> None:
        """Called at each turn."""
        now = time.monotonic()
        if self._journal.due(now):
            self._journal.read(now, written(status))
        if status.state == "stalled":  # nothing is asked of a filesystem that waits for room which the caller makes
            return
        for volume in self._config.volumes:
            meter = self._volumes[volume.name]
            if meter.due(now) and mount_at(volume.mountpoint) is not None:
                meter.read(now, _used(volume.mountpoint))

    def read_store(self) -> None:
        """Called at each turn, but not while the first image is made, which is no rate of anything.

        May wait as long as its disk does. Raises OSError.
        """
        now = time.monotonic()
        if self._store.due(now):
            self._store.read(now, _used(self._config.store))

    def told(self) -> dict[str, Any]:
        """For the status: {"journal", "store", "volumes": {name: ...}},
        each {"bytes_per_second", "over_seconds"} or None."""
        return {
            "journal": _json(self._journal.rate()),
            "store": _json(self._store.rate()),
            "volumes": {name: _json(meter.rate()) for name, meter in self._volumes.items()},
        }


def written(status: EngineStatus) -> int:
    """All bytes that the journal ever took, headers and padding included: segments are numbered in order of use."""
    return status.position.segment * status.segment_bytes + status.position.offset


def _used(place: Path) -> int:
    usage = os.statvfs(place)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize


def _json(rate: Rate | None) -> dict[str, float] | None:
    return None if rate is None else rate._asdict()
