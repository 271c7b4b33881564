"""Which file each block of a mounted volume belongs to, by the filesystem's own word.

Extents of files come from FIEMAP (linux/fiemap.h), what is free from GETFSMAP (linux/fsmap.h; ext4 and xfs know it).
What is neither is the filesystem's own: its log, bitmaps, inodes, directories, trees. Nothing is read through the
filesystem and no access time changes, so that looking writes nothing.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgcdp.log import get
from pgcdp.postgres.cluster import tablespace_links, wal_link
from pgcdp.records import BLOCK, FILE_EXTENT

log = get(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

FS_IOC_FIEMAP = 0xC020660B
FS_IOC_GETFSMAP = 0xC0C0583B
_FIEMAP = struct.Struct("<QQIIII")
_EXTENTS_AT_ONCE = 512
_LAST = 0x1
_NO_PLACE = 0x2 | 0x4 | 0x8 | 0x100 | 0x200
"""FIEMAP_EXTENT_UNKNOWN, DELALLOC, ENCODED, NOT_ALIGNED, DATA_INLINE: no blocks of the file's own, or none yet."""
_FREE = 1
"""FMR_OWN_FREE."""
_SETTLED_NS = 2_000_000_000
"""A file that changed this shortly before it was looked at may change again within the same tick of its clock."""

QUICK_SECONDS = 0.05
"""A map that takes no more processor time is always made anew."""

NONE, METADATA, UNKNOWN = -1, -2, -3
"""In place of a file: the filesystem's own block; nobody's, or not known."""

VOLUME_SHIFT = 46
"""A key names a block of a set: volume << VOLUME_SHIFT | block."""


class Place(NamedTuple):
    """Where a volume's filesystem is mounted, and what stands before its paths: "" for the data directory's own.

    Of a volume outside of that it is the mount point itself; what a link of the cluster leads to there has its name as
    the cluster calls it ("pg_tblspc/16385/...").
    """

    volume: int
    mountpoint: Path
    prefix: str


@dataclass(frozen=True)
class FileMap:
    """`files`: array FILE_EXTENT in order of volume and block, its `file` a place in `paths`; `free` likewise.

    `told`: the volumes whose filesystem told what is free. Paths are relative to the data directory.
    """

    files: NDArray[np.void]
    paths: tuple[str, ...]
    free: NDArray[np.void]
    told: frozenset[int]

    def owners(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For blocks by key: whose each is (a place in `paths`, METADATA or UNKNOWN), and which block of that file."""
        row, into = _covering(self.files, keys)
        owner = np.where(row >= 0, self.files["file"].astype(np.int64)[row] if len(self.files) else NONE, NONE)
        at = np.where(row >= 0, self.files["at"].astype(np.int64)[row] + into if len(self.files) else 0, 0)
        own = ~(_covering(self.free, keys)[0] >= 0) & np.isin(keys >> VOLUME_SHIFT, list(self.told))
        return np.where(owner != NONE, owner, np.where(own, METADATA, UNKNOWN)), at


def _covering(extents: NDArray[np.void], keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row that each key lies in, -1 for none, and how far inside of it."""
    begin = (extents["volume"].astype(np.int64) << VOLUME_SHIFT) + extents["block"].astype(np.int64)
    row = np.searchsorted(begin, keys, side="right") - 1
    if not len(extents):
        return row, row
    into = keys - begin[row]
    return np.where((row >= 0) & (into < extents["count"].astype(np.int64)[row]), row, -1), into


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file as it was looked at: its extents hold while these are the same."""

    facts: tuple[int, int, int]
    extents: tuple[tuple[int, int, int], ...]


class FileMapper:
    """Makes maps of the same places again and again; what has not changed since is not asked for again."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self._seen: dict[tuple[int, int], _Seen] = {}
        self._running: threading.Thread | None = None
        self._newest: tuple[float, FileMap] | None = None
        self._took = 0.0

    def soon(self, patience: float, share: float) -> FileMap | None:
        """A map that is begun now, if it is there within `patience` seconds; None when it is not.

        It is made in a thread of its own: the filesystem may wait for a journal that only the caller can make room in.
        When the last one took much processor time (QUICK_SECONDS), and more than `share` of the time since, that one is
        given again.
        """
        if self._running is not None and self._running.is_alive():
            return None
        slow = self._took > QUICK_SECONDS
        if slow and self._newest is not None and self._took > share * (time.monotonic() - self._newest[0]):
            return self._newest[1]
        asked = time.monotonic()
        self._running = threading.Thread(target=self._run, name="filemap", daemon=True)
        self._running.start()
        self._running.join(patience)
        newest = self._newest
        return newest[1] if newest is not None and newest[0] >= asked else None

    def _run(self) -> None:
        began = time.thread_time()
        try:
            found = self.map()
        except OSError as error:
            log.warning("no map of files: %s", error)
            return
        self._took = time.thread_time() - began
        self._newest = time.monotonic(), found

    def map(self) -> FileMap:
        """Ask the filesystems. Files that come and go meanwhile may be missing. Raises OSError."""
        paths: list[str] = []
        rows: list[tuple[int, int, int, int, int]] = []
        free: list[tuple[int, int, int, int, int]] = []
        told: set[int] = set()
        seen: dict[tuple[int, int], _Seen] = {}
        links = self._links()
        for place in self.places:
            for path, key, found in self._files(place):
                seen[key] = found
                rows += [(block, count, place.volume, at, len(paths)) for block, count, at in found.extents]
                paths.append(_called(path, links) if path.startswith("/") else path)
            with suppress(OSError):  # a filesystem that cannot tell
                free += [(block, count, place.volume, 0, 0) for block, count in free_blocks(place.mountpoint)]
                told.add(place.volume)
        self._seen = seen
        return FileMap(_table(rows), tuple(paths), _table(free), frozenset(told))

    def _links(self) -> dict[str, str]:
        """Where links of the data directory lead, to what they are called: pg_wal and tablespaces."""
        pgdata = next((place.mountpoint for place in self.places if not place.prefix), None)
        if pgdata is None or len(self.places) == 1:
            return {}
        wal = wal_link(pgdata)
        spaces = {os.fspath(place): f"pg_tblspc/{oid}" for oid, place in tablespace_links(pgdata).items()}
        return spaces | ({os.fspath(wal): "pg_wal"} if wal is not None else {})

    def _files(self, place: Place) -> Iterator[tuple[str, tuple[int, int], _Seen]]:
        device = os.stat(place.mountpoint).st_dev
        waiting = [""]
        while waiting:
            inside = waiting.pop()
            with suppress(FileNotFoundError):
                for name, status, fd in _entries(place.mountpoint / inside):
                    path = f"{inside}/{name}" if inside else name
                    if status.st_dev != device:
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(path)
                    elif stat.S_ISREG(status.st_mode):
                        with suppress(FileNotFoundError):
                            key = (place.volume, status.st_ino)
                            yield place.prefix + path, key, self._look(key, name, status, fd)

    def _look(self, key: tuple[int, int], name: str, status: os.stat_result, directory: int) -> _Seen:
        facts = (status.st_ctime_ns, status.st_size, status.st_blocks)
        known = self._seen.get(key)
        if known is not None and known.facts == facts:
            return known
        fd = os.open(name, os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            extents, whole = file_extents(fd)
        finally:
            os.close(fd)
        if not whole or time.time_ns() - status.st_ctime_ns < _SETTLED_NS:
            facts = (0, 0, 0)
        return _Seen(facts, extents)


def _called(path: str, links: Mapping[str, str]) -> str:
    for place, name in links.items():
        if path.startswith(f"{place}/"):
            return name + path[len(place) :]
    return path


def _entries(directory: Path) -> Iterator[tuple[str, os.stat_result, int]]:
    """(name, status, descriptor of the directory) of what is in a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False), fd
    finally:
        os.close(fd)


def _ioctl(fd: int, request: int, buffer: bytearray) -> None:
    """ioctl that lets other threads go on: it may wait for room in the journal, and they make it.

    (fcntl.ioctl keeps Python's lock meanwhile when the buffer is larger than 1 KiB.) Raises OSError.
    """
    place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if _libc.ioctl(fd, request, ctypes.addressof(place)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def file_extents(fd: int) -> tuple[tuple[tuple[int, int, int], ...], bool]:
    """(block on the volume, number of blocks, block in the file) of a file's extents; False: some have no place yet."""
    found: list[tuple[int, int, int]] = []
    whole, start = True, 0
    while True:
        buffer = bytearray(_FIEMAP.pack(start, (1 << 64) - 1 - start, 0, 0, _EXTENTS_AT_ONCE, 0))
        buffer += bytes(56 * _EXTENTS_AT_ONCE)
        _ioctl(fd, FS_IOC_FIEMAP, buffer)
        count = _FIEMAP.unpack_from(buffer)[3]
        flags = _LAST
        for number in range(count):
            at, physical, length, flags = struct.unpack_from("<QQQ16xI", buffer, _FIEMAP.size + 56 * number)
            start = at + length
            if flags & _NO_PLACE:
                whole = False
            else:
                found.append((physical // BLOCK, -(-length // BLOCK), at // BLOCK))
        if flags & _LAST or not count:
            return tuple(found), whole


def free_blocks(mountpoint: Path) -> Iterator[tuple[int, int]]:
    """(block, number of blocks) of what is free on a mounted filesystem. Raises OSError where it cannot tell."""
    entries = 1024
    low = struct.pack("<II7Q", *[0] * 9)
    last = struct.pack("<II7Q", 0xFFFFFFFF, 0xFFFFFFFF, *[(1 << 64) - 1] * 3, *[0] * 4)
    key = low
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC)
    try:
        while True:
            buffer = bytearray(struct.pack("<IIII6Q", 0, 0, entries, 0, *[0] * 6) + key + last + bytes(64 * entries))
            _ioctl(fd, FS_IOC_GETFSMAP, buffer)
            count = struct.unpack_from("<I", buffer, 12)[0]
            flags = 0
            for number in range(count):
                at = 192 + 64 * number
                _, flags, physical, owner, _, length = struct.unpack_from("<IIQQQQ", buffer, at)
                if owner == _FREE:
                    yield physical // BLOCK, length // BLOCK
                key = bytes(buffer[at : at + 64])  # the next call goes on behind this one
            if not count or flags & 0x20:  # FMR_OF_LAST
                return
    finally:
        os.close(fd)


def places_of(pgdata: Path, mountpoints: Mapping[int, Path]) -> list[Place]:
    """The places of a set's volumes, from their numbers and mount points."""
    found = []
    for volume, mountpoint in mountpoints.items():
        inside = mountpoint.is_relative_to(pgdata)
        prefix = os.fspath(mountpoint.relative_to(pgdata)) if inside else os.fspath(mountpoint)
        found.append(Place(volume, mountpoint, "" if prefix == "." else f"{prefix}/"))
    return found


def _table(rows: list[tuple[int, int, int, int, int]]) -> NDArray[np.void]:
    table = np.array(rows, dtype=FILE_EXTENT)
    return table[np.lexsort((table["block"], table["volume"]))]
