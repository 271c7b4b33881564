"""Write volumes anew whose backing is lost: `pgcdp up --remake VOLUME`, and what a kill of it has left.

The disk under a volume died, or its image file was removed. Store and journal have every write that was answered: so
the volume is written out as it is at the newest write, at the place where it was, and the set goes on with it; nothing
is lost. Which volumes stands in the set's state directory, durably, before the first byte: as long as it stands there
nothing is captured or mounted, since a block device that was written to half could pass for the volume that it was.
`up` finishes it; a block device has to be named again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp import fsio, log
from pgcdp.capture import attach, disks, same_parts, sharing, volumes
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.intervals.applying import FileTarget
from pgcdp.opening import engine_status, source_of
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery.gaps import before_open
from pgcdp.recovery.materializing import materialize
from pgcdp.recovery.rewind import check_devices
from pgcdp.recovery.source import Source
from pgcdp.sets import SetPaths
from pgcdp.units import format_size

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Lost:
    """A volume to be written anew; `holds`: what a block device at its place has now, by name, which goes."""

    volume: VolumeConfig
    holds: tuple[str, ...]


Agree = Callable[[Sequence[Lost]], None]
"""Is told what will be written, and raises to stop it."""


def pending(paths: SetPaths) -> list[str] | None:
    """Names of the volumes that are being written, or were when it was killed. Raises DamageError."""
    try:
        return list(fsio.read_json(paths.remake_state)["volumes"])
    except FileNotFoundError:
        return None


def _places(paths: SetPaths) -> dict[str, str]:
    """Where the filesystems were mounted that the image files are written to, by volume."""
    try:
        return dict(fsio.read_json(paths.remake_state).get("places", {}))
    except FileNotFoundError:
        return {}


def remake(config: Config, names: Sequence[str], agree: Agree, progress: Report = silent) -> None:
    """Write these volumes anew, with those that were begun; the set is down behind it. What still captures is ended, as
    by a crash.

    Raises UsageError for a volume that there is not, PreconditionError where it is not lost, or where its newest write
    is in neither store nor journal: with nothing changed.
    """
    with _disk_errors(config), attach.hold(config.paths):
        begun = pending(config.paths) or []
        if not begun:
            attach.refuse_pending(config.paths)
        same_parts.refuse_other_journal(config)
        done = [each.name for each in _named(config, begun) if not each.device and each.backing.exists()]
        wanted = _named(config, [name for name in (*begun, *names) if name not in done])
        source = source_of(config, engine_status(config))
        _newest(config, source)
        _refuse_unmounted(config, wanted)
        agree([_look(config, volume, source) for volume in wanted])
        attach.clean_leftovers(config, progress)
        _newest(config, source_of(config, None))  # it may have begun to track meanwhile
        config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        mounts = {each.name: disks.mount_of(each.backing.parent) for each in wanted if not each.device}
        places = {name: os.fspath(mount.mountpoint) for name, mount in mounts.items() if mount is not None}
        doing = {"volumes": [volume.name for volume in wanted], "places": places | _places(config.paths)}
        fsio.write_json(config.paths.remake_state, doing)
        _finish(config, wanted, progress)


def resume(config: Config, names: Collection[str] = (), progress: Report = silent) -> list[str]:
    """What `up` does first: finish what was begun. Names of the volumes that are whole by that.

    Raises PreconditionError for a block device, unless it is among `names`, which `remake` gets then: another one may
    have its name by now.
    """
    if pending(config.paths) is None:
        return []
    with _disk_errors(config), attach.hold(config.paths):
        begun = _named(config, pending(config.paths) or [])
        devices = [volume for volume in begun if volume.device]
        for volume in devices:
            if volume.name not in names:
                raise PreconditionError(
                    f"writing volume {volume.name} of {config.name} anew, to {volume.backing}, was interrupted",
                    f"pgcdp up {config.name} --remake {volume.name} goes on with it, if that is its disk still",
                )
        if begun and not devices:
            _refuse_unmounted(config, [volume for volume in begun if not volume.backing.exists()])
            progress(Progress("finishing the writing of volumes anew"))
            _finish(config, begun, progress)
        return [] if devices else [volume.name for volume in begun]


def _disk_errors(config: Config) -> AbstractContextManager[None]:
    return fsio.disk_errors(f"mend that, then run pgcdp up {config.name} --remake VOLUME again")


def _named(config: Config, names: Sequence[str]) -> list[VolumeConfig]:
    known = {volume.name: volume for volume in config.volumes}
    for name in names:
        if name not in known:
            raise UsageError(f'{config.name} has no volume "{name}"', f"its volumes: {', '.join(known)}")
    return [volume for volume in config.volumes if volume.name in names]


def _newest(config: Config, source: Source) -> RecoveryPoint:
    """The newest write. Raises PreconditionError when the volumes had more than that."""
    if source.journal is None or source.journal.applied_mark() is None:
        raise PreconditionError(
            f"the journal {config.journal} is missing: what the volumes of {config.name} had last is not known",
            f"bring its files back; what the store has: pgcdp restore --store {config.store} --to-directory DIR",
        )
    point = source.resolve(Target("newest"))
    if before_open(source.gaps()) is not None:
        raise PreconditionError(
            f"what was changed on the volumes of {config.name} behind write {point.write} was tracked, and is on them "
            "alone",
            f"bring the disk back; without it, pgcdp restore {config.name} --to-directory DIR gives that write",
        )
    return point


def _refuse_unmounted(config: Config, begun: Sequence[VolumeConfig]) -> None:
    """Raises PreconditionError where the filesystem is not mounted that an image file is being written to."""
    places = _places(config.paths)
    for volume in begun:
        was, now = places.get(volume.name), disks.mount_of(volume.backing.parent)
        if volume.device:
            continue
        if was is None or (now is not None and now.mountpoint.is_relative_to(was)):
            _refuse_no_directory(volume)
            continue
        raise PreconditionError(
            f"volume {volume.name} of {config.name} is being written anew to {volume.backing}, on what was mounted at "
            f"{was}: nothing is mounted there",
            f"mount that disk, or another one in its place, then pgcdp up {config.name} goes on",
        )


def _look(config: Config, volume: VolumeConfig, source: Source) -> Lost:
    """Raises PreconditionError where it cannot be written at its place, or is there."""
    place, need = volume.backing, _bytes(volume, source)
    if volume.device:
        sharing.refuse_taken(config, volume)
        same_parts.refuse_anothers(config, volume)
        size = volumes.check_device(place, overwrite=True)
        if size < need:
            raise PreconditionError(
                f"{place} has {format_size(size)}, volume {volume.name} has {format_size(need)}",
                "give it a disk that is as large",
            )
        return Lost(volume, tuple(volumes.signatures(place)))
    if os.path.lexists(place):
        raise PreconditionError(
            f"{place} is there: volume {volume.name} is not lost",
            "if that is not the volume, move it away, and run this again",
        )
    _refuse_no_directory(volume)
    fresh = _fresh(volume)
    free = fsio.free_space(place.parent) + (fresh.stat().st_blocks * 512 if fresh.exists() else 0)
    if free < need:
        raise PreconditionError(
            f"{place.parent} has {format_size(free)} free, volume {volume.name} needs {format_size(need)}",
            "free space there, or mount a larger disk",
        )
    return Lost(volume, ())


def _refuse_no_directory(volume: VolumeConfig) -> None:
    """It is never made here: its disk may not be mounted."""
    place = volume.backing.parent
    if not place.is_dir():
        raise PreconditionError(
            f"{place}, where volume {volume.name} is to be written, does not exist",
            f"mount the new disk, then mkdir -p {place}",
        )


def _bytes(volume: VolumeConfig, source: Source) -> int:
    """Its size; where a `grow` was killed, the store may know a larger one."""
    known = [each.bytes for each in source.store.volumes if each.name == volume.name]
    return max(volume.bytes, *known)


def _fresh(volume: VolumeConfig) -> Path:
    """Under which name an image file is written."""
    return volume.backing.with_name(f"{volume.backing.name}.fresh")


def _finish(config: Config, wanted: Sequence[VolumeConfig], progress: Report) -> None:
    """From whatever a kill has left to volumes that are whole. An image file that has its name is.

    When it fails, what was begun still is, where a block device has been written to; else nothing is left of it.
    """
    lost = [volume for volume in wanted if volume.device or not volume.backing.exists()]
    try:
        _write(config, lost, progress)
    except BaseException:
        if not any(volume.device for volume in lost):
            with suppress(OSError):
                for volume in lost:
                    _fresh(volume).unlink(missing_ok=True)
                fsio.remove_durably(config.paths.remake_state)
        raise
    fsio.remove_durably(config.paths.remake_state)


def _write(config: Config, lost: Sequence[VolumeConfig], progress: Report) -> None:
    source = source_of(config, None)
    check_devices(source, [volume.backing for volume in config.volumes])
    for segment in config.journal.glob("*.seg"):  # no volume may have a write before the journal has it for good
        fsio.sync_file(segment)
    point = _newest(config, source)
    with ExitStack() as stack:
        fds = [-1] * len(config.volumes)
        for number, volume in enumerate(config.volumes):
            if volume in lost:
                fds[number] = stack.enter_context(_emptied(volume, _bytes(volume, source), progress))
        with source.held():
            others = {each.number for each in source.store.volumes if each.number >= len(fds) or fds[each.number] < 0}
            materialize(source, point, FileTarget(fds), progress, others)
        for number, volume in enumerate(config.volumes):
            if volume in lost:
                progress(Progress(f"syncing volume {volume.name}"))
                if not volume.device:  # zeros may have become holes, for which there would be no room later
                    os.posix_fallocate(fds[number], 0, _bytes(volume, source))
                os.fsync(fds[number])
    for volume in lost:
        if not volume.device:
            _fresh(volume).rename(volume.backing)
            fsio.sync_directory(volume.backing.parent)
        _log.info("volume %s of %s was written anew, as of write %d", volume.name, config.name, point.write)


@contextmanager
def _emptied(volume: VolumeConfig, size: int, progress: Report) -> Iterator[int]:
    """The place of a volume, opened, with zeros in all of it. A block device is held for us alone."""
    place = volume.backing if volume.device else _fresh(volume)
    if not volume.device:
        place.unlink(missing_ok=True)
        volumes.make_image(place, size, "free space there, and run this again")
    fd = os.open(place, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if volume.device else 0))
    try:
        if volume.device:
            step = f"zeroing volume {volume.name}"
            volumes.zero_out(fd, 0, size, lambda done: progress(Progress(step, done, size)))
        yield fd
    finally:
        os.close(fd)
