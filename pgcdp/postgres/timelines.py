"""Timelines of a cluster that goes back and comes up again: history files, and which WAL its archive has already.

Postgres gives a new timeline the number behind the last history file that it finds in pg_wal. So those of all timelines
that ever were have to be there first: they are kept in a directory of their own, with what was archived.

A cluster that goes back finds the archive's notes of then (`pg_wal/archive_status`): `.ready` beside segments that were
archived since. Archived again they would be refused, or worse, would replace what the archive has. Archiving goes in
order, and a segment is recycled only when it was archived; so for each timeline two names tell all that was: the
last one with `.done`, and the oldest that is still there.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pgcdp.errors import DamageError, UsageError
from pgcdp.fsio import read_file, read_json, sync_directory, write_atomic, write_file, write_json
from pgcdp.proc import User
from pgcdp.units import parse_lsn

_HISTORY = re.compile(r"([0-9A-F]{8})\.history")
_SEGMENT = re.compile(r"[0-9A-F]{24}")
NOTED = "archived.json"
"""File in which `keep` notes what was archived."""
LONGEST_SOCKET = 80

FIRST_START = {
    "restore_command": "false",
    "recovery_target_timeline": "current",
    "recovery_target": "",
    "recovery_target_name": "",
    "recovery_target_time": "",
    "recovery_target_xid": "",
    "recovery_target_lsn": "",
    "recovery_end_command": "",
    "archive_cleanup_command": "",
    "primary_conninfo": "",
    "hot_standby": "off",
    "archive_mode": "off",
    "wal_keep_size": "1000000MB",
    "max_logical_replication_workers": "0",
    "listen_addresses": "",
}
"""Settings of the start that makes the new timeline. Nothing is archived by it, so it must recycle no WAL, either."""


@dataclass
class Archived:
    """What the archive has: of each timeline all segments up to `upto` and all before `before`; and history files."""

    upto: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    histories: set[str] = field(default_factory=set)

    def holds(self, name: str) -> bool:
        """Whether a segment or history file was archived."""
        if name in self.histories:
            return True
        timeline = name[:8]
        return bool(_SEGMENT.fullmatch(name)) and (
            name <= self.upto.get(timeline, "") or name < self.before.get(timeline, "")
        )


def histories(directory: Path) -> list[Path]:
    """The history files in a directory, in order."""
    return sorted(path for path in directory.iterdir() if _HISTORY.fullmatch(path.name))


def check(place: Path) -> Iterator[tuple[Path, DamageError | None]]:
    """Each file that `keep` left, with what is wrong with it."""
    damage: DamageError | None = None
    if (place / NOTED).exists():
        try:
            archived(place)
        except DamageError as error:
            damage = error
        yield place / NOTED, damage
    for path in histories(place):
        damage = None
        try:
            own, parent = int(path.name[:8], 16), _parent(read_file(path).decode())[0]
        except DamageError as error:
            damage = error
        except (UnicodeDecodeError, ValueError, IndexError, UsageError):
            damage = DamageError(f"{path} is no history of a timeline (offset 0)")
        else:
            if parent >= own:
                damage = DamageError(f"{path} names timeline {parent} as its parent (offset 0)")
        yield path, damage


def known(directory: Path) -> list[int]:
    """Timelines that a directory has history files of."""
    return [int(path.name[:8], 16) for path in histories(directory)]


def keep(pg_wal: Path, place: Path, archives: bool) -> None:
    """Note in `place` all history files of a cluster and what it has archived, in addition to what was noted before.

    The cluster must be stopped, so that no archiver is at work. `archives`: whether its archive_mode is on. An idle
    cluster that archives may have no `.done` left at all: what is gone from pg_wal was archived.
    """
    place.mkdir(mode=0o700, exist_ok=True)
    sync_directory(place.parent)
    for path in histories(pg_wal):
        if not (place / path.name).exists():
            write_file(place / path.name, path.read_bytes())
    noted = archived(place)
    status = pg_wal / "archive_status"
    names = sorted(os.listdir(status)) if status.is_dir() else []
    done = [name.removesuffix(".done") for name in names if name.endswith(".done")]
    noted.histories |= {name for name in done if _HISTORY.fullmatch(name)}
    _raise(noted.upto, max, filter(_SEGMENT.fullmatch, done))
    if archives:
        oldest: dict[str, str] = {}
        _raise(oldest, min, filter(_SEGMENT.fullmatch, os.listdir(pg_wal)))
        _raise(noted.before, max, oldest.values())
    write_json(
        place / NOTED, {"upto": noted.upto, "before": noted.before, "histories": sorted(noted.histories)}
    )  # fmt: skip


def archived(place: Path) -> Archived:
    """What `keep` noted. Raises DamageError."""
    try:
        content = read_json(place / NOTED)
        return Archived(dict(content["upto"]), dict(content["before"]), set(content["histories"]))
    except FileNotFoundError:
        return Archived()
    except (KeyError, TypeError, ValueError):
        raise DamageError(f"{place / NOTED} lacks keys (offset 0)") from None


def _raise(bounds: dict[str, str], which: object, names: Iterable[str]) -> None:
    for name in names:
        timeline = name[:8]
        bounds[timeline] = which(bounds.get(timeline, name), name)  # type: ignore[operator]


def put(place: Path, pg_wal: Path, user: User) -> None:
    """Give a stopped cluster all noted history files, and take from it what it would archive a second time."""
    noted = archived(place)
    for path in histories(place):
        there = pg_wal / path.name
        if not there.exists():
            _write(there, read_file(path), user)
        elif there.stat().st_uid != user.uid:  # killed before it was given to Postgres, as versions before did it
            os.chown(there, user.uid, user.gid)
    status = pg_wal / "archive_status"
    for path in sorted(pg_wal.iterdir()):
        if noted.holds(path.name):
            (status / f"{path.name}.ready").unlink(missing_ok=True)
            if not (status / f"{path.name}.done").exists():
                _write(status / f"{path.name}.done", b"", user)
    sync_directory(status)
    sync_directory(pg_wal)


def ask_recovery(pgdata: Path, user: User) -> None:
    """Have the next start end on a new timeline."""
    _write(pgdata / "recovery.signal", b"", user)


@contextmanager
def private_socket(pgdata: Path, user: User) -> Iterator[Path]:
    """A directory for the socket of a start that nobody else is to reach: the data directory, if its path is short."""
    if len(os.fsencode(pgdata)) <= LONGEST_SOCKET:
        yield pgdata
        return
    place = Path(tempfile.mkdtemp(prefix="pgcdp-", dir="/tmp"))
    try:
        os.chown(place, user.uid, user.gid)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def segment_name(timeline: int, lsn: int, segment_bytes: int) -> str:
    """The file of the WAL segment that has this position, on this timeline."""
    high, low = divmod(lsn // segment_bytes, (1 << 32) // segment_bytes)
    return f"{timeline:08X}{high:08X}{low:08X}"


def switched(pg_wal: Path, timeline: int, segment_bytes: int, archives: bool, user: User) -> None:
    """After the start that made `timeline`: no part of the old one is left to be archived, the new one's history is.

    The segment in which the old timeline was left has its beginning in the new one's first segment; under its own name
    the archive has the rest of it already, or gets it when that timeline is gone back to.
    """
    history = pg_wal / f"{timeline:08X}.history"
    parent, lsn = _parent(history.read_text(errors="replace"))
    name = segment_name(parent, lsn, segment_bytes)
    status = pg_wal / "archive_status"
    for path in (pg_wal / name, status / f"{name}.ready", status / f"{name}.done"):
        path.unlink(missing_ok=True)
    if archives:
        for path in histories(pg_wal):
            if not (status / f"{path.name}.done").exists() and not (status / f"{path.name}.ready").exists():
                _write(status / f"{path.name}.ready", b"", user)
    sync_directory(status)
    sync_directory(pg_wal)


def _parent(history: str) -> tuple[int, int]:
    """(timeline, LSN) where a timeline left its parent: the last line of its history."""
    lines = [line.split() for line in history.splitlines() if line.strip() and not line.startswith("#")]
    return int(lines[-1][0]), parse_lsn(lines[-1][1])


def _write(path: Path, content: bytes, user: User) -> None:
    write_atomic(path, content, owner=(user.uid, user.gid))
