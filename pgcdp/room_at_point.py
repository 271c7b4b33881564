"""Room for WAL where a rewind in place goes to a point at which the volume was full.

Postgres needs some to come up. The filesystem comes back as it was, on a volume that `pgcdp grow` may have made larger
since: then it is given the rest, before Postgres starts. Where that is not enough, the rewind does not begin.
"""

from __future__ import annotations

import os
from pathlib import Path

from pgcdp import growing
from pgcdp.capture import volumes
from pgcdp.capture.superblock import filesystem_bytes, reading
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import PreconditionError
from pgcdp.fsio import free_space
from pgcdp.postgres import cluster
from pgcdp.progress import Progress, Report
from pgcdp.records import RecoveryPoint
from pgcdp.recovery.scratch import elsewhere
from pgcdp.recovery.source import Source
from pgcdp.units import format_size

SEGMENTS = 3
"""What Postgres writes until it is up on a new timeline: a copy of its last segment, a checkpoint, one ahead."""
OVERHEAD = 16
"""At most one part in so many of a filesystem is its own."""


def refuse_full(config: Config, source: Source, point: RecoveryPoint, pgdata: Path, wal: Path) -> None:
    """Raises PreconditionError when Postgres finds no room at `point`, which is mounted at `pgdata`; `wal`: its WAL."""
    spare = SEGMENTS * cluster.read_control(pgdata).wal_segment_size
    free = free_space(wal)
    if free >= spare:
        return
    real = Path(os.path.realpath(wal))
    places = {place: production for production, place in elsewhere(source, point, pgdata).items()}
    place = max((each for each in places if real.is_relative_to(each)), key=lambda each: len(each.parts))
    volume = next(each for each in config.volumes if each.mountpoint == places[place])
    mount = volumes.mount_at(place)
    assert mount is not None
    with reading(Path(mount.source)) as read:
        more = volume.bytes - filesystem_bytes(read)
    if _can_grow(volume) and free + more - more // OVERHEAD >= spare:
        return
    raise PreconditionError(
        f"volume {volume.name} was full at write {point.write}, with {format_size(free)} free: Postgres needs "
        f"{format_size(spare)} to come up",
        f"pgcdp grow {config.name} SIZE --volume {volume.name}, by {format_size(spare + spare // OVERHEAD)} at least, "
        "then run this again: the filesystem gets that as it comes back. pgcdp clone opens the point now",
    )


def give(config: Config, progress: Report) -> None:
    """What the volume has more than its filesystem; all is mounted. Does nothing where there is room."""
    wal = Path(os.path.realpath(config.pgdata / "pg_wal"))
    if free_space(wal) >= SEGMENTS * cluster.read_control(config.pgdata).wal_segment_size:
        return
    holding = [each for each in config.volumes if wal.is_relative_to(each.mountpoint)]
    volume = max(holding, key=lambda each: len(each.mountpoint.parts))
    progress(Progress(f"growing the filesystem of volume {volume.name}, which was full"))
    growing.grow_filesystem(config, volume)


def _can_grow(volume: VolumeConfig) -> bool:
    return volume.fs != "ext4" or growing.may_resize_ext4()
