"""The agent gives way to production, and never so far that the journal fills up or somebody waits for it in vain."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from pgcdp import pace


@pytest.fixture
def thread() -> Iterator[int]:
    """The native id of a thread that does nothing."""
    end, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        end.wait()

    worker = threading.Thread(target=wait)
    worker.start()
    assert begun.wait(10)
    assert worker.native_id is not None
    yield worker.native_id
    end.set()
    worker.join()


def priority(thread: int) -> tuple[int, str]:
    """What the kernel says: scheduling policy, class of I/O."""
    said = subprocess.run(["ionice", "--pid", str(thread)], check=True, capture_output=True, text=True)
    return os.sched_getscheduler(thread), said.stdout.split(":")[0].strip()


def test_an_agent_that_keeps_up_takes_idle_time_only(thread: int) -> None:
    found = pace.Pace(thread, lambda: False)
    found.adjust()
    assert priority(thread) == (os.SCHED_IDLE, "idle")
    assert os.sched_getscheduler(0) != os.SCHED_IDLE, "the thread that answers requests must not starve"


def test_an_agent_that_somebody_waits_for_does_not_starve(thread: int) -> None:
    waiting = False
    found = pace.Pace(thread, lambda: waiting)
    found.adjust()
    waiting = True
    found.adjust()
    assert priority(thread) == (os.SCHED_BATCH, "best-effort")
    waiting = False
    found.adjust()
    assert priority(thread) == (os.SCHED_IDLE, "idle")


def test_an_agent_that_falls_behind_does_not_starve(thread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pace.Pace(thread, lambda: False)
    found.adjust()
    monkeypatch.setattr(pace, "BEHIND_SECONDS", 0.0)
    found.adjust()
    assert priority(thread) == (os.SCHED_BATCH, "best-effort")
    monkeypatch.undo()
    found.keeps_up()
    found.adjust()
    assert priority(thread) == (os.SCHED_IDLE, "idle")
