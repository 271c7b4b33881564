"""Which volumes a set is to have: that of the data directory, of pg_wal, and of tablespaces.

Everything keeps its path. What lies elsewhere (pg_wal as a link, a tablespace) gets a volume that is mounted where it
lies, so that the links of the cluster hold good; pg_wal inside the data directory gets one that is mounted in there.
Everything here only looks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pgcdp import proc
from pgcdp.capture import sharing, volumes
from pgcdp.capture.copying import measure
from pgcdp.capture.outside import find_outside
from pgcdp.config import ClusterConfig, VolumeConfig
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.postgres import cluster, session
from pgcdp.units import format_size

DATA, WAL, SPACE = "data", "wal", "ts-"
"""Names of volumes; behind SPACE comes that of a tablespace, as far as it can be in one."""


class Backing(NamedTuple):
    """What is asked for under a volume: a block device, or the bytes of an image file. One of them is given."""

    device: Path | None
    size: int | None


@dataclass(frozen=True, slots=True)
class Wish:
    """A volume to be. `option` is what it was asked for with, `fs` its filesystem."""

    name: str
    backing: Backing
    option: str
    fs: str
    mountpoint: Path


@dataclass(frozen=True, slots=True)
class Space:
    """A tablespace that has a directory of its own; `name` is None where the cluster does not run to be asked."""

    oid: int
    name: str | None
    location: Path

    def called(self, name: str) -> bool:
        """Whether that means this one: its name, or its OID."""
        return name == self.name or name == str(self.oid)

    def __str__(self) -> str:
        return f"tablespace {self.oid}" if self.name is None else f'tablespace "{self.name}"'


def spaces_of(pgdata: Path, facts: ClusterConfig, running: bool) -> list[Space]:
    """The tablespaces, by OID. Raises PreconditionError when a running cluster cannot be asked for their names."""
    links = cluster.tablespace_links(pgdata)
    names: Mapping[int, str] = {}
    if links and running:
        owner = proc.user_named(facts.owner)
        address = session.Dsn(Path(facts.socket_directory), facts.port, role=facts.owner, owner=owner)
        with session.connect(address) as connection:
            names = session.tablespace_names(connection)
    return [Space(oid, names.get(oid), location) for oid, location in sorted(links.items())]


def wishes(
    pgdata: Path,
    data: Backing,
    wal: Backing | None,
    tablespaces: Sequence[tuple[str, Backing]],
    spaces: Sequence[Space],
    fs: str,
    fs_of: Mapping[str, str],
) -> list[Wish]:
    """The volumes that are asked for. `fs_of`: filesystems that differ, by "data", "wal" or name of a tablespace.

    Raises UsageError for what cannot be meant, PreconditionError when something of the cluster would be left out.
    """
    link = cluster.wal_link(pgdata)
    for name in fs_of:
        if name not in (DATA, WAL, *(space for space, _ in tablespaces)) or (name == WAL and wal is None):
            raise UsageError(
                f"--fs {name}={fs_of[name]} names no volume that is asked for",
                "before the = stands data, wal, or a tablespace as --tablespace names it",
            )
    found = [Wish(DATA, data, "--volume", fs_of.get(DATA, fs), pgdata)]
    if wal is not None:
        found.append(Wish(WAL, wal, "--wal-volume", fs_of.get(WAL, fs), link or pgdata / "pg_wal"))
    elif link is not None and not Path(os.path.realpath(link)).is_relative_to(pgdata):
        raise _left_out(f"pg_wal is a link to {link}, outside the data directory", link, "--wal-volume SIZE")
    taken = {DATA, WAL}
    for name, backing in tablespaces:
        space = space_named(name, spaces)
        if any(each.mountpoint == space.location for each in found):
            raise UsageError(f"{space} is named twice", "give each tablespace one volume")
        volume = volume_name(space, taken)
        taken.add(volume)
        found.append(Wish(volume, backing, f"--tablespace {name}", fs_of.get(name, fs), space.location))
    for space in spaces:
        real = os.path.realpath(space.location)
        if not any(Path(real).is_relative_to(os.path.realpath(each.mountpoint)) for each in found):
            named = space.oid if space.name is None else space.name
            raise _left_out(
                f"{space} lies outside the data directory, in {space.location}", space.location,
                f"--tablespace {named}=SIZE",
            )  # fmt: skip
    return found


def space_named(name: str, spaces: Sequence[Space]) -> Space:
    """The tablespace that is meant by a name or OID. Raises UsageError."""
    for space in spaces:
        if space.called(name):
            return space
    known = ", ".join(f"{space} in {space.location}" for space in spaces) or "none"
    if any(space.name is None for space in spaces):
        known += "; names are known of a cluster that runs, until then give the number"
    raise UsageError(f'there is no tablespace "{name}" with a directory of its own', f"there are: {known}")


def _left_out(what: str, place: Path, option: str) -> PreconditionError:
    size = format_size(measure(place).allocated) if place.is_dir() else "nothing that can be seen"
    return PreconditionError(what, f"give it a volume of its own: {option}, or a block device; it has {size}")


def volume_name(space: Space, taken: Collection[str]) -> str:
    """How the volume of a tablespace is called."""
    plain = re.sub("[^a-z0-9_-]", "-", (space.name or "").lower())[:28]
    found = f"{SPACE}{plain}" if re.search("[a-z0-9]", plain) else f"{SPACE}{space.oid}"
    return f"{SPACE}{space.oid}" if found in taken else found


def check_places(places: Sequence[Path], others: Sequence[Path]) -> None:
    """Each place can be moved aside as a whole; none lies in another or in one of `others`.

    Raises PreconditionError.
    """
    for place in places:
        if place.is_symlink() or not place.is_dir():
            what = f"a link to {os.readlink(place)}" if place.is_symlink() else "no directory"
            raise PreconditionError(
                f"{place} is {what}, and cannot become a mount point",
                "stop the cluster and let its own link name the directory itself",
            )
        refuse_mounts(place, "stop the cluster, move it into a directory below the mount point, and change its link")
        for other in (*places, *others):
            if other != place and (place in other.parents or other in place.parents):
                raise PreconditionError(
                    f"{place} and {other} lie in each other", "move one of them out of the other, and change its link"
                )


def refuse_mounts(place: Path, hint: str) -> None:
    """Raises PreconditionError, with `hint` for a mount point, unless a directory lies wholly on one filesystem."""
    if volumes.mount_at(place) is not None:
        raise PreconditionError(f"{place} is a mount point, which cannot be moved aside", hint)
    for mount in volumes.mounts_below(Path(os.path.realpath(place))):
        raise PreconditionError(f"{mount.mountpoint} is mounted inside {place}", "umount it, or move its content there")


def refuse_outside(pgdata: Path, mountpoints: Sequence[Path]) -> None:
    """Raises PreconditionError for what of the cluster would be captured by nobody."""
    for each in find_outside(pgdata, mountpoints):
        raise PreconditionError(
            f"{pgdata / each.name} lies outside the data directory, in {each.place}",
            "move it into the data directory; pg_wal and tablespaces can have volumes of their own",
        )


def planned(found: Sequence[Wish], directory: Path, overwrite: bool) -> Iterator[VolumeConfig]:
    """The volumes to be, checked; image files lie in `directory`. Raises UsageError, PreconditionError."""
    devices: dict[int, str] = {}
    for wish in found:
        device, size = wish.backing
        by_size = "--size" if wish.name == DATA else wish.option
        if (device is None) == (size is None):
            raise UsageError(
                f"the {wish.name} volume needs exactly one of a device and a size",
                f"give {wish.option} DEV or {by_size} 20G",
            )
        if device is not None:
            # By the name that was given: what /dev/vg/lv leads to is another number after the next boot.
            backing, count = Path(os.path.abspath(device)), volumes.check_device(device, overwrite)
            sharing.refuse_held(backing)
            other = devices.setdefault(device.stat().st_rdev, wish.option)
            if other != wish.option:
                raise UsageError(f"{other} and {wish.option} name the same device", "give each volume one of its own")
        else:
            backing, count = directory / f"{wish.name}.img", (size or 0) // volumes.SECTOR * volumes.SECTOR
        least = volumes.LEAST_BYTES[wish.fs]
        if count < least:
            raise PreconditionError(
                f"the {wish.name} volume has {format_size(count)}, but {wish.fs} needs {format_size(least)}",
                f"choose a larger {by_size}",
            )
        yield VolumeConfig(wish.name, backing, device is not None, wish.fs, wish.mountpoint, count)
