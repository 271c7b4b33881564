"""Waiting for a condition: the tests never sleep for a guessed time."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], *, timeout: float = 30.0, interval: float = 0.02, what: str = "condition"
) -> T:
    """The first true value of `condition`, asked every `interval` seconds.

    Raises TimeoutError naming `what` after `timeout` seconds; errors of `condition` come through at once.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true in {timeout} s")
        select.select([], [], [], interval)


def wait_named(pid: int) -> None:
    """Until the command line of a child can be read: an exec tells the parent that it is done before it has that."""
    cmdline = Path(f"/proc/{pid}/cmdline")
    wait_until(lambda: cmdline.read_bytes(), interval=0.001, what=f"the command line of process {pid}")


def pass_time(seconds: float) -> None:
    """Let time pass where its length is what is tested: a random moment, a load's share of a second."""
    select.select([], [], [], seconds)
