"""Disks: `make_disk(size)` gives a block device of a test's own; ask for it before `make_set`, which lies on it.

`make_disk(size, host="xfs")`: its bytes lie in a file of a filesystem of that kind, which is mounted for it alone.
`journal_disk` is where a small one is mounted, to be filled by a journal.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgcdp.capture import volumes
from tests.failing_disks import unmount
from tests.scratch import SCRATCH, scratch_directory

MakeDisk = Callable[..., Path]
SPARE = 128 << 20
"""What a filesystem takes for itself, at most."""


@pytest.fixture
def make_disk() -> Iterator[MakeDisk]:
    """make_disk(size, host=None): a block device of `size` bytes, all zeros."""
    root = scratch_directory("disk")
    devices: list[Path] = []
    mounts: list[Path] = []

    def device(image: Path, size: int) -> Path:
        volumes.make_image(image, size)
        devices.append(volumes.attach_loop(image))
        return devices[-1]

    def make(size: int, host: str | None = None) -> Path:
        place = root / f"disk{len(devices)}"
        place.mkdir()
        if host is not None:
            below = device(root / f"{place.name}.img", max(size + SPARE, volumes.LEAST_BYTES[host]))
            volumes.make_filesystem(below, host, 0, 0, zeroed=True)
            volumes.mount(below, place, host)
            mounts.append(place)
        return device(place / "bytes", size)

    yield make
    # A file on a mounted disk is attached behind the disk itself: in turn from the top down.
    for made in reversed(devices):
        for place in mounts:
            if not volumes.loops_over(place):
                unmount(place)
        volumes.detach_loop(made)
    shutil.rmtree(root)


@pytest.fixture
def journal_disk(make_disk: MakeDisk) -> Iterator[Path]:
    """The mount point of an ext4 of 640 MiB; ask for it before `make_set`."""
    device = make_disk(640 << 20)
    place = SCRATCH / f"journal-{os.getpid()}"
    volumes.make_filesystem(device, "ext4", 0, 0, zeroed=True)
    place.mkdir()
    volumes.mount(device, place, "ext4")
    yield place
    unmount(place)
    place.rmdir()
