"""Processes of the engine that this process starts: each in a session of its own, and collected when it ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pgcdp.errors import PreconditionError

_children: set[int] = set()
"""Engines that this process started: their ends are collected, so that no zombie stays while this process lives."""
_statuses: dict[int, int] = {}
"""What `reap` has collected, as waitpid tells it, for the thread that asks for it: another one may have been faster."""
_collecting = threading.Lock()


def spawn(command: Sequence[str], log: int, files: Mapping[int, int]) -> int:
    """The process id of a child in a session of its own, whose directory is / and whose output goes to `log`.

    `files` are further descriptors: {its number there: the one here}; standard input is empty unless named there.
    """
    passed = {**files, 1: log, 2: log}
    # Copied to where nothing is first: any of them may have the number that another one gets.
    free = max(*passed.keys(), *passed.values()) + 1
    copies = dict(enumerate(passed, free))
    steps: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        *((os.POSIX_SPAWN_DUP2, passed[there], copy) for copy, there in copies.items()),
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        *((os.POSIX_SPAWN_DUP2, copy, there) for copy, there in copies.items()),
        *((os.POSIX_SPAWN_CLOSE, copy) for copy in copies),
    ]
    shell = ["/bin/sh", "-c", 'cd / && exec "$@"', "sh", *command]
    pid = os.posix_spawn(shell[0], shell, os.environ, file_actions=steps, setsid=True)
    _statuses.pop(pid, None)  # of another process that had this number
    _children.add(pid)
    return pid


def kill(pid: int, ended: int, timeout: float = 60.0) -> None:
    """SIGKILL by a pidfd, which is closed, and await the end. Raises PreconditionError when it does not end."""
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        if not select.select([ended], [], [], timeout)[0]:
            raise PreconditionError(
                f"process {pid} does not end after SIGKILL", f"see /proc/{pid}/stack for what it waits"
            )
    finally:
        os.close(ended)
        reap()


def exit_code(pid: int) -> int | None:
    """That of a child which has ended, whichever thread has collected it; None as long as it runs."""
    with _collecting:
        _collect(pid)
        if pid in _children:
            return None
        return os.waitstatus_to_exitcode(_statuses.pop(pid, 1 << 8))


def end(pid: int) -> None:
    """Kill a child unless it is collected already, and collect it."""
    with _collecting:  # else another thread collects it, and the number could be another process's by then
        if pid not in _children:
            _statuses.pop(pid, None)
            return
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    _children.discard(pid)


def await_end(pid: int, timeout: float = 60.0) -> None:
    """Until a child has ended, which is killed when it does not."""
    deadline = time.monotonic() + timeout
    while pid in _children and time.monotonic() < deadline:
        reap()
        if pid in _children:
            time.sleep(0.005)
    end(pid)


def reap() -> None:
    """Collect the engines that this process started and that have ended, so that none stays a zombie."""
    with _collecting:
        for pid in list(_children):
            _collect(pid)


def _collect(pid: int) -> None:
    """Collect one if it has ended. Call it with `_collecting` held."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        _children.discard(pid)
        return
    if ended:
        _children.discard(pid)
        _statuses[pid] = status


def pidfd(pid: int) -> int | None:
    """A descriptor that is readable when the process has ended; None when it has already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
