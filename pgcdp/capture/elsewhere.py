"""Signs of a capture process elsewhere, before its set is taken over: what of it can be seen from here.

It has the journal's lock, which is seen where locks reach: on this machine, and on a network filesystem that passes
them on. It writes batches and the applied mark to the journal, and to the volumes, which is seen on disks that both
machines have: files of the journal change, and superblocks. After a clean stop nothing captures, so nothing is watched.
What cannot be seen: one that has nothing to write as long as it is watched, and one with another copy of the disks.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from pgcdp import fsio
from pgcdp.capture import home
from pgcdp.capture.journal import Journal
from pgcdp.capture.superblock import read_superblock, reading
from pgcdp.config import Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.progress import Progress, Report

WATCH_SECONDS = 25.0
LOOK_SECONDS = 0.2


class Watch:
    """Begun as it is made. Nothing is watched where the set is at home here, or was stopped cleanly."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._away = not home.is_here(config)
        self._seen = _signs(config)
        self._until = time.monotonic() + (WATCH_SECONDS if self._away and not _stopped_cleanly(config) else 0.0)

    def look(self) -> bool:
        """Whether it must be looked again. Raises PreconditionError when a capture process lives elsewhere."""
        if not self._away:
            return False
        config, now = self._config, _signs(self._config)
        changed = sorted(name for name in now.keys() | self._seen.keys() if now.get(name) != self._seen.get(name))
        with suppress(OSError):  # it cannot be opened: the engine tells of it
            if fsio.is_locked(config.journal / "lock"):
                raise _refused(config, "which has it locked")
        if changed:
            raise _refused(config, f"which has just written to {changed[0]}")
        return time.monotonic() < self._until

    def end(self, progress: Report) -> None:
        """Look until it was watched for long enough. Raises as `look`."""
        while self.look():
            progress(Progress(f"watching whether {self._config.name} is captured elsewhere"))
            time.sleep(LOOK_SECONDS)


def _refused(config: Config, why: str) -> PreconditionError:
    return PreconditionError(
        f"the journal {config.journal} of set {config.name} is in use by a capture process elsewhere, {why}",
        f"stop it there first: pgcdp down {config.name}",
    )


def _signs(config: Config) -> dict[str, object]:
    """What changes as something is captured, by the path that it is seen at."""
    found: dict[str, object] = {}
    with suppress(OSError):
        for file in config.journal.iterdir():
            found[str(file)] = _last_written(file)
    for volume in config.volumes:
        with suppress(OSError), reading(volume.backing) as read:
            found[str(volume.backing)] = read_superblock(read)
    return found


def _last_written(file: Path) -> tuple[int, int] | None:
    """As the file's own disk has it: opening asks a network filesystem anew."""
    with suppress(OSError), file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        return status.st_mtime_ns, status.st_size
    return None


def _stopped_cleanly(config: Config) -> bool:
    try:
        mark = Journal(config.journal, config.set_id_bytes).applied_mark()
    except (OSError, DamageError):
        return False
    return mark is not None and mark.clean
