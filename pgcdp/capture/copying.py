"""Copy a stopped cluster's directory tree, keeping owners, modes, times, extended attributes, links and holes.

Sockets are left out: they mean nothing in another place. The source must not change meanwhile.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pgcdp.capture.volumes import sync_filesystem
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.fsio import NO_ROOM

CHUNK = 4 << 20
DIRECTORY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TreeSize:
    """`content` is the sum of the files' lengths, `allocated` what they take on disk, in bytes."""

    content: int
    allocated: int
    entries: int


def walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every entry below `tree` as (path relative to it, its lstat), a directory before what it holds."""
    waiting = [Path()]
    while waiting:
        directory = waiting.pop()
        with os.scandir(tree / directory) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                yield directory / entry.name, status
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(directory / entry.name)


def measure(tree: Path) -> TreeSize:
    """How much a tree holds. Files that vanish meanwhile (a running cluster) are passed over."""
    content = allocated = entries = 0
    for directory, names, files in os.walk(tree):
        allocated += DIRECTORY_BYTES * len(names)
        entries += len(names) + len(files)
        for name in files:
            try:
                status = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                content += status.st_size
                allocated += max(-(-status.st_blocks * 512 // 4096) * 4096, 0)
    return TreeSize(content, allocated, entries)


def copy_tree(source: Path, target: Path, done: Callable[[int], None]) -> None:
    """Copy everything below `source` into the existing `target`, make it durable, and compare.

    `done` is called with the bytes copied so far. Raises PreconditionError when the space ends, PgcdpError when the
    copy differs.
    """
    copied = 0
    directories = [(Path(), source.lstat())]
    for place, status in walk(source):
        old, new = source / place, target / place
        mode = status.st_mode
        try:
            if stat.S_ISDIR(mode):
                new.mkdir(mode=0o700, exist_ok=True)
                directories.append((place, status))
            elif stat.S_ISLNK(mode):
                new.symlink_to(os.readlink(old))
                os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
            elif stat.S_ISREG(mode):
                _copy_file(old, new, status)
                copied += status.st_size
                done(copied)
            elif not stat.S_ISSOCK(mode):
                raise PreconditionError(
                    f"{old} is neither file, directory nor link", "remove it from the data directory"
                )
        except OSError as error:
            if error.errno in NO_ROOM:
                raise PreconditionError(f"no space left for {new}", "choose a larger size") from None
            raise PgcdpError(f"cannot copy {old} to {new}: {error.strerror}") from error
    for place, status in reversed(directories):
        _same_attributes(source / place, target / place, status)
    sync_filesystem(target)
    compare_trees(source, target)


def compare_trees(source: Path, target: Path) -> None:
    """Raises PgcdpError naming the first entry whose presence, type, owner, mode, length or link differs."""
    there = dict(_comparable(target))
    for place, wanted in _comparable(source):
        found = there.pop(place, None)
        if found != wanted:
            what = "is missing from" if found is None else "differs in"
            raise PgcdpError(f"{place} {what} the copy {target}", "nothing was changed; try again")
    if there:
        raise PgcdpError(f"{min(there)} is in the copy {target} only", "nothing was changed; try again")


def _comparable(tree: Path) -> Iterator[tuple[Path, tuple[object, ...]]]:
    for place, status in walk(tree):
        mode = status.st_mode
        if stat.S_ISSOCK(mode):
            continue
        size = status.st_size if stat.S_ISREG(mode) else 0
        link = os.readlink(tree / place) if stat.S_ISLNK(mode) else ""
        yield place, (mode, status.st_uid, status.st_gid, size, link)


def _copy_file(old: Path, new: Path, status: os.stat_result) -> None:
    source = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        target = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(target, status.st_size)
            position = 0
            while (position := _next_data(source, position, status.st_size)) < status.st_size:
                end = os.lseek(source, position, os.SEEK_HOLE)
                position = _copy_range(source, target, position, end)
        finally:
            os.close(target)
    finally:
        os.close(source)
    _same_attributes(old, new, status)


def _next_data(source: int, position: int, size: int) -> int:
    """Where the next data of a file begins; its size when only a hole follows."""
    if position >= size:
        return size
    try:
        return os.lseek(source, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise


def _copy_range(source: int, target: int, position: int, end: int) -> int:
    os.lseek(target, position, os.SEEK_SET)
    while position < end:
        moved = os.sendfile(target, source, position, min(CHUNK, end - position))
        if moved == 0:
            raise PgcdpError(
                f"a file became shorter than {end} bytes while it was copied",
                "see which program writes to the data directory",
            )
        position += moved
    return position


def _same_attributes(old: Path, new: Path, status: os.stat_result) -> None:
    """Owner first: chown clears mode bits. copystat brings mode, times and extended attributes."""
    os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(old, new)
    os.chmod(new, stat.S_IMODE(status.st_mode))
