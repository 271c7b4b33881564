"""A clone: a recovery point opened as a running Postgres that outlives the command which opened it.

All of it lies in one directory: the map and the patch of the view, what is written to it, its mounts, Postgres's
sandbox, and `clone.json`, which is written first and says all that is needed to find the rest again. Whoever opens,
steps or destroys a clone has the directory locked meanwhile. Nothing is kept in the set: a clone needs the store only.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgcdp import proc
from pgcdp.capture.control import EngineClient
from pgcdp.errors import DamageError, PgcdpError, PreconditionError, UsageError
from pgcdp.fsio import read_json, write_json
from pgcdp.postgres import cluster
from pgcdp.records import RecoveryPoint
from pgcdp.recovery import places, sandbox

PLACES = Path("/var/tmp")
"""Scratch places of all sets lie here, in directories pgcdp-*; clones among them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,29}")
RECORD = "clone.json"
_GLANCE_SECONDS = 1.0
"""So long another command may hold a clone that only looks whether somebody works on it."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a clone may be used. `port` on 127.0.0.1, None: only its socket; with `trust` anybody there is let in."""

    port: int | None = None
    trust: bool = False
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Clone:
    """What is known of a clone. `set_name` is None when it was opened from a store alone, `expires_ns` when it stays.

    `processes` are (pid, start time) of those that are its own beside Postgres; `outside`: directories of it that lie
    elsewhere. `dsn` is empty until Postgres has answered.
    """

    place: Path
    root: Path
    set_name: str | None
    store: Path
    point: RecoveryPoint
    access: Access
    created_ns: int
    expires_ns: int | None
    boot_id: str
    dsn: str = ""
    processes: tuple[tuple[int, int], ...] = ()
    outside: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return self.place.name.removeprefix("clone-")

    @property
    def pgdata(self) -> Path:
        return self.place / "mnt"

    def save(self) -> Clone:
        """Write clone.json."""
        said = asdict(self)
        del said["place"]
        write_json(self.place / RECORD, _plain(said))
        return self

    @classmethod
    def load(cls, place: Path) -> Clone:
        """Read clone.json. Raises DamageError, also when another version of pgcdp wrote it, or FileNotFoundError."""
        try:
            return cls._of(place, read_json(place / RECORD))
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise DamageError(f"{place / RECORD} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError(f"{place / RECORD} is not understood: {error!r}") from None

    @classmethod
    def _of(cls, place: Path, said: dict[str, Any]) -> Clone:
        return cls(
            place=place,
            root=Path(said["root"]),
            set_name=said["set_name"],
            store=Path(said["store"]),
            point=RecoveryPoint(**said["point"]),
            access=Access(**said["access"]),
            created_ns=said["created_ns"],
            expires_ns=said["expires_ns"],
            boot_id=said["boot_id"],
            dsn=said["dsn"],
            processes=tuple((pid, start) for pid, start in said["processes"]),
            outside=tuple(map(Path, said["outside"])),
        )


@dataclass(frozen=True, slots=True)
class Damaged:
    """A clone whose record cannot be read: no more is known of it than where it lies, and what is wrong."""

    place: Path
    problem: str

    @property
    def name(self) -> str:
        return self.place.name.removeprefix("clone-")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def boot_id() -> str:
    """Which boot of the machine this is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def check_name(name: str) -> None:
    """Raises UsageError for a name that cannot be that of a clone."""
    if not _NAME.fullmatch(name):
        raise UsageError(f'"{name}" cannot be the name of a clone', "letters, digits, - and _, at most 30")


def find_all(root: Path) -> list[Clone]:
    """All clones that were made with this root of pgcdp's state, oldest first; none that is damaged."""
    return [each for each in find_every(root) if isinstance(each, Clone)]


def find_every(root: Path) -> list[Clone | Damaged]:
    """All that `pgcdp clones` lists: `find_all`, and behind them those whose record cannot be read.

    Of these all are listed, whatever the root that they were made with, unless the record says another one.
    """
    clones, damaged = [], []
    for place in _places():
        try:
            clone = Clone.load(place)
            if clone.root == root:
                clones.append(clone)
        except DamageError as error:
            if _said_root(place) in (None, root):
                damaged.append(Damaged(place, error.message))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return [*sorted(clones, key=lambda clone: clone.created_ns), *damaged]


def _places() -> Iterator[Path]:
    """Directories of clones that are ours. Those of others may come and go meanwhile."""
    for below in sorted(PLACES.glob("pgcdp-*")):
        places: list[Path] = []
        with suppress(FileNotFoundError, NotADirectoryError):
            places = sorted(below.glob("clone-*"))
        for place in places:
            with suppress(FileNotFoundError):
                if place.lstat().st_uid == below.lstat().st_uid == os.geteuid():
                    yield place


def _said_root(place: Path) -> Path | None:
    with suppress(DamageError, OSError):
        root = read_json(place / RECORD).get("root")
        return Path(root) if isinstance(root, str) else None
    return None


def destroy(place: Path, only: Callable[[Clone], bool] | None = None) -> None:
    """End a clone and remove all of it; with `only`, if that holds for it when nobody else works on it.

    Raises PreconditionError while another command works on it.
    """
    with locked(place):
        if only is not None and not only(Clone.load(place)):
            return
        remove(place)
    remove_if_empty(place.parent)


def take_down(place: Path) -> None:
    """End everything that runs for a clone, in the order in which it stands on one another; its files stay."""
    clone = Clone.load(place)
    sandbox.end_at_once(clone.pgdata)
    for pid, start in clone.processes if clone.boot_id == boot_id() else ():
        if proc.start_time(pid) == start:
            proc.end(pid)
    for directory in clone.outside:
        shutil.rmtree(directory, ignore_errors=True)
    places.clear(place)


def state(clone: Clone) -> str:
    """ "running"; "opening" while a command works on it; "stopped" without Postgres or port; "dead" without its view.

    One that was never opened to the end is "dead", too. Raises FileNotFoundError when it is gone by now.
    """
    fd = places.lock(clone.place)
    if fd < 0:
        return "opening"
    os.close(fd)
    if clone.boot_id != boot_id() or not clone.dsn or not _view_lives(clone):
        return "dead"
    own = all(proc.start_time(pid) == start for pid, start in clone.processes)
    return "running" if own and cluster.find_postmaster(clone.pgdata) is not None else "stopped"


def _view_lives(clone: Clone) -> bool:
    try:
        return EngineClient(clone.place / "control").alive()
    except PreconditionError:  # too busy to answer in time
        return True


def written_bytes(place: Path) -> int:
    """What was written to a clone, as bytes on disk: the blocks that its view keeps apart."""
    return sum(file.stat().st_blocks * 512 for file in place.glob("*.cow"))


def memory_bytes(place: Path, own: Iterable[int] = ()) -> int:
    """Memory that the processes of a clone have for themselves: those of Postgres, its view's, and its `own`."""
    pids = [*cluster.find_processes(place / "mnt"), *own]
    with suppress(PgcdpError):
        pids.append(int(EngineClient(place / "control").request("status", timeout=5.0)["pid"]))
    total = 0
    for pid in set(pids):
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def expire(root: Path, set_name: str | None = None) -> None:
    """Destroy the clones whose time is over: all, or those of a set and of stores alone.

    What is worked on now waits for the next time.
    """

    def is_over(clone: Clone) -> bool:
        return clone.expires_ns is not None and clone.expires_ns <= time.time_ns()

    for each in find_all(root):
        if is_over(each) and (set_name is None or each.set_name in (set_name, None)):
            with suppress(PgcdpError, OSError):
                destroy(each.place, is_over)


def clear_dead(root: Path, set_name: str) -> None:
    """Remove what a crash of the machine left of clones of a set, and of those of a store alone, which have none.

    Those of this boot stay, whatever their state.
    """

    def is_left(clone: Clone) -> bool:
        return clone.boot_id != boot_id()

    for each in find_all(root):
        if each.set_name in (set_name, None) and is_left(each):
            with suppress(PgcdpError, OSError):
                destroy(each.place, is_left)


# --- removing


@contextmanager
def locked(place: Path) -> Iterator[None]:
    name = place.name.removeprefix("clone-")
    gone = PreconditionError(f"there is no clone {name} any more", "pgcdp clones lists them")
    deadline = time.monotonic() + _GLANCE_SECONDS
    try:
        while (fd := places.lock(place)) < 0 and time.monotonic() < deadline:
            time.sleep(0.02)
    except FileNotFoundError:
        raise gone from None
    if fd < 0:
        raise PreconditionError(
            f"another command is working on clone {name}", "wait for it, then run this again; pgcdp clones lists them"
        )
    try:
        if not places.is_still(place, fd):  # removed, and maybe made anew, before it was locked
            raise gone
        yield
    finally:
        os.close(fd)


def remove_unfinished(parent: Path) -> None:
    """Remove what was killed before it could write clone.json: no list shows it. The caller is `alone` there."""
    for place in parent.glob("clone-*"):
        if not place.is_dir() or place.is_symlink() or (place / RECORD).exists():
            continue
        fd = places.lock(place)
        if fd < 0:  # it is being made
            continue
        try:
            remove(place)
        finally:
            os.close(fd)


def remove_if_empty(parent: Path) -> None:
    """Not while somebody is about to make something in it."""
    with suppress(OSError, PreconditionError), places.alone(parent):
        parent.rmdir()


def remove(place: Path) -> None:
    try:
        take_down(place)
    except (FileNotFoundError, DamageError):  # killed before it was written, or not ours to read any more
        sandbox.end_at_once(place / "mnt")
        places.clear(place)
    places.remove(place)
