"""Postmasters and backends as /proc shows them.

postmaster.pid alone may be a leftover of a crash, or may name a process id that something else has by now, so a
postmaster is believed in only when /proc shows it. On a dead filesystem the file cannot be read at all; then /proc
alone has to tell.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pgcdp import proc
from pgcdp.errors import PreconditionError

_POLL = 0.02
_NAMES = {"postgres", "postmaster"}


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A running postmaster. `started` (clock ticks since boot) tells it from a later process with the same id.

    `argv` is such that it can be run again from anywhere; `socket_directory` is None when it has none, `log_file`
    when its output does not go to a regular file.
    """

    pid: int
    started: int
    argv: tuple[str, ...]
    pgdata: Path
    port: int | None
    socket_directory: Path | None
    log_file: Path | None
    state: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return proc.exists(self.pid) and proc.start_time(self.pid) == self.started


def find_postmaster(pgdata: Path) -> Postmaster | None:
    """The postmaster that runs on `pgdata`, by postmaster.pid and /proc, or by /proc alone when that is unreadable."""
    try:
        lines = (pgdata / "postmaster.pid").read_text(errors="replace").splitlines()
        pid = int(lines[0])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, IndexError):
        return next((_from_proc(pid, pgdata, []) for pid in _postmasters_by_proc(pgdata)), None)
    if not _runs_postgres(pid) or not _works_in(pid, pgdata):
        return None
    return _from_proc(pid, pgdata, lines)


def find_processes(pgdata: Path) -> list[int]:
    """All server processes of the cluster at `pgdata`, also when its filesystem is dead or gone.

    Processes of other clusters at the same path inside containers are not among them.
    """
    running = [pid for pid in _all_pids() if _runs_postgres(pid)]
    found = {pid for pid in running if _works_in(pid, pgdata) or _names(pid, pgdata)}
    return sorted(found | {pid for pid in running if _parent(pid) in found})


def wait_gone(postmaster: Postmaster, timeout: float) -> bool:
    """Whether the postmaster ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while postmaster.alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def kill_leftovers(pgdata: Path, timeout: float = 20.0) -> list[int]:
    """End, with SIGKILL, all server processes of the cluster at `pgdata`; for a filesystem that is dead or gone.

    Gives the process ids. Raises PreconditionError when one does not end (it then hangs in the kernel).
    """
    # With their start times: a process that is ending has no program any more, but still holds its files and the mount.
    killed = {pid: proc.start_time(pid) for pid in find_processes(pgdata)}
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout
    while left := [pid for pid, begun in killed.items() if proc.exists(pid) and proc.start_time(pid) == begun]:
        if time.monotonic() > deadline:
            raise PreconditionError(
                f"process {left[0]} of the cluster at {pgdata} does not end", f"see /proc/{left[0]}/stack"
            )
        time.sleep(_POLL)
    return list(killed)


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _runs_postgres(pid: int) -> bool:
    try:
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return False
    return Path(program).name in _NAMES and proc.exists(pid)


def _works_in(pid: int, pgdata: Path) -> bool:
    """Whether the process's working directory is `pgdata`: the same inode, or the same path in our mount namespace."""
    with suppress(OSError):
        if os.path.samestat(os.stat(f"/proc/{pid}/cwd"), os.stat(pgdata)):
            return True
    with suppress(OSError):
        return _same_namespace(pid) and os.readlink(f"/proc/{pid}/cwd") in (str(pgdata), os.path.realpath(pgdata))
    return False


def _names(pid: int, pgdata: Path) -> bool:
    """Whether the command line names `pgdata` as data directory (a lazily unmounted one has no path any more)."""
    return _same_namespace(pid) and _data_option(_argv(pid)) in (str(pgdata), os.path.realpath(pgdata))


def _same_namespace(pid: int) -> bool:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    return False


def _postmasters_by_proc(pgdata: Path) -> list[int]:
    found = find_processes(pgdata)
    return [pid for pid in found if _parent(pid) not in found]


def _parent(pid: int) -> int | None:
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return None


def _argv(pid: int) -> tuple[str, ...]:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return tuple(os.fsdecode(word) for word in words[:-1])
    return ()


def title(pid: int) -> str:
    """What a backend calls itself, for example "postgres: walwriter"."""
    return " ".join(_argv(pid)).strip() or f"process {pid}"


def _data_option(argv: Sequence[str]) -> str | None:
    """The value of -D or its long forms in a command line."""
    for number, word in enumerate(argv):
        if word == "-D" and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith("-D") and len(word) > 2:
            return word[2:]
    return None


def _from_proc(pid: int, pgdata: Path, lines: Sequence[str]) -> Postmaster:
    """Postmaster from /proc and the lines of postmaster.pid: pid, directory, time, port, socket directory, address,
    shared memory, state."""
    field = dict(enumerate(line.strip() for line in lines))
    found = Postmaster(
        pid=pid,
        started=proc.start_time(pid) or 0,
        argv=(),
        pgdata=pgdata,
        port=int(field[3]) if field.get(3, "").isdigit() else None,
        socket_directory=Path(field[4]) if field.get(4) else None,
        log_file=_log_file(pid),
        state=field.get(7, "unknown"),
    )
    return replace(found, argv=_repeatable(pid, pgdata))


def _repeatable(pid: int, pgdata: Path) -> tuple[str, ...]:
    """The command line with absolute paths: the directory in which it was typed is not known any more."""
    argv = list(_argv(pid))
    if not argv:
        return ()
    if not argv[0].startswith("/"):
        with suppress(OSError):
            argv[0] = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    named = _data_option(argv)
    if named is None:
        return (*argv[:1], "-D", str(pgdata), *argv[1:])
    if not named.startswith("/"):
        at = next(number for number, word in enumerate(argv) if word.startswith("-D"))
        argv[at : at + (2 if argv[at] == "-D" else 1)] = ["-D", str(pgdata)]
    return tuple(argv)


def _log_file(pid: int) -> Path | None:
    for number in (2, 1):
        with suppress(OSError):
            target = Path(os.readlink(f"/proc/{pid}/fd/{number}"))
            if target.is_file():
                return target
    return None
