"""Processes that are stopped in truth, and told apart from those that were only told to: a signal is obeyed later."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.waiting import wait_until


def stop(pid: int) -> None:
    """SIGSTOP; back when it does nothing more. Its threads go on until one of them has come to take the signal."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: has_stopped(pid), interval=0.001, what=f"the stop of process {pid}")


def has_stopped(pid: int) -> bool:
    """Whether one thread has taken the stop, and no other runs: what one in a system call (D) waits for it still gets,
    and stops then."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return "T" in states and states <= {"T", "D", "Z", "X"}
