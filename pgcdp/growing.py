"""Give a volume of a set more room, online: `pgcdp grow`. Every step may be repeated; killed anywhere, run it again.

    backing -> store -> settings -> capture -> loop device -> filesystem

In this order nothing is ever written where the next one has no place for it: the image has the new blocks, as zeros,
before the filesystem can use any. What is new of the backing is zeros, too; up to where that is so, the store tells.
Capture shows as much of a backing as the settings say, so that one that somebody made larger holds nothing behind that.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pgcdp import config as settings
from pgcdp import proc, service
from pgcdp.capture import attach, held, volumes
from pgcdp.capture.control import EngineClient
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.fsio import disk_errors, free_space, sync_directory
from pgcdp.progress import Progress, Report, silent
from pgcdp.store.layout import Store
from pgcdp.units import exact_size, format_size

_CAP_SYS_RESOURCE = 24
DEVICE_SECONDS = 60.0
"""How long the kernel may take to keep the size that capture shows: it drops an answer when a write ended meanwhile."""
PROGRAMS = {"ext4": ("resize2fs", "e2fsprogs"), "xfs": ("xfs_growfs", "xfsprogs")}


@dataclass(frozen=True, slots=True)
class Grown:
    """What was done: bytes of the volume, and of what its filesystem can hold, before and after."""

    volume: str
    before: int
    after: int
    filesystem_before: int
    filesystem_after: int


def grow(config: Config, size: int | None, name: str | None = None, progress: Report = silent) -> Grown:
    """Make a volume larger: to `size` bytes, or, on a block device, to that device's. The cluster goes on meanwhile.

    `name`: None for that of the data directory. Raises UsageError for a size or volume that cannot be meant,
    PreconditionError for what must be mended first; nothing is changed then.
    """
    proc.check_root()
    then = f"mend that, then run pgcdp grow {config.name} again with the same size: it goes on from what is there"
    with disk_errors(then), attach.hold(config.paths):
        attach.refuse_pending(config.paths)
        config = settings.load_config(config.name)
        number, volume = _volume(config, name)
        _refuse_unready(config, volume)
        store = Store.open(config.store, config.set_id_bytes)
        known = store.volumes[number].bytes
        _refuse_beyond(config, number, known)
        wanted = _wanted(config, volume, size, known)
        before = _filesystem_bytes(volume)
        progress(Progress("making room in the backing"))
        _extend_backing(volume, known, wanted, progress)
        progress(Progress("growing the volume"))
        service.ask(config.paths, "grow", timeout=None, volume=number, bytes=wanted)
        config = settings.load_config(config.name)  # as they are now: zeroing a device takes hours
        changed = replace(volume, bytes=wanted)
        rows = tuple(changed if each.name == volume.name else each for each in config.volumes)
        settings.save_config(replace(config, volumes=rows))
        held.note(replace(config, volumes=rows))
        _grow_device(config, volume, wanted)
        progress(Progress("growing the filesystem"))
        grow_filesystem(config, volume)
        return Grown(volume.name, known, wanted, before, _filesystem_bytes(volume))


def _volume(config: Config, name: str | None) -> tuple[int, VolumeConfig]:
    for number, volume in enumerate(config.volumes):
        if volume.name == name or (name is None and volume.mountpoint == config.pgdata):
            return number, volume
    names = ", ".join(volume.name for volume in config.volumes)
    raise UsageError(f'the set {config.name} has no volume "{name}"', f"it has: {names}")


def _refuse_unready(config: Config, volume: VolumeConfig) -> None:
    program, package = PROGRAMS[volume.fs]
    if proc.find_program(program) is None:
        raise PreconditionError(f"{program} is not installed", f"apt-get install {package}")
    if volume.fs == "ext4" and not may_resize_ext4():
        raise PreconditionError(
            "growing an ext4 that is mounted needs CAP_SYS_RESOURCE, which this process lacks",
            "run it outside of the container, or give the container that capability",
        )
    if not attach.is_attached(config):
        raise PreconditionError(f"the set {config.name} is not attached", f"pgcdp up {config.name}")
    service.await_following(config.paths)


def _refuse_beyond(config: Config, number: int, known: int) -> None:
    """What is behind the store's end is made zeros: nothing may be able to lie there.

    Raises PreconditionError where an engine of before shows more.
    """
    volume = EngineClient(config.paths.control).next_status().volumes[number]
    if volume.bytes > known:
        raise PreconditionError(
            f"capture shows {volume.bytes} bytes of volume {volume.name}, of which the store has {known}",
            f"pgcdp down {config.name} and pgcdp up {config.name}, then run this again; where its filesystem was made "
            "larger by hand already, it does not mount then: make it smaller before, or unprotect and protect again",
        )


def may_resize_ext4() -> bool:
    """Whether the kernel lets this process grow an ext4 that is mounted (ext4_resize_begin asks for that)."""
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(told.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)


def _wanted(config: Config, volume: VolumeConfig, size: int | None, known: int) -> int:
    """The bytes to be, which may be those that it has: what a killed run has left of it is then finished."""
    if volume.device:
        found = volumes.backing_bytes(volume.backing) // volumes.SECTOR * volumes.SECTOR
        if size is not None and size // volumes.SECTOR * volumes.SECTOR != found:
            raise UsageError(
                f"volume {volume.name} lies on {volume.backing}, which has {found} bytes",
                f"make the device that large first (lvextend), then pgcdp grow --volume {volume.name} without a size",
            )
        wanted = found
    elif size is None:
        raise UsageError(f"volume {volume.name} lies on a file: to which size?", "give the new size, such as 40G")
    else:
        wanted = size // volumes.SECTOR * volumes.SECTOR
    if wanted < known:
        raise UsageError(
            f"volume {volume.name} has {format_size(known)}, {format_size(wanted)} would be less",
            "a volume never becomes smaller; for that, unprotect and protect again. One that was killed is finished by "
            f"pgcdp grow {config.name} --volume {volume.name} {exact_size(known)}",
        )
    return wanted


def _extend_backing(volume: VolumeConfig, known: int, wanted: int, progress: Report) -> None:
    """All of it is there, and what is new is zeros."""
    fd = os.open(volume.backing, os.O_RDWR | os.O_CLOEXEC)
    try:
        if volume.device:
            more = wanted - known
            volumes.zero_out(fd, known, more, lambda done: progress(Progress(volumes.ZEROING, done, more)))
        elif wanted > volume.bytes:
            if wanted > known:
                os.ftruncate(fd, known)  # left by a killed run, or by somebody else: nothing of the volume lies there
            free, more = free_space(volume.backing.parent), wanted - os.fstat(fd).st_blocks * 512
            if free < more:
                raise PreconditionError(
                    f"{volume.backing.parent} has {format_size(free)} free, {format_size(more)} are needed",
                    "free space there, or choose a smaller size",
                )
            # Behind what is shown alone: where it is emulated, it reads and writes again what others write meanwhile.
            os.posix_fallocate(fd, volume.bytes, wanted - volume.bytes)
        os.fsync(fd)
    finally:
        os.close(fd)
    if not volume.device:
        sync_directory(volume.backing.parent)


def _grow_device(config: Config, volume: VolumeConfig, wanted: int) -> None:
    """Capture, the file that it shows, and the loop device over that have the new size."""
    EngineClient(config.paths.control).grow(volume.name, wanted)
    file = config.paths.fuse / volume.name
    (device,) = volumes.loops_over(file)
    deadline = time.monotonic() + DEVICE_SECONDS
    while True:
        found = _known_size(file)
        if found == wanted:
            proc.run(["losetup", "--set-capacity", os.fspath(device)])
        shown = int((Path("/sys/block") / device.name / "size").read_text()) * 512
        if found == shown == wanted:
            return
        if time.monotonic() > deadline:
            raise PreconditionError(
                f"{file} has {found} bytes and {device} {shown}, instead of {wanted}",
                f"pgcdp down {config.name} and pgcdp up {config.name}, then run this again",
            )
        time.sleep(0.02)


def _known_size(file: Path) -> int:
    """Has the kernel ask for the size of a file that capture shows; tells up to where it reads that from now on.

    Not what `stat` tells: that is the answer itself, also where the kernel has kept the size of before. What the loop
    device reads behind that is an I/O error.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def grow_filesystem(config: Config, volume: VolumeConfig) -> None:
    """Give a mounted filesystem all of its volume, online. Harmless when it has it."""
    if volume.fs == "xfs":
        proc.run(["xfs_growfs", "-d", os.fspath(volume.mountpoint)])
    else:
        (device,) = volumes.loops_over(config.paths.fuse / volume.name)
        proc.run(["resize2fs", os.fspath(device)])
    volumes.sync_filesystem(volume.mountpoint)


def _filesystem_bytes(volume: VolumeConfig) -> int:
    told = os.statvfs(volume.mountpoint)
    return told.f_blocks * told.f_frsize
