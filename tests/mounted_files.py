"""A filesystem on a captured file, and programs that use it: files that come, grow, change in place and go."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pgcdp import proc
from pgcdp.capture import volumes
from tests.fix_engine import BLOCK, MIB
from tests.model import DISCARD
from tests.raw_workload import erase


@contextmanager
def mounted_filesystem(device: Path, fs: str, place: Path) -> Iterator[Path]:
    """A new filesystem on a served file, mounted at the new directory `place` through a loop device."""
    place.mkdir()
    loop = volumes.attach_loop(device, volumes.WRITE_THROUGH)
    try:
        volumes.make_filesystem(loop, fs, 0, 0, zeroed=True)
        volumes.mount(loop, place, fs)
        yield place
    finally:
        volumes.unmount(place)
        volumes.detach_loop(loop)


class FileUser:
    """One program below a directory of its own. Each `step` is one change, at most of 256 KiB."""

    FILES = 12
    LONGEST = MIB

    def __init__(self, place: Path, seed: int) -> None:
        place.mkdir()
        self.place = place
        self.rng = random.Random(seed)
        self._steps: list[Callable[[Path], None]] = [
            self._replace, self._append, self._rewrite, self._rewrite, self._grow_sparse, self._punch, self._delete
        ]  # fmt: skip

    def step(self) -> None:
        """One change, most often made durable."""
        if self.rng.random() < 0.01:
            proc.run(["fstrim", os.fspath(self.place)])
        self.rng.choice(self._steps)(self.place / f"file-{self.rng.randrange(self.FILES)}")

    def _data(self) -> bytes:
        return self.rng.randbytes(self.rng.choice([100, 8192, 8192, 40_000, 256 << 10]))

    def _write(self, path: Path, at: Callable[[int], int], data: bytes) -> None:
        """Write to a place that depends on the file's length."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(fd, data, at(os.fstat(fd).st_size))
            if self.rng.random() < 0.7:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _replace(self, path: Path) -> None:
        fresh = path.with_suffix(".new")
        self._write(fresh, lambda size: 0, self._data())
        fresh.rename(path)
        volumes.sync_filesystem(self.place)

    def _append(self, path: Path) -> None:
        self._write(path, lambda size: size if size < self.LONGEST else 0, self._data())

    def _rewrite(self, path: Path) -> None:
        self._write(path, lambda size: self.rng.randrange(size // BLOCK + 1) * BLOCK, self.rng.randbytes(2 * BLOCK))

    def _grow_sparse(self, path: Path) -> None:
        self._write(path, lambda size: self.rng.randrange(self.LONGEST, 8 * self.LONGEST), self.rng.randbytes(5000))

    def _punch(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            erase(fd, DISCARD, self.rng.randrange(16) * BLOCK, self.rng.randint(1, 16) * BLOCK, device=False)
        finally:
            os.close(fd)

    def _delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
