"""The directories of a cluster that its volumes take the place of: the data directory, and what lies elsewhere.

A volume whose mount point is inside another's (pg_wal in the data directory) moves with that; all others are places of
their own. Each place keeps its path: what the cluster's links name holds good on both sides of protect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pgcdp.capture.copying import measure
from pgcdp.config import Config, VolumeConfig

DATA_DIRECTORY = "mnt"


def places(config: Config) -> list[Path]:
    """What is moved as a whole, the data directory first."""
    return [volume.mountpoint for volume in config.volumes if not _outer(config, volume)]


def before(place: Path, set_name: str) -> Path:
    """Where the old directory waits until protect has ended, beside its place."""
    return place.with_name(f"{place.name}.pgcdp-before-{set_name}")


def plain(place: Path, set_name: str) -> Path:
    """Where unprotect gathers the plain copy, on the filesystem of the mount point."""
    return place.with_name(f"{place.name}.pgcdp-plain-{set_name}")


def below(config: Config, volume: VolumeConfig, scratch: Path) -> Path:
    """Where a volume is mounted when the set is in a scratch directory, as `layout` tells."""
    return layout(config.pgdata, {each.name: each.mountpoint for each in config.volumes}, scratch)[volume.name]


def layout(pgdata: Path, mountpoints: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """Where the volumes are mounted below a scratch directory, in the order of mounting; touches nothing.

    `scratch`/mnt is the data directory, what lies outside of it has a directory beside that.
    """
    found: dict[str, Path] = {}
    for name, place in sorted(mountpoints.items(), key=lambda each: len(each[1].parts)):
        outer = next((each for each in found if mountpoints[each] in place.parents), None)
        if outer is not None:
            found[name] = found[outer] / place.relative_to(mountpoints[outer])
        else:
            found[name] = scratch / (DATA_DIRECTORY if place == pgdata else f"{DATA_DIRECTORY}-{name}")
    return found


def contents(config: Config) -> Iterator[tuple[VolumeConfig, int]]:
    """The volumes, and how many bytes on disk the cluster has at each one's place now."""
    whole = {volume.name: measure(volume.mountpoint).allocated for volume in config.volumes}
    for volume in config.volumes:
        inner = [each.name for each in config.volumes if _outer(config, each) == volume]
        yield volume, max(whole[volume.name] - sum(whole[name] for name in inner), 0)


def _outer(config: Config, volume: VolumeConfig) -> VolumeConfig | None:
    """The volume whose directory holds another's mount point."""
    for each in config.volumes:
        if each.mountpoint in volume.mountpoint.parents:
            return each
    return None
