"""What the tests of one session have left on the machine. Sessions that run at the same time are not blamed."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.scratch import SCRATCH
from tests.waiting import wait_until

SESSION_VARIABLE = "PGCDP_TEST_SESSION"
OURS = "/var/tmp/pgcdp-"
"""How the directories begin that pgcdp makes by itself."""


class Watch:
    """Notes the scratch directories that this process makes, from now on."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.made: set[Path] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir":
            path = os.fspath(arguments[0])
            if not isinstance(path, str) or path == str(SCRATCH):
                return
            if Path(path).parent == SCRATCH or (path.startswith(OURS) and "/" not in path.removeprefix(OURS)):
                self.made.add(Path(path))

    def left(self, others: set[Path]) -> list[str]:
        """Lines that name each process, mount, loop device and directory that is left.

        `others` are directories that may stay, but in which nothing may be mounted or running. What is about to go is
        waited for: a process that ends, a loop device that somebody looked at as it was detached.
        """
        with suppress(TimeoutError):
            wait_until(lambda: not self._left(others), timeout=10, interval=0.2, what="the end of all that is left")
        return self._left(others)

    def _left(self, others: set[Path]) -> list[str]:
        roots = self.made | others
        return [
            *(f"process {pid}: {command}" for pid, command in _processes(self.session, roots).items()),
            *(f"mount {point}" for point in _mounts(roots)),
            *(f"loop device {device}" for device in _loop_devices(roots)),
            *(f"directory {path}" for path in sorted(self.made) if path.exists()),
        ]


def _below(path: str, roots: set[Path]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)


def _processes(session: str, roots: set[Path]) -> dict[int, str]:
    """Processes that inherited the session's variable or work below one of `roots`, with their command lines."""
    mark = f"{SESSION_VARIABLE}={session}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            inherited = mark in (entry / "environ").read_bytes().split(b"\0")
            if inherited or _below(os.readlink(entry / "cwd"), roots):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:  # without one it is dead already and only waits for its parent
                    found[int(entry.name)] = command
    return found


def _mounts(roots: set[Path]) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if _below(point, roots)]


def _loop_devices(roots: set[Path]) -> list[str]:
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            backing = file.read_text().strip().removesuffix(" (deleted)")
            if _below(backing, roots):
                found.append(f"/dev/{file.parent.parent.name} on {backing}")
    return found
