"""Data of a cluster that lies outside of its volumes: what is written there is captured by nobody (truth 8).

Postgres follows links and mounts without a word: a tablespace made since, a pg_wal that was moved, a database directory
or a single file that somebody put on another disk. Only the names are looked at, nothing is opened, and no access time
changes, so that looking writes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp.capture import volumes
from pgcdp.log import get
from pgcdp.postgres.cluster import FOLLOWED

log = get(__name__)

PASSING = ("pg_stat_tmp", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans")
"""What Postgres empties or makes anew at each start: wherever it lies, nothing is lost with it (pg_stat_tmp is often in
memory)."""
FOLLOWED_DEPTH = 4
"""pg_tblspc/OID/PG_15_202209061/DATABASE/FILE: below that is nothing of Postgres's."""


@dataclass(frozen=True, slots=True)
class Outside:
    """`name` as the cluster calls it, relative to the data directory ("pg_tblspc/16385"), and where it is in truth."""

    name: str
    place: Path


def rows_of(found: Sequence[Outside] | None) -> list[tuple[str, str]] | None:
    """As (name, place): so an interval keeps it. None: it is not known."""
    return None if found is None else [(each.name, os.fspath(each.place)) for each in found]


def find_outside(pgdata: Path, mountpoints: Iterable[Path]) -> list[Outside]:
    """What of the cluster does not lie on the volumes mounted there, in order of name. Raises OSError.

    Links are followed where Postgres would. Without `mountpoints` the data directory itself is where all must be.
    """
    real = Path(os.path.realpath(pgdata))
    own = [Path(os.path.realpath(place)) for place in mountpoints] or [real]
    foreign = {mount.mountpoint for mount in volumes.mounts()} - set(own)
    return sorted(_walk("", real, 0, own, foreign), key=lambda found: found.name)


def takes_in(set_name: str, found: Sequence[Outside]) -> str:
    """What to type, or to do, so that what was found is captured."""
    spaces = [each.name.removeprefix("pg_tblspc/") for each in found if each.name.startswith("pg_tblspc/")]
    if len(spaces) < len(found):
        return "stop the cluster and move it into the data directory"
    options = " ".join(f"--tablespace {space}=SIZE" for space in spaces)
    return f"pgcdp protect {set_name} {options} takes it into the set; or move its tables to another tablespace"


def all_mounted(mountpoints: Iterable[Path]) -> bool:
    """Whether each volume is mounted: else there is nothing to look at, and nothing found means nothing."""
    return all(volumes.mount_at(place) is not None for place in mountpoints)


class Looker:
    """Looks again and again, without ever waiting long for a filesystem."""

    def __init__(self, pgdata: Path, mountpoints: Sequence[Path]) -> None:
        self._where = pgdata, mountpoints
        self._running: threading.Thread | None = None
        self._found: list[Outside] | None = None

    def soon(self, patience: float) -> list[Outside] | None:
        """What `find_outside` tells from now on, if it does within `patience` seconds; None when it does not.

        None, too, unless every volume is mounted all the while.
        It is found by a thread of its own: the filesystem may wait for a journal that only the caller can make room in.
        """
        if self._running is not None and self._running.is_alive():
            return None
        self._found = None
        self._running = threading.Thread(target=self._run, name="outside", daemon=True)
        self._running.start()
        self._running.join(patience)
        return self._found

    def _run(self) -> None:
        _, mountpoints = self._where
        try:
            if all_mounted(mountpoints):
                found = find_outside(*self._where)
                self._found = found if all_mounted(mountpoints) else None
        except OSError as error:
            log.warning("it is not known whether data lies outside of the volumes: %s", error)


def _walk(name: str, directory: Path, depth: int, own: Sequence[Path], foreign: set[Path]) -> Iterator[Outside]:
    """`name`: how the cluster calls the directory, with a slash behind it."""
    for entry, is_link, is_directory in _entries(directory):
        if depth == 0 and (not FOLLOWED.fullmatch(entry) or entry in PASSING):
            continue
        place = directory / entry
        if is_link:
            place = Path(os.path.realpath(place))
        elif not is_directory:
            continue
        inside = any(place.is_relative_to(each) for each in own)
        if (is_link and not inside) or place in foreign:
            yield Outside(name + entry, place)
        elif depth < FOLLOWED_DEPTH:
            yield from _walk(f"{name}{entry}/", place, depth + 1, own, foreign)


def _entries(directory: Path) -> Iterator[tuple[str, bool, bool]]:
    """(name, whether it is a link, whether a directory) of what is in a directory; nothing when it is none any more."""
    with suppress(FileNotFoundError, NotADirectoryError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    yield entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False)
        finally:
            os.close(fd)
