"""Whether somebody wrote to a volume while it was plain: its fingerprint at `down`, compared at `up`.

A cleanly detached volume can be mounted without pgcdp. What is written to it then is in no journal, and would falsify
every later restore. So when a set is detached, it is written down beside the journal how each volume was: its
filesystem's superblock and where its log goes on, and pg_control, read from the backing itself. The engine holds the
backings until that is durable. The next start compares before anything is attached.

The file (FORMAT.md 1.7) speaks of one clean stop: of write `write`, the last one of the journal. After an unclean stop
it says nothing, since the volumes are then what the journal is about to make of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pgcdp import fsio, log
from pgcdp.capture import backings, same_parts, volumes
from pgcdp.capture.control import EngineClient, EngineGone
from pgcdp.capture.filemap import file_extents
from pgcdp.capture.journal import Journal
from pgcdp.capture.superblock import LogHead, Read, Superblock, checksum, read_superblock, reading
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.postgres.control import find_control_blocks
from pgcdp.records import BLOCK
from pgcdp.units import format_lsn, format_time

FILE = "fingerprint.json"
_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class ControlPlace:
    """pg_control on a volume: where, in bytes, and the newest checkpoint and checksum of the block there."""

    volume: str
    at: int
    checkpoint_lsn: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """How the volumes were, by name, when the set was detached at `time_ns`, with `write` the journal's last write."""

    write: int
    time_ns: int
    volumes: dict[str, Superblock]
    control: ControlPlace | None


class ChangedError(PreconditionError):
    """A volume was changed while it was detached."""


# --- when it is detached


def control_place(config: Config) -> tuple[str, int] | None:
    """The volume that holds pg_control, and where in bytes; None when it cannot be asked. Call it while mounted."""
    path = config.pgdata / "global/pg_control"
    number = max(
        (n for n, each in enumerate(config.volumes) if path.is_relative_to(each.mountpoint)),
        key=lambda n: len(config.volumes[n].mountpoint.parts),
        default=None,
    )
    if number is None or volumes.mount_at(config.volumes[number].mountpoint) is None:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            extents, _ = file_extents(fd)
        finally:
            os.close(fd)
    except OSError:  # of a filesystem that is dead
        return None
    first = [block for block, _, at in extents if at == 0]
    return (config.volumes[number].name, first[0] * BLOCK) if first else None


def keep(config: Config, place: tuple[str, int] | None) -> int | None:
    """Write down how the volumes are, durably. Nothing is mounted, and the engine still holds the backings.

    Returns the last write, which is on them. None: not all is.

    `place`: as `control_place` told it while they were mounted. Nothing is written where the engine cannot bring all to
    the volumes: what then stops is not plain, and the next start replays its journal.
    """
    client = EngineClient(config.paths.control)
    try:
        write = client.sync()
        found = _taken(config, write, place)
    except EngineGone:
        return None
    except (PgcdpError, OSError) as error:
        _log.warning("how the volumes of %s are could not be written down: %s", config.name, error)
        return None
    if not config.journal.is_dir():  # removed while the set ran
        fsio.make_directory(config.journal)
    fsio.write_json(config.journal / FILE, asdict(found))
    return write


def _taken(config: Config, write: int, place: tuple[str, int] | None) -> Fingerprint:
    if place is None:  # mounted by nobody since a crash; it does not move by itself
        before = _read(config)
        place = (before.control.volume, before.control.at) if before is not None and before.control else None
    rows: dict[str, Superblock] = {}
    control = None
    for volume in config.volumes:
        with reading(volume.backing) as read:
            rows[volume.name] = read_superblock(read)
            if place is not None and place[0] == volume.name:
                control = _control(config, read, *place)
    return Fingerprint(write, time.time_ns(), rows, control)


def _control(config: Config, read: Read, volume: str, at: int) -> ControlPlace | None:
    data = read(at, BLOCK)
    blocks = find_control_blocks(np.frombuffer(data, dtype=np.uint8), int(config.cluster.system_identifier))
    return ControlPlace(volume, at, blocks[0][1].checkpoint_lsn, checksum(data)) if blocks else None


# --- when it is attached again


def known(config: Config) -> Fingerprint | None:
    """The fingerprint of the last stop; None when that was not a clean one, or left none.

    Raises PreconditionError when it is damaged.
    """
    mark = Journal(config.journal, config.set_id_bytes).applied_mark()
    if mark is None or not mark.clean:
        return None
    found = _read(config)
    if found is None:
        _log.warning("no %s in %s: the volumes of %s are taken as they are", FILE, config.journal, config.name)
    return found if found is not None and found.write == mark.durable_write else None


def detached_ns(config: Config) -> int | None:
    """When the set was detached; None when that was not written down."""
    try:
        found = _read(config)
    except PreconditionError:
        return None
    return None if found is None else found.time_ns


def forget(config: Config) -> None:
    """The volumes are taken as they are, durably: the next start compares with nothing. Harmless when done twice."""
    (config.journal / FILE).unlink(missing_ok=True)
    fsio.sync_directory(config.journal)
    same_parts.forget(config.paths)


def _read(config: Config) -> Fingerprint | None:
    path = config.journal / FILE
    try:
        content = fsio.read_json(path)
        rows = {name: _superblock(row) for name, row in content["volumes"].items()}
        control = ControlPlace(**content["control"]) if content["control"] else None
        return Fingerprint(int(content["write"]), int(content["time_ns"]), rows, control)
    except FileNotFoundError:
        return None
    except (DamageError, KeyError, TypeError) as error:
        raise PreconditionError(
            f"{path} is damaged: whether the volumes of {config.name} were changed since they were detached is not "
            f"known ({getattr(error, 'message', repr(error))})",
            _hint(config),
        ) from None


def _superblock(row: dict[str, Any]) -> Superblock:
    return Superblock(**{**row, "log": LogHead(**row["log"]) if row["log"] else None})


def refuse_changed(config: Config) -> None:
    """Raises ChangedError when a volume is not what it was when the set was detached. Nothing is attached yet.

    Where the set was not stopped cleanly the fingerprint does not count (stale.py compares then). A backing that
    cannot be read is left to the engine to tell of.
    """
    before = known(config)
    if before is None:
        return
    for volume in config.volumes:
        was = before.volumes.get(volume.name)
        if was is None:  # it came later
            continue
        found: list[str] = []
        hint = _hint(config)
        with suppress(OSError), reading(volume.backing) as read:
            now = read_superblock(read)
            found += differences(was, now)
            if (was.fs, was.uuid) != (now.fs, now.uuid):
                hint = f"a disk in the place of one that is lost: {backings.remakes(config, volume)}; {hint}"
            found += _control_differences(config, before.control, volume, read)
        if found:
            raise ChangedError(
                f"volume {volume.name} of {config.name} on {volume.backing} was changed after it was detached at "
                f"{format_time(before.time_ns)}: {'; '.join(found)}. Nothing captured that, and every later restore "
                "would be false",
                hint,
            )


def _hint(config: Config) -> str:
    return f"to go on with what is on the volumes now: pgcdp up {config.name} --heal, which shows it first"


def differences(before: Superblock, now: Superblock) -> Iterator[str]:
    """What of a filesystem is not as it was, in words; pure. Nothing when all of it is."""
    if (before.fs, before.uuid) != (now.fs, now.uuid):
        there = f"{now.fs} {now.uuid}" if now.fs else "no filesystem that pgcdp knows"
        yield f"it held {before.fs or 'none'} {before.uuid}, and now holds {there}"
        return
    if now.mounts != before.mounts or now.mounted_s != before.mounted_s:
        yield (
            f"it was mounted at {now.mounted_at or 'an unknown place'} on {_second(now.mounted_s)} (mount count "
            f"{now.mounts} instead of {before.mounts})"
        )
    if now.checked_s != before.checked_s:
        yield f"its filesystem was checked on {_second(now.checked_s)}"
    if before.log != now.log:
        was, here = (each.head if each is not None else "not there" for each in (before.log, now.log))
        yield f"its log is at {here} instead of {was}" if was != here else f"its log was written to at {here}"
    if before.checksum != now.checksum:
        yield "its superblock was written" + (f" on {_second(now.written_s)}" if now.written_s else "")


def _control_differences(
    config: Config, before: ControlPlace | None, volume: VolumeConfig, read: Read
) -> Iterator[str]:
    if before is None or before.volume != volume.name:
        return
    now = _control(config, read, before.volume, before.at)
    if now is None:
        yield f"pg_control is not at byte {before.at} any more"
    elif now.checkpoint_lsn != before.checkpoint_lsn:
        lsns = f"{format_lsn(now.checkpoint_lsn)} instead of {format_lsn(before.checkpoint_lsn)}"
        yield f"pg_control has checkpoint {lsns}"
    elif now.checksum != before.checksum:
        yield "pg_control was written"


def _second(seconds: int) -> str:
    return format_time(seconds * 1_000_000_000) if seconds else "an unknown day"
