"""kill -9 of the agent's work in the middle of everything: it goes on and ends with the same bytes.

Without Postgres, so that it can be killed often: a child process runs the stages as the agent does, and is killed at
random moments or exactly at a named step. At the end the store must be what a follower that nobody disturbed makes of
the same journal: images, sums, increments, writes, by the model that reads them from FORMAT.md alone.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pgcdp.capture.engine import EngineClient
from pgcdp.intervals import increments, stages as staging
from pgcdp.intervals.increments import Mode
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.records import Volume
from pgcdp.store import bundle, image, open_interval
from pgcdp.store.layout import Store
from tests.fix_engine import Capture, MakeCapture
from tests.model import StoredInterval, put_extents, read_journal, read_store, replay
from tests.results import keep_result
from tests.stage_history import SYSTEM, VOLUMES, History
from tests.waiting import wait_until

KILLED = -signal.SIGKILL


class Follower:
    """A store of its own beside a history's, filled by child processes that may be killed.

    `release` lets the engine forget what the store holds, as in service; then only the store knows the writes.
    """

    def __init__(self, history: History, name: str, mode: Mode, *, release: bool = False) -> None:
        self.history = history
        self.mode: Mode = mode
        self.release = release
        volumes = [Volume(i, each, size) for i, (each, size) in enumerate(VOLUMES.items())]
        set_id = bytes.fromhex(history.capture.set_id)
        self.path = history.capture.root / name
        Store.create(self.path, "raw", set_id, volumes)
        self.released = history.capture.root / f"{name}.released"
        self.finished = history.capture.root / f"{name}.finished"

    def open(self) -> Stages:
        """As the agent takes up a store at its start."""
        status = self.history.engine.status()
        settings = StageSettings(
            SYSTEM, tuple(self.history.capture.backing(name) for name in VOLUMES), self.mode, 3
        )
        released = int(self.released.read_text()) if self.released.exists() else 0
        return Stages.open(
            Store.open(self.path), self.history.journal, self, settings, synced=status.synced_write, released=released
        )  # fmt: skip

    def release_to(self, write: int) -> None:
        """What the store promised to hold, remembered as the engine's applied mark does."""
        fresh = self.released.with_suffix(".new")
        fresh.write_text(str(write))
        fresh.rename(self.released)
        if self.release:
            EngineClient(self.history.capture.socket).release(write)

    # the stages call the engine's `release`
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class _Releasing:
    """The engine as the stages see it, on behalf of a follower."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower

    def release(self, write: int) -> None:
        self.follower.release_to(write)
