"""On which disks a directory or device lies, as the kernel tells in /sys: through filesystems, loop devices,
partitions, LVM and other device-mapper targets, RAID, and filesystems of several devices (btrfs).

What the kernel does not tell (a disk array, the host of a virtual machine, a network filesystem) ends the way down: two
disks of this machine may be one disk there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from pgcdp.capture.volumes import Mount, backing_file, mounts
from pgcdp.records import Remark

SYS = Path("/sys")
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_UNNAMED_MAJOR = 0
"""Of filesystems that are not on one block device; what they are on, only the mount says."""
_LOOP_MAJOR = 7
_DEPTH = 16
"""Deeper than anybody stacks devices: a file of a loop device on itself must not be followed for ever."""


@dataclass(frozen=True, slots=True)
class Under:
    """What lies under a place: `disks` are whole disks, or a filesystem that has none on this machine ("tmpfs on /x"),
    `passed` device numbers of all on the way down, those of the place's own filesystem first."""

    disks: frozenset[str]
    passed: frozenset[int]
    in_memory: bool = False


def under(place: Path) -> Under:
    """What lies under a directory, file or block device that exists. Raises OSError when it does not."""
    found = os.stat(place)
    device = found.st_rdev if _is_block(found) else found.st_dev
    return below(device, os.path.realpath(place), mounts(), SYS)


def below(device: int, place: str, mounted: list[Mount], sys: Path) -> Under:
    """The same of a device number; `place` is the path that led to it, `sys` where sysfs is mounted."""
    disks, passed = set(), set()
    for number, disk in _down(device, place, mounted, sys, 0):
        passed.add(number)
        if disk is not None:
            disks.add(disk)
    in_memory = any(disk.partition(" ")[0] in IN_MEMORY for disk in disks)
    return Under(frozenset(disks), frozenset(passed), in_memory)


def _is_block(found: os.stat_result) -> bool:
    return (found.st_mode & 0o170000) == 0o060000


def _down(device: int, place: str, mounted: list[Mount], sys: Path, depth: int) -> Iterator[tuple[int, str | None]]:
    """(device number, disk where the way ends there)."""
    if depth > _DEPTH:
        return
    if os.major(device) == _UNNAMED_MAJOR:
        yield from _down_filesystem(device, place, mounted, sys, depth)
        return
    node = Path(os.path.realpath(sys / "dev/block" / f"{os.major(device)}:{os.minor(device)}"))
    below = [*_slaves(node), *_parent(node)]
    backing = _backing_file(node) if os.major(device) == _LOOP_MAJOR else None
    yield device, None if below or backing else node.name
    for each in below:
        yield from _down(each, "", mounted, sys, depth + 1)
    if backing is not None:
        try:
            lies = os.stat(backing)
        except OSError:  # in another mount namespace, or gone: it cannot be followed
            yield device, f"{node.name} ({backing})"
            return
        yield from _down(lies.st_rdev if _is_block(lies) else lies.st_dev, backing, mounted, sys, depth + 1)


def _slaves(node: Path) -> list[int]:
    """What device-mapper and RAID devices are made of."""
    with suppress(OSError):
        return [number for each in sorted((node / "slaves").iterdir()) if (number := _number(each)) is not None]
    return []


def _parent(node: Path) -> list[int]:
    """The disk of a partition."""
    if not (node / "partition").exists():
        return []
    number = _number(node.parent)
    return [] if number is None else [number]


def _number(node: Path) -> int | None:
    with suppress(OSError, ValueError):
        major, _, minor = (node / "dev").read_text().strip().partition(":")
        return os.makedev(int(major), int(minor))
    return None


def _backing_file(node: Path) -> str | None:
    with suppress(OSError):
        return os.fspath(backing_file(node)).removesuffix(" (deleted)")
    return None


def _down_filesystem(
    device: int, place: str, mounted: list[Mount], sys: Path, depth: int
) -> Iterator[tuple[int, str | None]]:
    """Of a filesystem without a block device of its own: that which the mount names, or itself."""
    mount = _mount_of(place, mounted)
    below = _devices_of(mount, sys) if mount is not None else []
    if not below:
        yield device, "an unknown filesystem" if mount is None else _named(mount)
        return
    yield device, None
    for each in below:
        yield from _down(each, "", mounted, sys, depth + 1)


def _named(mount: Mount) -> str:
    if mount.fstype == "zfs":  # a dataset of a pool
        return f"zfs pool {mount.source.partition('/')[0]}"
    if mount.fstype in IN_MEMORY or mount.source in ("none", mount.fstype, "overlay"):
        return f"{mount.fstype} on {mount.mountpoint}"
    return f"{mount.fstype} {mount.source}"


def mount_of(place: Path) -> Mount | None:
    """The mount that a file or directory lies on, or would."""
    return _mount_of(os.path.realpath(place), mounts())


def _mount_of(place: str, mounted: list[Mount]) -> Mount | None:
    """The mount that a path leads into: the longest, and of these the topmost."""
    best: Mount | None = None
    for mount in mounted:
        if Path(place).is_relative_to(mount.mountpoint) and (
            best is None or len(mount.mountpoint.parts) >= len(best.mountpoint.parts)
        ):
            best = mount
    return best


def _devices_of(mount: Mount, sys: Path) -> list[int]:
    """The block devices of btrfs, all of them where the kernel tells; else the one that the mount names."""
    source: int | None = None
    with suppress(OSError):
        found = os.stat(mount.source)
        source = found.st_rdev if _is_block(found) else None
    if source is None:
        return []
    for filesystem in sorted((sys / "fs/btrfs").glob("*/devices")):
        members = [number for each in filesystem.iterdir() if (number := _number(each)) is not None]
        if source in members:
            return members
    return [source]


# --- what it means


def apart(store: Path, journal: Path, volumes: Mapping[str, Path]) -> Iterator[Remark]:
    """Whether what shall not be lost together lies on disks of its own; `volumes` are the backings by name.

    Raises OSError when one of them does not exist.
    """
    places = {"store": store, "journal": journal, **{f"volume {name}": place for name, place in volumes.items()}}
    found = {what: under(place) for what, place in places.items()}
    for what, each in found.items():
        if each.in_memory:
            yield Remark(
                "disks", "warning", f"the {what} is in memory ({places[what]}): it is gone when the machine stops",
                f"put the {what} on a disk",
            )  # fmt: skip
    shared: dict[frozenset[str], list[str]] = {}
    for one, other in combinations(found, 2):
        disks = found[one].disks & found[other].disks
        if disks and one in ("store", "journal"):  # volumes may well share one
            told = shared.setdefault(disks, [])
            told += [what for what in (one, other) if what not in told]
    for disks, those in shared.items():
        yield Remark(
            "disks", "warning",
            f"{', '.join(those[:-1])} and {those[-1]} are on one disk ({', '.join(sorted(disks))}): what takes that "
            "disk takes all of them",
            "put the store on another disk, best in another machine" if "store" in those
            else "put the journal on a disk of its own: it has what the store lacks when the volume's disk fails",
        )  # fmt: skip
    if not shared and not any(each.in_memory for each in found.values()):
        told_disks = (f"{what} on {', '.join(sorted(each.disks))}" for what, each in found.items())
        yield Remark("disks", "ok", "; ".join(told_disks))


def inside(places: Mapping[str, Path], mountpoints: Iterable[Path]) -> Iterator[Remark]:
    """Whether something that capture writes to lies on what it captures: a write there would wait for itself.

    `mountpoints`: of the volumes, mounted. A file below is found whatever leads to it: a link, a bind mount, a loop
    device over a file there.
    """
    own: dict[int, Path] = {}
    for mountpoint in mountpoints:
        own[os.stat(mountpoint).st_dev] = mountpoint
    for what, place in places.items():
        on = [own[device] for device in under(place).passed if device in own]
        if on:
            yield Remark(
                f"place of the {what}", "failure",
                f"{place} lies on the protected volume at {on[0]}: what is written there is captured, and a full "
                "journal waits for itself",
                f"pgcdp down; move the {what} to another disk and mount that at {place}; pgcdp up",
            )  # fmt: skip
        else:
            yield Remark(f"place of the {what}", "ok", os.fspath(place))
