"""Places for scratch files: directories below one that is ours alone, gone afterwards.

A place is locked by the process that uses it. What a killed one left (processes, mounts, loop devices, files) is
cleared away by the next that works below the same directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pgcdp.capture import volumes
from pgcdp.capture.engine import end_views
from pgcdp.errors import PreconditionError
from pgcdp.fsio import sync_directory
from pgcdp.postgres.cluster import kill_leftovers

REMOVE_SECONDS = 10.0


def scratch_of(set_id: bytes) -> Path:
    """Below where the places of a set are."""
    return Path("/var/tmp") / f"pgcdp-{set_id.hex()[:12]}"


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
                remove(scratch)  # locked until it is gone, so that nobody takes it for left behind
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
                os.fchmod(fd, 0o711)  # whatever the umask says
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
            remove(scratch)
        finally:
            os.close(fd)


def remove(place: Path) -> None:
    """Remove a place in which nothing runs or is mounted any more, and what comes into it meanwhile.

    An agent that moves the image may have found the view that was in it, and be about to leave it another map.
    """
    until = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            shutil.rmtree(place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or time.monotonic() > until:
                raise
        if not place.exists():
            return


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
