"""Scratch places: a recovery point, shown or copied, mounted for a while, gone afterwards.

A scratch place is locked by the process that uses it. What a killed one left (processes, mounts, loop devices, files)
is cleared away by the next that works below the same directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pgcdp import proc
from pgcdp.capture import volumes
from pgcdp.capture.engine import end_views
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.fsio import free_space, sync_directory
from pgcdp.intervals.increments import FileTarget
from pgcdp.postgres.cluster import kill_leftovers
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import shown


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
def mounted(
    source: Source, point: RecoveryPoint, below: Path, progress: Report = silent, *, forgive: bool = False
) -> Iterator[Path]:
    """The recovery point as a mounted data directory, opened in place: nothing is copied, whatever its size.

    It can be written to; all of that is gone afterwards. `forgive`: as `view.shown`.
    """
    with (
        place_below(below) as scratch,
        shown(source, point, scratch, progress, forgive=forgive) as files,
        _mounted(source, scratch, files, volumes.WRITE_THROUGH, progress) as place,
    ):
        yield place


@contextmanager
def copied(source: Source, point: RecoveryPoint, below: Path, progress: Report = silent) -> Iterator[Path]:
    """The same in files of its own: every byte of it has been read and checked."""
    with place_below(below) as scratch:
        files = [scratch / f"{volume.name}.img" for volume in source.store.volumes]
        write_images(source, point, files, progress)
        with _mounted(source, scratch, files, volumes.WRITE_BACK, progress) as place:
            yield place


@contextmanager
def _mounted(source: Source, scratch: Path, files: list[Path], mode: str, progress: Report) -> Iterator[Path]:
    """The filesystems of all volumes, mounted below `scratch` as they belong together."""
    with ExitStack() as stack:
        yield _mount_all(stack, source, scratch, files, mode, progress)


def leave_mounted(source: Source, scratch: Path, files: list[Path], progress: Report = silent) -> Path:
    """The filesystems of all volumes, mounted below `scratch` for good: `clear` ends that."""
    with ExitStack() as stack:
        place = _mount_all(stack, source, scratch, files, volumes.WRITE_THROUGH, progress)
        stack.pop_all()
    return place


def _mount_all(stack: ExitStack, source: Source, scratch: Path, files: list[Path], mode: str, progress: Report) -> Path:
    """Mount, and have `stack` take it all back."""
    file_of = {volume.name: file for volume, file in zip(source.store.volumes, files, strict=True)}
    place = scratch / "mnt"
    place.mkdir(mode=0o700)
    for name, where in _mount_order(source, place):
        progress(Progress(f"mounting volume {name}"))
        device = volumes.attach_loop(file_of[name], mode)
        stack.callback(volumes.detach_loop, device)
        _mount(device, where, source.store.extra["filesystems"][name])
        stack.callback(volumes.unmount, where)
    return place


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


@contextmanager
def place_below(below: Path) -> Iterator[Path]:
    """A new directory below `below`, locked while it is used; what killed processes left there goes first."""
    with alone(below):
        clear_left(below)
        scratch = Path(tempfile.mkdtemp(prefix="point-", dir=below))
        locked = lock(scratch)
        if locked < 0:
            scratch.rmdir()
            raise PreconditionError(f"{scratch} was locked by another process", "run this again")
    try:
        scratch.chmod(0o711)  # Postgres's user passes through to the mount
        yield scratch
    finally:
        try:
            with alone(below):
                shutil.rmtree(scratch)  # locked until it is gone, so that nobody takes it for left behind
                with suppress(OSError):
                    below.rmdir()
        finally:
            os.close(locked)


@contextmanager
def alone(below: Path) -> Iterator[None]:
    """`below`, made where it is missing, with no other process making, clearing or removing places in it.

    Raises PreconditionError when somebody else could change what is in it: its name can be guessed, and root mounts
    there.
    """
    while True:
        with suppress(FileExistsError):
            below.mkdir(mode=0o711)
            sync_directory(below.parent)
        try:
            _refuse_foreign(below)
            fd = os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process was the last to leave
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if is_still(below, fd):
                yield
                return
        finally:
            os.close(fd)


def _refuse_foreign(below: Path) -> None:
    status = below.lstat()
    if not stat.S_ISDIR(status.st_mode):
        what = "is not a directory"
    elif status.st_uid != os.geteuid():
        what = f"belongs to user id {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & 0o022:
        what = f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise PreconditionError(f"{below} {what}", f"see what it is and remove it: ls -ld {below}")


def is_still(below: Path, fd: int) -> bool:
    """Whether a directory was not removed (and made anew) while its lock was waited for."""
    try:
        return os.path.samestat(below.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def clear_left(below: Path) -> None:
    """Take away scratch places that no process uses any more. The caller is `alone` there."""
    for scratch in sorted(below.glob("point-*")):
        fd = lock(scratch)
        if fd < 0:
            continue
        try:
            clear(scratch)
            shutil.rmtree(scratch)
        finally:
            os.close(fd)


def clear(scratch: Path) -> None:
    """From the top down: Postgres, filesystems, loop devices, the engine that served their files, its FUSE mount."""
    scratch = Path(os.path.realpath(scratch))  # as the kernel shows mounts and files
    found = list(reversed(volumes.mounts_below(scratch)))
    doors = [mount for mount in found if mount.fstype.startswith("fuse")]
    for mount in found:
        if mount not in doors:
            kill_leftovers(mount.mountpoint)  # a sandbox that outlived its verification
            volumes.unmount(mount.mountpoint)
    for device in volumes.loops_over(scratch):
        volumes.detach_loop(device)
    if doors or (scratch / "control").exists():
        end_views(scratch)
    for mount in doors:
        volumes.unmount_lazily(mount.mountpoint)


def lock(scratch: Path) -> int:
    """An open, locked descriptor; -1 when another process has it."""
    fd = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
