"""A process that dies at a chosen change to the disk: everything before it happened, nothing behind it does.

Counts what goes through `os`: files made, written, synced, renamed and removed. A write that is the last one is half
done. What C libraries write themselves (SQLite, Arrow) is not counted; what makes that count, is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for the moment of a kill. No cleanup comes through: each further change is refused, too."""


class Fate:
    """`left` changes happen yet; `done` counts those that happened."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.done = 0
        self.dead = False

    def step(self, half: Callable[[], object] | None = None) -> None:
        if self.done >= self.left or self.dead:
            if half is not None and not self.dead:
                half()
            self.dead = True
            raise Killed
        self.done += 1


CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "fdatasync", "ftruncate")


@contextmanager
def dying_after(changes: int) -> Iterator[Fate]:
    """Inside, the process dies after so many changes. Whoever asks `Fate.dead` knows whether it did."""
    fate = Fate(changes)
    with pytest.MonkeyPatch.context() as patched:
        for name in CHANGES:
            patched.setattr(os, name, _counted(fate, getattr(os, name)))
        plain_open, plain_write = os.open, os.pwrite

        def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC) and not os.fspath(path).endswith("lock"):
                fate.step()
            return plain_open(path, flags, *args, **more)

        def written(fd: int, data: Any, offset: int) -> int:
            fate.step(lambda: plain_write(fd, memoryview(data)[: len(data) // 2], offset))
            return plain_write(fd, data, offset)

        patched.setattr(os, "open", opened)
        patched.setattr(os, "pwrite", written)
        with suppress(Killed):
            yield fate


def _counted(fate: Fate, plain: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **more: Any) -> Any:
        fate.step()
        return plain(*args, **more)

    return counted
