"""Scratch places: a recovery point as files of its own, mounted for a while, gone afterwards.

A scratch place is locked by the process that uses it. What a killed one left (mounts, loop devices, files) is cleared
away by the next that works below the same directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pgcdp import proc
from pgcdp.capture import volumes
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.fsio import free_space, make_directory
from pgcdp.intervals.increments import FileTarget
from pgcdp.postgres.cluster import kill_leftovers
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery.source import Source


def write_images(source: Source, point: RecoveryPoint, files: list[Path], progress: Report) -> int:
    """Materialize into new sparse files, synced."""
    need = sum(os.stat(source.store.image / f"{v.name}.img").st_blocks * 512 for v in source.store.volumes)
    have = free_space(files[0].parent)
    if have < need:
        raise PreconditionError(
            f"{files[0].parent} has {have} bytes free, the restored volumes need {need}",
            "free space or choose another place",
        )
    with ExitStack() as stack:
        fds = []
        for volume, file in zip(source.store.volumes, files, strict=True):
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            os.ftruncate(fd, volume.bytes)
            fds.append(fd)
        with source.held():
            source.materialize(point, FileTarget(fds), progress)
        for fd in fds:
            os.fsync(fd)
    return sum(volume.bytes for volume in source.store.volumes)


@contextmanager
def mounted(source: Source, point: RecoveryPoint, below: Path, progress: Report = silent) -> Iterator[Path]:
    """The recovery point as a mounted data directory in a scratch place of its own; all of it is gone afterwards."""
    make_directory(below, 0o711)
    clear_left(below)
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, below)
        scratch = Path(tempfile.mkdtemp(prefix="point-", dir=below))
        stack.callback(shutil.rmtree, scratch)
        scratch.chmod(0o711)  # Postgres's user passes through to the mount
        stack.callback(os.close, _lock(scratch))
        files = [scratch / f"{volume.name}.img" for volume in source.store.volumes]
        write_images(source, point, files, progress)
        place = scratch / "mnt"
        place.mkdir(mode=0o700)
        for name, where in _mount_order(source, place):
            progress(Progress(f"mounting volume {name}"))
            device = volumes.attach_loop(scratch / f"{name}.img")
            stack.callback(volumes.detach_loop, device)
            _mount(device, where, source.store.extra["filesystems"][name])
            stack.callback(volumes.unmount, where)
        yield place


def _mount_order(source: Source, place: Path) -> list[tuple[str, Path]]:
    """Volumes with their places, the data directory's first."""
    pgdata = Path(source.store.extra["pgdata"])
    found = []
    for name, mountpoint in source.store.extra["mountpoints"].items():
        if not Path(mountpoint).is_relative_to(pgdata):
            raise PreconditionError(f"volume {name} lies at {mountpoint}, outside {pgdata}", "use --to-image")
        found.append((name, place / Path(mountpoint).relative_to(pgdata)))
    return sorted(found, key=lambda entry: len(entry[1].parts))


def _mount(device: Path, where: Path, fs: str) -> None:
    """The filesystem's own log is replayed by this; production's bears the same UUID, so xfs must not look at it."""
    options = ["-o", "nouuid"] if fs == "xfs" else []
    try:
        proc.run(["mount", "-t", fs, *options, os.fspath(device), os.fspath(where)])
    except proc.ProcessFailed as error:
        raise DamageError(f"the restored {fs} on {device} cannot be mounted: {error.message}") from None


def clear_left(below: Path) -> None:
    """Take away scratch places that no process uses any more."""
    for scratch in sorted(below.glob("point-*")):
        fd = _lock(scratch)
        if fd < 0:
            continue
        for mount in reversed(volumes.mounts_below(scratch)):
            kill_leftovers(mount.mountpoint)  # a sandbox that outlived its verification
            volumes.unmount(mount.mountpoint)
        for device in volumes.loops_over(scratch):
            volumes.detach_loop(device)
        shutil.rmtree(scratch)
        os.close(fd)


def _remove_if_empty(below: Path) -> None:
    with suppress(OSError):
        below.rmdir()


def _lock(scratch: Path) -> int:
    """An open, locked descriptor; -1 when another process has it."""
    fd = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
