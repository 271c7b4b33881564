"""What the filesystems say at a boundary: whose their blocks are, and what of the cluster lies outside of the set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pgcdp import log
from pgcdp.capture.filemap import FileMap, FileMapper, places_of
from pgcdp.capture.outside import Looker, Outside
from pgcdp.config import Config
from pgcdp.intervals.stages import Stages
from pgcdp.store.bundle import Bundle

logger = log.get(__name__)

FILES_SECONDS = 5.0
"""How long a boundary waits for the filesystems to say whose their blocks are; not at all while the journal fills."""
FILES_SHARE = 0.05
"""Part of the time that may go into asking them."""


class Surroundings:
    """Looks without waiting long; while the journal fills (`pressed`) not at all: a filesystem would wait for room that
    only the agent makes."""

    def __init__(self, config: Config, pressed: Callable[[], bool]) -> None:
        self.outside: list[Outside] | None = None  # as the look at the last boundary found; None: that is not known
        mountpoints = [volume.mountpoint for volume in config.volumes]
        self._pressed = pressed
        self._looker = Looker(config.pgdata, mountpoints)
        self._files = FileMapper(places_of(config.pgdata, dict(enumerate(mountpoints))))

    def file_map(self) -> FileMap | None:
        """Whose the blocks are, now."""
        if self._pressed():
            return None
        return self._files.soon(FILES_SECONDS, FILES_SHARE)

    def look_outside(self, stages: Stages) -> list[Outside] | None:
        """What of the cluster is not captured (truth 8), or was not at the boundary before: the interval lacks both.

        None when there is no time to look, or not every volume is mounted, or it was so at the boundary before: then
        nothing found does not mean that nothing is lacking.
        """
        found = None if self._pressed() else self._looker.soon(FILES_SECONDS)
        if found is None:
            self.outside = None
            return None
        before = _told_before(stages) if self.outside is None else self.outside
        for each in set(found) - set(before or ()):
            logger.warning("%s lies outside of the set, in %s: it is not captured", each.name, each.place)
        self.outside = found
        if before is None and not found:
            return None
        return sorted({*(before or ()), *found}, key=lambda each: each.name)


def _told_before(stages: Stages) -> list[Outside] | None:
    """What the newest interval tells, which another agent, or a look that came to nothing, has left."""
    if stages.newest is None or stages.newest.number == 0:
        return []
    told = Bundle.open(stages.store, stages.newest.number).interval.outside
    return None if told is None else [Outside(name, Path(place)) for name, place in told]
