"""The keeper outlives what keeps it from looking: nobody else starts the capture process that writes wait for."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgcdp.capture import holder
from pgcdp.capture.keeper import Keeper
from pgcdp.sets import SetPaths
from tests.waiting import wait_until


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Keeper]:
    if holder.missing() is not None:
        pytest.skip(f"no holder here: {holder.missing()}")
    monkeypatch.setattr("pgcdp.capture.keeper.LOOK_SECONDS", 0.02)
    paths = SetPaths(tmp_path, "main")
    paths.run.mkdir(parents=True)
    with Keeper(paths) as made:
        yield made


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Inside, this process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # these three are never free; poll takes no more than that
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_outlives_that_no_descriptor_is_to_be_had(keeper: Keeper) -> None:
    wait_until(lambda: keeper._thread.is_alive(), what="the keeper")
    with no_descriptors():
        wait_until(lambda: "Too many open files" in keeper.error or not keeper._thread.is_alive(), what="its error")
        assert keeper._thread.is_alive(), "nobody keeps any more"
        begun, spent = time.monotonic(), time.process_time()
        wait_until(lambda: time.monotonic() - begun > 0.5, interval=0.05, what="half a second")
        assert time.process_time() - spent < 0.25, "it takes a core"
    wait_until(lambda: not keeper.error, what="that it can look again")
    assert keeper._thread.is_alive()
