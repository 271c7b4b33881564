"""Disks that are really full or really gone: small filesystems on loop devices of a test's own."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

from pgcdp.capture import volumes
from pgcdp.errors import PreconditionError
from tests.waiting import wait_until

FS_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: from then on each request to the filesystem fails with EIO."""
LOG_FLUSH = 1


def unmount(place: Path, device: Path | None = None) -> None:
    """As soon as nobody uses what is mounted there: what an ended process held is let go a moment later.

    `device`: until its filesystem has ended, too. A sandbox that just starts beside this test has all mounts for a
    moment, and who mounts the device again would get the same filesystem, dead as it is.
    """

    def gone() -> bool:
        with suppress(PreconditionError):
            volumes.unmount(place)
            if device is not None:
                volumes.refuse_in_use(device)
            return True
        return False

    wait_until(gone, timeout=60, interval=0.05, what=f"nobody uses {place}")


class SmallDisk:
    """A filesystem of `size` bytes, mounted at `place`. `fill` and `empty`, `die` and `come_back`."""

    def __init__(self, root: Path, name: str, size: int, fs: str = "ext4") -> None:
        self.place = root / name
        self._fs = fs
        self._image = root / f"{name}.img"
        self._ballast = self.place / "ballast"
        self.dead = False
        with self._image.open("wb") as file:
            file.truncate(size)
        self.place.mkdir()
        self._device = volumes.attach_loop(self._image)
        volumes.make_filesystem(self._device, fs, 0, 0, zeroed=True)
        volumes.mount(self._device, self.place, fs)

    def fill(self) -> None:
        """No block is left, also not for root."""
        file = os.open(self._ballast, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            piece = 1 << 28
            while piece >= 4096:
                try:
                    os.posix_fallocate(file, os.fstat(file).st_size, piece)
                except OSError:
                    piece //= 2
        finally:
            os.close(file)

    def empty(self) -> None:
        """There is room again. Harmless when there was."""
        if not self.dead:
            self._ballast.unlink(missing_ok=True)

    def die(self) -> None:
        """From now on every read and write fails, also by descriptors that are open."""
        self.dead = True
        directory = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(directory, FS_SHUTDOWN, struct.pack("I", LOG_FLUSH))
        finally:
            os.close(directory)

    def leave(self) -> None:
        """The mount goes, as soon as nobody holds on to what is dead: its mount point is an empty directory."""
        unmount(self.place, self._device)

    def come_back(self) -> None:
        """Mounted again, with what was on it. Harmless when it is."""
        if self.dead:
            self.leave()
            volumes.mount(self._device, self.place, self._fs)
            self.dead = False

    def end(self) -> None:
        """Everything away."""
        self.leave()
        volumes.detach_loop(self._device)
        self._image.unlink()
