"""Whether something else on this machine has a backing, by whatever path: another set, a loop device, a mount.

The engine locks what it opens (O_EXCL on a block device, flock on a file). That does not reach a file through a loop
device over it, nor a device through the partitions that a loop device shows. So what a path really is gets followed
down to bytes of one file or disk, and two that overlap there are the same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pgcdp import config as settings
from pgcdp.capture import volumes
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.sets import list_sets

_SECTOR = 512
"""Unit of sizes below /sys/block."""
_BEFORE_OPTIONS = 6
"""Words of an engine's command line up to the sub-command, with the shell's that starts it (children.spawn)."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes `begin` to `end` of a file (device number of its filesystem, inode) or of a disk (0, its number)."""

    of: tuple[int, int]
    begin: int
    end: int

    def overlap(self, other: Bytes) -> bool:
        """Whether a byte is in both."""
        return self.of == other.of and self.begin < other.end and other.begin < self.end


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a backing: a set, captured by process `pid` or (None) not running now. `control`: its engine's socket."""

    set_name: str
    control: Path
    backing: Path
    pid: int | None

    def __str__(self) -> str:
        return f'set "{self.set_name}"' + (f", captured by process {self.pid}" if self.pid is not None else "")


def bytes_of(path: Path) -> Bytes:
    """What a file or block device is in the end, through loop devices and partitions. Raises OSError."""
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        return Bytes((status.st_dev, status.st_ino), 0, status.st_size)
    entry = Path("/sys/dev/block") / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    size = int((entry / "size").read_text()) * _SECTOR
    if (entry / "partition").exists():
        begin = int((entry / "start").read_text()) * _SECTOR
        disk = entry.resolve().parent.name.replace("!", "/")
        return _part(bytes_of(Path("/dev") / disk), begin, size)
    if (entry / "loop/backing_file").exists():
        file = volumes.backing_file(entry)
        if not _on_fuse(file) and file.exists():  # it may have been removed under it
            return _part(bytes_of(file), int((entry / "loop/offset").read_text()), size)
    return Bytes((0, status.st_rdev), 0, size)


def _on_fuse(file: Path) -> bool:
    """Whether a file lies on a FUSE filesystem: of ours, so no backing; and who asks there waits, when it is dead."""
    above = [mount for mount in volumes.mounts() if mount.mountpoint in file.parents]
    return bool(above) and max(above, key=lambda mount: len(mount.mountpoint.parts)).fstype.startswith("fuse")


def _part(whole: Bytes, begin: int, size: int) -> Bytes:
    return Bytes(whole.of, whole.begin + begin, min(whole.end, whole.begin + begin + size))


def refuse_shared(config: Config) -> None:
    """Raises PreconditionError when another set, or a loop device of somebody else, has a volume's backing."""
    for volume in config.volumes:
        with suppress(OSError):  # the engine tells of a backing that is not there
            _refuse(volume.backing, f"volume {volume.name} of set {config.name}", config.paths.control)


def refuse_held(device: Path) -> None:
    """The same for a block device that is to become a volume."""
    with suppress(OSError):
        _refuse(device, "which is to be a volume", None)


def refuse_taken(config: Config, volume: VolumeConfig) -> None:
    """The same for one that is to be written anew; nor may another volume of the set lie there."""
    with suppress(OSError):
        what = f"where volume {volume.name} of {config.name} is to be written"
        _refuse(volume.backing, what, config.paths.control)
        wanted = bytes_of(volume.backing)
        for other in config.volumes:
            if other.name != volume.name and _overlaps(other.backing, wanted):
                raise PreconditionError(
                    f"{volume.backing}, {what}, is that of volume {other.name}, which is at {other.backing}",
                    "give it another disk",
                )


def _refuse(backing: Path, what: str, control: Path | None) -> None:
    wanted = bytes_of(backing)
    for holder in holders():
        if holder.control != control and _overlaps(holder.backing, wanted):
            raise PreconditionError(
                f"{backing}, {what}, is that of {holder}, which knows it as {holder.backing}",
                f"one set captures a backing: give another one, or pgcdp unprotect {holder.set_name} before",
            )
    for device in _loops():
        if not os.path.samefile(device, backing) and _overlaps(device, wanted):
            at = [place for _, _, place in volumes.mounted_by(device)]
            raise PreconditionError(
                f"{backing}, {what}, is in use as {device}" + (f", mounted at {at[0]}" if at else ""),
                (f"umount {at[0]}, then " if at else "") + f"losetup --detach {device}",
            )


def _overlaps(path: Path, wanted: Bytes) -> bool:
    try:
        return bytes_of(path).overlap(wanted)
    except OSError:
        return False


def _loops() -> Iterator[Path]:
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        yield Path("/dev") / entry.parent.parent.name


def captures_at(control: Path) -> set[int]:
    """The capture processes that answer at a control socket, or will: also those that the shell is still to become.

    So from when the lock is let go of under which one was started (held.py), however its starter ended.
    """
    found = set[int]()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"capture" in words[:_BEFORE_OPTIONS] and (b"--control", os.fsencode(control)) in pairwise(words):
                    found.add(int(process.name))
    return found


def holders() -> Iterator[Holder]:
    """Captures that run on this machine, below whichever root; then the sets of this root."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                yield from _captured((process / "cmdline").read_bytes(), int(process.name))
    for name in list_sets():
        with suppress(PgcdpError):
            config = settings.load_config(name)
            for volume in config.volumes:
                yield Holder(config.name, config.paths.control, volume.backing, None)


def _captured(command_line: bytes, pid: int) -> Iterator[Holder]:
    """What `engine.capture_command` made: NAME:BYTES=PATH behind the options, which the engine takes apart in place."""
    words = [os.fsdecode(word) for word in command_line.split(b"\0")[:-1]]
    options = dict(pairwise(words))
    if words[1:2] != ["capture"] or "--control" not in options or "--set-id" not in options:
        return
    control = Path(options["--control"])
    for before, word in pairwise(words):
        volume, equals, path = word.partition("=")
        whole = bool(equals) and ":" in volume and path.startswith("/")
        if whole or (before.isdecimal() and word.startswith("/")):
            yield Holder(control.parent.name, control, Path(path if whole else word), pid)
