"""Whether journal and volumes are those that the set was captured with last, before capture starts on them.

Capture begins with a replay of its journal onto the volumes. An older one would write what they had then over what they
have by now: a copy from a backup, or a disk that was not mounted for a while and is again. And another disk in the
place of one that died would be taken for the volume, with all that it lacks. So each journal has an identity, which is
a new one when it begins anew; the set's state directory knows it, how far its applied mark had come, and the filesystem
of each volume. These are noted at each start and at each stop in order.

What is not found by this: a copy that was made since capture was started last, brought back after a crash; of a volume,
stale.py finds that.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp import fsio
from pgcdp.capture import backings
from pgcdp.capture.journal import Journal
from pgcdp.capture.superblock import identity, reading
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.sets import SetPaths, list_sets, set_paths

log = logging.getLogger(__name__)

FILE = "parts.json"
"""In the state directory: {"journal", "mark", "volumes", "taken_at"}."""
IDENTITY = "journal.json"
"""In the journal: {"id"}."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The journal's identity, the least sequence that its applied mark has; {volume: its filesystem}.

    `taken_at`: see the function; None where an older version noted it.
    """

    journal: str
    mark: int
    volumes: dict[str, str]
    taken_at: int | None = None


def refuse_other(config: Config) -> None:
    """Raises PreconditionError when another journal, or another disk under a volume, is at its place."""
    refuse_other_journal(config)
    known = _known(config.paths)
    if known is None:
        return
    for volume in config.volumes:
        was = known.volumes.get(volume.name)
        now = None if was is None else _filesystem(volume.backing)
        if now is not None and was != now:
            raise PreconditionError(
                f"{volume.backing} holds {now or 'no filesystem'}, and volume {volume.name} of {config.name} had "
                f"{was}: it is another disk",
                f"bring the one back that was there; if it is lost: {backings.remakes(config, volume)}. Who knows that "
                f"this is the volume all the same, removes {config.paths.state / FILE}",
            )


def refuse_other_journal(config: Config) -> None:
    """The same of the journal alone."""
    known = _known(config.paths)
    if known is None:
        return
    try:
        marks = Journal(config.journal, config.set_id_bytes).applied_marks()
        there = _identity(config)
    except (DamageError, OSError):  # of the mark, the engine tells; which journal it is can be not known
        return
    if marks is None:
        return
    least = known.mark - (len(marks) == 1)  # the newest slot may be torn, or damaged: the one before it counts then
    if there == known.journal and max(mark.sequence for mark in marks) >= least:
        return
    why = "it is an older copy" if there == known.journal else "it is another one"
    raise PreconditionError(
        f"the journal {config.journal} is not what {config.name} was captured with last: {why}, whose writes would "
        "overwrite newer ones on the volumes",
        "bring back the newest one, or mount its disk; without it, what the store has can be restored: pgcdp restore "
        f"--store {config.store} --to-directory DIR. Who knows that it is the newest all the same, removes "
        f"{config.paths.state / FILE}",
    )


def taken_at(config: Config) -> int | None:
    """The write behind which the volumes hold what the journal says; None when that is not known.

    What was on them when they were taken as they are (`forget`) need not be in it. Raises DamageError, OSError.
    """
    known = _known(config.paths)
    return known.taken_at if known is not None and known.journal == _identity(config) else None


def refuse_anothers(config: Config, volume: VolumeConfig) -> None:
    """Raises PreconditionError when the disk at a volume's place has what another volume had, of whichever set."""
    now = _filesystem(volume.backing)
    for name in list_sets() if now else []:
        known = _known(set_paths(name))
        for other, had in ({} if known is None else known.volumes).items():
            if had == now and (name, other) != (config.name, volume.name):
                raise PreconditionError(
                    f"{volume.backing}, where volume {volume.name} of {config.name} is to be written, holds {now}: "
                    f"that is volume {other} of {name}",
                    f"give it another disk. If this is a copy that may go: wipefs --all {volume.backing}",
                )


def note(config: Config) -> None:
    """Capture runs on what is there, or has just stopped; durably. Where that cannot be noted, less will be found."""
    try:
        mark = Journal(config.journal, config.set_id_bytes).applied_mark()
        if mark is None:
            return
        fsio.sync_file(config.journal / "applied")  # what a power cut takes back must not be what is asked for
        with suppress(DamageError):
            found, known = _identity(config), _known(config.paths)
            if found is None:
                found = renew(config, None if known is None else known.journal)
            same = known is not None and known.journal == found
            taken = known.taken_at if known is not None and same else None
            volumes = {volume.name: had for volume in config.volumes if (had := _filesystem(volume.backing))}
            config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            parts = {"journal": found, "mark": mark.sequence, "volumes": volumes}
            parts["taken_at"] = mark.durable_write if taken is None else taken
            fsio.write_json(config.paths.state / FILE, parts)
    except (OSError, DamageError) as error:
        log.warning("which journal %s was captured with could not be noted: %s", config.name, error)


def forget(paths: SetPaths) -> None:
    """Whatever is there at the next start is taken, durably. Harmless when done twice."""
    if (paths.state / FILE).exists():
        fsio.remove_durably(paths.state / FILE)


def renew(config: Config, identity: str | None = None) -> str:
    """The journal is another one from now on, durably; its identity."""
    identity = identity or secrets.token_hex(16)
    fsio.write_json(config.journal / IDENTITY, {"id": identity})
    return identity


def _identity(config: Config) -> str | None:
    """That of the journal. Raises DamageError, OSError."""
    try:
        return str(fsio.read_json(config.journal / IDENTITY).get("id"))
    except FileNotFoundError:
        return None


def _known(paths: SetPaths) -> _Parts | None:
    try:
        content = fsio.read_json(paths.state / FILE)
        taken = content.get("taken_at")
        taken = None if taken is None else int(taken)
        return _Parts(str(content["journal"]), int(content["mark"]), dict(content["volumes"]), taken)
    except (OSError, DamageError, KeyError, TypeError, ValueError):
        return None


def _filesystem(backing: Path) -> str | None:
    """Which one it holds, "" for none; None when it cannot be read."""
    try:
        with reading(backing) as read:
            return identity(read)
    except OSError:
        return None
