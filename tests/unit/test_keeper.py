"""The keeper outlives what keeps it from looking: nobody else starts the capture process that writes wait for."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pgcdp.capture import holder
from pgcdp.capture.keeper import Keeper
from pgcdp.sets import SetPaths
from tests.waiting import pass_time, wait_until


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
        assert time.process_time() - spent < (time.monotonic() - begun) / 2, "it takes a core"
    wait_until(lambda: not keeper.error, what="that it can look again")
    assert keeper._thread.is_alive()


def test_a_holder_whom_many_ask_at_once_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper would start another one beside it, and a command would wait for nobody."""
    monkeypatch.setattr(holder, "DOOR_SECONDS", 60.0)
    before: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(os.fspath(tmp_path / holder.SOCKET))
        listener.listen(1)
        listener.settimeout(0.02)  # it may have been let in, and not yet say so, when nobody else asks any more
        with pytest.raises(BlockingIOError):  # noqa: PT012
            while True:
                before.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                before[-1].connect(os.fspath(tmp_path / holder.SOCKET))
        asked = pool.submit(holder.lives_beside, tmp_path / "control")
        wait_until(lambda: asked.running() or asked.done(), what="that it is asked")
        pass_time(0.2)
        while not asked.done():  # it comes to them
            with suppress(TimeoutError):
                listener.accept()[0].close()
        assert asked.result()
    for each in before:
        each.close()
