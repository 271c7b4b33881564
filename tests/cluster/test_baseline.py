"""The first backup image, copied under load with a journal much smaller than what is written meanwhile."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, service
from pgcdp.errors import PgcdpError
from pgcdp.progress import silent
from pgcdp.records import Target
from pgcdp.store.image import read_state
from tests.bulk import Bulk
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.results import keep_result
from tests.waiting import pass_time, wait_until

MIB = 1 << 20
LIMIT = 64 * MIB
SLICE = 256 * MIB
STEP_SECONDS = 0.5
SETTINGS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB", "autovacuum": "off"}
ALLOWED = [
    *KILLED,
    r"the journal is full: writes wait",
    r"writes go on",
    r"checkpoints are occurring too frequently",
    r"canceling statement due to user request",  # the agent gives up on a Postgres that waits for the journal
    r"connection to client lost",
]


class Protecting:
    """`pgcdp protect` in a thread; what it raised is kept: a test that kills the agent expects it."""

    def __init__(self, found: ProtectedSet, **options: Any) -> None:
        self.error: PgcdpError | None = None
        self._found = found
        self._options = options
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.protect(settings=SETTINGS, **self._options)
        except PgcdpError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(240)
        assert not self._thread.is_alive(), "protect does not end"

    def agent(self) -> dict[str, Any] | None:
        """The agent's status once it copies; None before."""
        assert self._thread.is_alive() or self.error is None, self.error
        try:
            state = service.ask(self._found.config.paths, "status")
        except PgcdpError:
            return None
        return state if state.get("baseline") else None


def written(found: ProtectedSet) -> int:
    return int(found.engine.status().raw["bytes_written"])


def wait_for_writes(found: ProtectedSet, goal: int) -> None:
    """Until so many bytes were captured, or none can be."""
    wait_until(
        lambda: written(found) > goal or found.engine.status().state == "stalled",
        timeout=60,
        what="writes while the agent stands still",
    )


def bytes_read(pid: int) -> int:
    """What a process has read by system calls so far."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def wait_for_slice(found: ProtectedSet, pid: int, released: int) -> bool:
    """Until the agent has copied a slice, or has made room in the journal (True)."""
    begun = bytes_read(pid)

    def done() -> bool:
        return bytes_read(pid) - begun > SLICE or found.engine.status().released_write > released

    wait_until(done, interval=0.0005, what="a slice of the copy")
    return found.engine.status().released_write > released


def slow_copy(found: ProtectedSet, pid: int, bytes_wanted: int, kills: int, rng: random.Random) -> dict[str, int]:
    """Let the stopped agent copy in short slices only, until so much was written and some of the agents were killed.

    While it stands still the journal fills up to its limit, and writes wait for the agent.
    """
    seen, begun, during = {"slices": 0, "stalls": 0, "kills": 0}, written(found), 0
    freed = False
    while during < bytes_wanted or seen["kills"] < kills:
        os.kill(pid, signal.SIGSTOP)
        try:
            if freed:
                wait_until(lambda: found.engine.status().released_write <= found.engine.status().synced_write)
            wait_for_writes(found, written(found) + LIMIT * 3 // 4)
            status = found.engine.status()
            image = read_state(found.source().store)
            assert image.state == "baseline", f"the copy ended after {during} bytes"
            assert sum(image.copied.values()) < found.config.volumes[0].bytes, f"all was copied after {during} bytes"
            during = written(found) - begun
            pass_time(STEP_SECONDS)  # the step that was interrupted is over by its clock, it goes on to make room
        finally:
            os.kill(pid, signal.SIGCONT)
        seen["slices"] += 1
        seen["stalls"] += status.state == "stalled"
        freed = wait_for_slice(found, pid, status.released_write)
        if seen["kills"] < kills and freed:
            pass_time(rng.random() / 50)
            found.kill_agent()
            service.start(found.config)
            pid = found.agent_pid()
            seen["kills"] += 1
    return {**seen, "bytes_written": during}


def run_baseline(make_set: MakeSet, binaries_of: BindirOf, *, times: int, kills: int, size: int) -> dict[str, int]:
    found = make_set(binaries_of(15), protect=False, allowed=ALLOWED)
    protecting = Protecting(found, size=size, journal_limit=LIMIT, segment_size=8 * MIB)
    first = wait_until(protecting.agent, timeout=120, interval=0.005, what="the copy")
    assert first is not None
    assert first["baseline"]["total"] == size
    os.kill(first["pid"], signal.SIGSTOP)
    with Bulk(found) as load:
        seen = slow_copy(found, first["pid"], times * LIMIT, kills, random.Random(kills))
        protecting.join()
        assert (protecting.error is not None) == bool(seen["kills"])
        api.wait_baseline(found.config, silent)
        wait_until(lambda: found.engine.status().state == "capturing", what="an end of the stall")
        load.wait_for(20)
        load.assert_kept(found)
    assert_baseline(found)
    with Bulk(found, clients=1):
        cut = api.cut(found.name)
    assert found.verify(cut["to_write"])["ok"]
    api.down(found.name)
    found.assert_volume_is_newest()
    return seen


def assert_baseline(found: ProtectedSet) -> None:
    """The oldest point is boundary 0, and Postgres starts on it and is right."""
    base = found.source().base()
    assert base.number == 0
    point = found.source().resolve(Target("boundary", 0))
    assert point.write == base.write
    result = found.verify(base.write)
    assert result["ok"], [check for check in result["checks"] if not check["ok"]]


@pytest.mark.soak
def test_a_baseline_outlasts_the_journal_three_times(make_set: MakeSet, binaries_of: BindirOf) -> None:
    seen = run_baseline(make_set, binaries_of, times=3, kills=0, size=12288 * MIB)
    assert seen["bytes_written"] >= 3 * LIMIT


def test_a_baseline_killed_several_times(make_set: MakeSet, binaries_of: BindirOf) -> None:
    seen = run_baseline(make_set, binaries_of, times=3, kills=3, size=12288 * MIB)
    assert seen["bytes_written"] >= 3 * LIMIT
    assert seen["kills"] == 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [0, 10])
def test_a_long_baseline(make_set: MakeSet, binaries_of: BindirOf, kills: int) -> None:
    seen = run_baseline(make_set, binaries_of, times=20, kills=kills, size=32768 * MIB)
    keep_result(f"baseline-{kills}-kills", seen)
    assert seen["bytes_written"] >= 20 * LIMIT
    assert seen["kills"] == kills
