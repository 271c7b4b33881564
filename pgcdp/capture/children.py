"""Processes of the engine that this process starts: each in a session of its own, and collected when it ends."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pgcdp.errors import PreconditionError

_children: set[int] = set()
"""Engines that this process started: their ends are collected, so that no zombie stays while this process lives."""


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
    """That of a child which has ended and is collected by this (1 when another thread has), None as long as it runs."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        ended, status = pid, 1 << 8
    if not ended:
        return None
    _children.discard(pid)
    return os.waitstatus_to_exitcode(status)


def end(pid: int) -> None:
    """Kill a child unless it is collected already, and collect it."""
    if pid in _children:
        os.kill(pid, signal.SIGKILL)
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
    for pid in list(_children):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0]
        except ChildProcessError:  # somebody else has collected it
            ended = pid
        if ended:
            _children.discard(pid)


def pidfd(pid: int) -> int | None:
    """A descriptor that is readable when the process has ended; None when it has already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
