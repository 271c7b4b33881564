"""Whether the backings of a set's volumes are where they belong: files are removed, disks die."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pgcdp.config import Config, VolumeConfig


def problems(config: Config, pid: int | None) -> Iterator[tuple[VolumeConfig, str]]:
    """Volumes whose backing is not there, with what is wrong. `pid`: the process that captures, if one does.

    That writes to what it has opened, also when the file under that name is removed or another one by now.
    """
    opened = None if pid is None else _open_files(pid)
    for volume in config.volumes:
        try:
            status = volume.backing.stat()
        except OSError as error:
            yield volume, f"{volume.backing} of volume {volume.name}: {(error.strerror or str(error)).lower()}"
            continue
        if opened is not None and (status.st_dev, status.st_ino) not in opened:
            yield volume, f"{volume.backing} is not the file that capture of volume {volume.name} has open"


def way_on(config: Config, volume: VolumeConfig) -> str:
    """What is typed without the disk of a volume."""
    return f"bring its disk back; if that is lost, give it room at the same place: {remakes(config, volume)}"


def remakes(config: Config, *lost: VolumeConfig) -> str:
    """What writes volumes anew."""
    named = " ".join(f"--remake {volume.name}" for volume in lost)
    return f"pgcdp up {config.name} {named} writes the volume anew from store and journal"


def _open_files(pid: int) -> set[tuple[int, int]] | None:
    """(device, inode) of each; None when the process has ended."""
    found = set[tuple[int, int]]()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                status = os.stat(link)
                found.add((status.st_dev, status.st_ino))
    except OSError:
        return None
    return found
