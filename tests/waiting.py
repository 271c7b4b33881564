"""Waiting for a condition: the tests never sleep for a guessed time."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
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


def pass_time(seconds: float) -> None:
    """Let time pass where its length is what is tested: a random moment, a load's share of a second."""
    select.select([], [], [], seconds)
