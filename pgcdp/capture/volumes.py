"""Backings, filesystems, loop devices and mounts of a volume set.

Every volume is used through a loop device with direct I/O, 4096-byte sectors and a write-through cache mode (the
capture layer answers a write only when it is durable, so a flush has nothing left to do). Undoing is idempotent:
what is not mounted or attached is left as it is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp import fsio, proc
from pgcdp.errors import PgcdpError, PreconditionError, UsageError
from pgcdp.units import format_size

log = logging.getLogger(__name__)

SECTOR = 4096
LEAST_BYTES = {"ext4": 64 << 20, "xfs": 300 << 20}
"""Smallest volume that each filesystem is made on (mkfs.xfs itself refuses less than 300 MiB)."""

LOG_BYTES = 64 << 20
"""Size of the filesystem's own log on volumes of 2 GiB and more; mkfs would give large ones one of 1 to 2 GiB."""
ZEROING = "filling the device with zeros"
"""The step that `zero_out` is."""
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_ZERO_PIECE = 1 << 30
_SYS_BLOCK = Path("/sys/block")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo. `options` are those of the mount and of its superblock together."""

    mountpoint: Path
    fstype: str
    source: str
    options: frozenset[str]


# --- backings


def make_image(path: Path, size: int, room: str = "free space there, or choose a smaller --size") -> None:
    """A fully allocated, durable image file of `size` bytes, 0600. `room`: the hint when there is none for it.

    Raises PreconditionError when it exists or has no room.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        image = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise PreconditionError(f"{path} exists already", "remove it if nothing needs it any more") from None
    try:
        os.posix_fallocate(image, 0, size)
        os.fsync(image)
    except OSError as error:
        path.unlink()
        raise PreconditionError(f"cannot allocate {format_size(size)} for {path}: {error.strerror}", room) from None
    finally:
        os.close(image)
    fsio.sync_directory(path.parent)


def backing_bytes(path: Path) -> int:
    """Size of an image file or block device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def zero_out(fd: int, begin: int, size: int, done: Callable[[int], None]) -> None:
    """Have a range of a block device read as zeros; `done` is called with the bytes so far."""
    for at in range(0, size, _ZERO_PIECE):
        count = min(_ZERO_PIECE, size - at)
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("<QQ", begin + at, count))
        done(at + count)


def discard(fd: int, begin: int, size: int) -> None:
    """Discard a range of a block device."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("<QQ", begin, size))


def check_device(device: Path, overwrite: bool) -> int:
    """Bytes of a block device that may become a volume. Changes nothing.

    Raises UsageError when it is no block device, PreconditionError when it is in use or, unless `overwrite`, carries
    data.
    """
    try:
        mode = device.stat().st_mode
    except FileNotFoundError:
        raise UsageError(
            f"{device} does not exist", "give --volume a block device, or --size for an image file"
        ) from None
    if not stat.S_ISBLK(mode):
        raise UsageError(f"{device} is not a block device", "give --volume a block device, or --size for an image file")
    number = device.stat().st_rdev
    for mount in mounts():
        if mount.source.startswith("/dev/") and _device_number(Path(mount.source)) == number:
            raise PreconditionError(f"{device} is mounted at {mount.mountpoint}", f"umount {mount.mountpoint}")
    name = f"{os.major(number)}:{os.minor(number)}"
    holders = sorted(holder.name for holder in Path(f"/sys/dev/block/{name}/holders").glob("*"))
    if holders:
        raise PreconditionError(f"{device} is in use by {', '.join(holders)}", "choose a device that nothing uses")
    parts = [part.name for part in Path(f"/sys/dev/block/{name}").glob("*/partition")]
    if parts:
        raise PreconditionError(f"{device} has partitions", "give one of its partitions, or a disk without any")
    for swap in Path("/proc/swaps").read_text().splitlines()[1:]:
        if _device_number(Path(swap.split()[0])) == number:
            raise PreconditionError(f"{device} is used as swap", f"swapoff {device}")
    _check_exclusive(device)
    size = backing_bytes(device)
    if size % SECTOR:
        raise PreconditionError(
            f"{device} has {size} bytes, which is not a multiple of {SECTOR}",
            "use a partition whose size is a multiple of 8 sectors",
        )
    found = signatures(device)
    if found and not overwrite:
        raise PreconditionError(f"{device} holds {', '.join(found)}", "give --yes to overwrite it")
    return size


def _check_exclusive(device: Path) -> None:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        raise PreconditionError(
            f"cannot open {device} for exclusive use: {error.strerror}", "choose a device that nothing uses"
        ) from None


def signatures(device: Path) -> list[str]:
    """Names of the filesystem, partition table and other signatures on a device, by wipefs."""
    listing = proc.run(["wipefs", "--noheadings", "--parsable", "--output", "TYPE", os.fspath(device)]).stdout
    return sorted({line.strip() for line in listing.splitlines() if line.strip()})


def _device_number(path: Path) -> int:
    try:
        return path.stat().st_rdev
    except OSError:
        return -1


# --- filesystems


def make_filesystem(device: Path, fs: str, uid: int, gid: int, zeroed: bool) -> None:
    """mkfs on a loop device. `zeroed` says that it reads as zeros everywhere, so that nothing needs to be initialised.

    Nothing is left to lazy initialisation, and nothing is discarded: both would be captured later. The log has one size
    on small and large volumes, since every clone and every `up` after a crash reads what is in it before it mounts.
    """
    large = backing_bytes(device) >= 32 * LOG_BYTES
    if fs == "xfs":
        log_size = ["-l", f"size={LOG_BYTES}"] if large else []
        proc.run(["mkfs.xfs", "-q", "-f", "-K", "-s", f"size={SECTOR}", *log_size, os.fspath(device)])
        return
    extended = [f"root_owner={uid}:{gid}", "nodiscard", "lazy_itable_init=0", "lazy_journal_init=0"]
    if zeroed:
        extended.append("assume_storage_prezeroed=1")
    log_size = ["-J", f"size={LOG_BYTES >> 20}"] if large else []
    proc.run([
        "mkfs.ext4", "-q", "-F", "-b", str(SECTOR), "-E", ",".join(extended), *log_size, os.fspath(device),
    ])  # fmt: skip


def sync_filesystem(path: Path) -> None:
    """syncfs(2) of the filesystem that holds `path`. Raises PgcdpError with its error."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(descriptor):
            error = ctypes.get_errno()
            raise PgcdpError(f"syncfs of {path} failed: {os.strerror(error)}", "look at the kernel's log")
    finally:
        os.close(descriptor)


_libc = ctypes.CDLL(None, use_errno=True)
DETACH_SECONDS = 20.0


# --- loop devices


WRITE_THROUGH = "write through"
"""Cache mode over a captured volume: each write is durable when it is answered, a flush has nothing to do."""
WRITE_BACK = "write back"
"""Cache mode over a plain file: flushes reach it."""


def attach_loop(file: Path, mode: str = WRITE_BACK) -> Path:
    """A loop device over `file` (an absolute path): direct I/O, 4096-byte sectors, cache mode. Returns /dev/loopN.

    Raises PreconditionError when the kernel did not take one of these, with the device detached again.
    """
    shown = proc.run([
        "losetup", "--find", "--show", "--nooverlap", "--direct-io=on", "--sector-size", str(SECTOR), os.fspath(file),
    ]).stdout.strip()  # fmt: skip
    device = Path(shown)
    try:
        set_cache_mode(device, mode)
        _expect(device, "loop/dio", "1", "direct I/O")
        _expect(device, "queue/logical_block_size", str(SECTOR), f"{SECTOR}-byte sectors")
    except BaseException:
        detach_loop(device)
        raise
    return device


def set_cache_mode(device: Path, mode: str) -> None:
    """Set a loop device's cache mode. It outlives the file under the device: set at every attach, put back after it."""
    attribute = _SYS_BLOCK / device.name / "queue/write_cache"
    if attribute.read_text().strip() != mode:  # setting it waits for what is under way
        attribute.write_text(f"{mode}\n")
    _expect(device, "queue/write_cache", mode, "its cache mode")


def _expect(device: Path, attribute: str, value: str, what: str) -> None:
    found = (_SYS_BLOCK / device.name / attribute).read_text().strip()
    if found != value:
        raise PreconditionError(
            f"{device} did not take {what}: {attribute} is {found!r}", "a Linux kernel of 5.10 or newer is needed"
        )


def detach_loop(device: Path) -> None:
    """Detach a loop device and wait until it is free. Harmless when it is not attached."""
    backing = loop_backing(device)
    if backing is None:
        return
    try:
        set_cache_mode(device, WRITE_BACK)  # else whoever attaches it next writes without flushes, and does not know
    except (OSError, PreconditionError) as error:
        log.warning("%s keeps its cache mode: %s", device, error)
    proc.run(["losetup", "--detach", os.fspath(device)])
    deadline = time.monotonic() + DETACH_SECONDS
    # The kernel detaches it when the last one who looks at it closes it; somebody else may attach it right away.
    while loop_backing(device) == backing:
        if time.monotonic() > deadline:
            raise _still_in_use(device)
        time.sleep(0.02)


def refuse_in_use(device: Path) -> None:
    """Raises PreconditionError while a filesystem on a block device is mounted, also in another mount namespace.

    The kernel lets nobody open a device exclusively that is mounted anywhere (open(2), O_EXCL).
    """
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise _still_in_use(device) from None


def _still_in_use(device: Path) -> PreconditionError:
    holders = mounted_by(device)
    if holders:
        named = "; ".join(f"at {place} by pid {pid} ({name})" for pid, name, place in holders[:4])
        return PreconditionError(f"{device} is still mounted {named}", "unmount it there, then run this again")
    return PreconditionError(
        f"{device} is still in use",
        f"see who uses it with: lsof {device}; an open file or a mount that no process has at a path holds it, too",
    )


def mounted_by(device: Path) -> list[tuple[int, str, str]]:
    """(pid, name, mount point) where a block device is mounted: a process of each mount namespace that has it."""
    number = os.stat(device).st_rdev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    found: dict[tuple[str, str], tuple[int, str, str]] = {}
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if not process.name.isdigit():
                continue
            namespace = os.readlink(process / "ns/mnt")
            for line in _lines(process / "mountinfo"):
                fields = line.split(" ")
                if fields[2] == wanted:
                    key = namespace, fields[4]
                    found.setdefault(key, (int(process.name), _name_of(process), fields[4]))
    return sorted(found.values())


def loop_backing(device: Path) -> Path | None:
    """The file under a loop device, as the kernel shows its path; None when it is not attached."""
    try:
        return backing_file(_SYS_BLOCK / device.name)
    except OSError:
        return None


def backing_file(node: Path) -> Path:
    """The file under the loop device with this directory below /sys. Raises OSError when it is not attached."""
    return Path(os.fsdecode((node / "loop/backing_file").read_bytes().removesuffix(b"\n")))


def loops_over(place: Path) -> dict[Path, Path]:
    """{/dev/loopN: file} of the loop devices over `place` itself or files below it."""
    found = {}
    for entry in sorted(_SYS_BLOCK.glob("loop*/loop/backing_file")):
        device = Path("/dev") / entry.parent.parent.name
        backing = loop_backing(device)
        if backing is not None and (backing == place or place in backing.parents):
            found[device] = backing
    return found


def device_answers(device: Path) -> bool:
    """Whether a block can be read from the device (past any cache): False when the engine under it is dead."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, SECTOR) as page:
            return os.preadv(descriptor, [page], 0) == SECTOR
    except OSError:
        return False
    finally:
        os.close(descriptor)


# --- mounts


def mounts() -> list[Mount]:
    """Every mount of this process's namespace, in the kernel's order (a later one covers an earlier one)."""
    found = []
    for line in _lines(Path("/proc/self/mountinfo")):
        left, _, right = line.partition(" - ")
        fields, source = left.split(" "), right.split(" ")
        options = frozenset(fields[5].split(",")) | frozenset(source[2].split(","))
        found.append(Mount(Path(_unescape(fields[4])), source[0], _unescape(source[1]), options))
    return found


def _lines(file: Path) -> list[str]:
    """Lines of a file of the kernel's with paths in them: bytes that are no UTF-8, and characters at which Python would
    end a line, may be in the name of any mount of this machine, whoever made it."""
    return os.fsdecode(file.read_bytes()).split("\n")[:-1]


def _unescape(text: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def mount_at(mountpoint: Path) -> Mount | None:
    """What is mounted exactly there (the topmost), or None. Touches nothing below it: it may be dead."""
    place = Path(os.path.realpath(mountpoint.parent)) / mountpoint.name
    found = [mount for mount in mounts() if mount.mountpoint == place]
    return found[-1] if found else None


def mounts_below(place: Path) -> list[Mount]:
    """Mounts strictly below a directory."""
    return [mount for mount in mounts() if place in mount.mountpoint.parents]


def mount(device: Path, mountpoint: Path, fs: str) -> None:
    """Mount by device path (never UUID or label: clones bear the same) with the filesystem's defaults."""
    proc.run(["mount", "-t", fs, os.fspath(device), os.fspath(mountpoint)])


def unmount(mountpoint: Path) -> None:
    """Unmount what is mounted there, all layers. Raises PreconditionError naming the processes that keep it busy."""
    while mount_at(mountpoint) is not None:
        done = proc.run(["umount", os.fspath(mountpoint)], check=False)
        if done.returncode and mount_at(mountpoint) is not None:
            users = users_of(mountpoint)
            named = ", ".join(f"{name} (pid {pid})" for pid, name in users[:8]) or done.stderr.strip()
            raise PreconditionError(f"{mountpoint} is in use by {named}", "end what uses it, then run this again")


def unmount_lazily(mountpoint: Path) -> None:
    """Take a FUSE mount whose server is dead out of the tree, all layers."""
    while mount_at(mountpoint) is not None:
        proc.run(["umount", "--lazy", os.fspath(mountpoint)])


def users_of(place: Path) -> list[tuple[int, str]]:
    """(pid, name) of processes that have their directory or an open file at `place` or below it."""
    pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()]
    return sorted((pid, _name_of(Path(f"/proc/{pid}"))) for pid in pids if pid != os.getpid() and uses(pid, place))


def uses(pid: int, place: Path) -> bool:
    """Whether a process has its directory or an open file at `place` or below it."""
    process = Path(f"/proc/{pid}")
    links = [process / "cwd", process / "root"]
    with suppress(OSError):
        links += list((process / "fd").iterdir())
    for link in links:
        with suppress(OSError):
            target = Path(os.readlink(link))
            if target == place or place in target.parents:
                return True
    return False


def _name_of(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
