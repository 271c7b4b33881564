"""kill -9 of a command with a view open, and of the engine that serves it: the next command leaves nothing of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp import api, service
from pgcdp.capture import volumes
from pgcdp.capture.control import EngineClient
from pgcdp.config import save_config
from pgcdp.errors import PreconditionError
from pgcdp.opening import scratch_place
from pgcdp.postgres.processes import title
from pgcdp.records import Target
from pgcdp.recovery.scratch import mounted
from pgcdp.store.image import read_state
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.moments import scratch_below
from tests.stopping import stop
from tests.waiting import pass_time, wait_until


@pytest.fixture
def found(make_set: MakeSet, binaries_of: BindirOf) -> ProtectedSet:
    made = make_set(binaries_of(15), size=352 << 20)
    made.sql("create table t as select n from generate_series(1, 1000) n")
    api.cut(made.name)
    return made


def start_verify(found: ProtectedSet, said: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """`pgcdp verify` in a process of its own, which stays in its SQL for a minute."""
    held = found.root / "held.sql"
    held.write_text("-- name: held\nselect pg_sleep(60) is not null;\n")
    code = "import sys; from pgcdp.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-P", "-c", code, "verify", found.name, "--sql", str(held)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, cwd="/")


BEFORE = volumes.loops_over(Path("/data")).keys()
"""What another run that was killed may have left on this machine."""


def engines(below: Path) -> list[int]:
    return [pid for pid, name in volumes.users_of(below) if name.startswith("pgcdp-engine")]


def assert_nothing_left(below: Path) -> None:
    assert volumes.mounts_below(below) == []
    assert volumes.loops_over(below) == {}
    # Of a file whose FUSE mount went before its loop device, only this is left of the path.
    wait_until(lambda: not volumes.loops_over(Path("/data")).keys() - BEFORE, what="end of loop devices without a path")
    assert volumes.users_of(below) == []
    assert list(below.glob("point-*")) == []


def statement_runs(below: Path) -> bool:
    """Whether the held statement runs: until then the command reads files of the view, and could not be killed while
    the engine is stopped."""
    return any(title(pid).endswith("SELECT") for pid, _ in volumes.users_of(below))


def assert_next_command_clears(found: ProtectedSet, below: Path) -> None:
    wait_until(lambda: not engines(below), timeout=30, what="the end of the engine, which lost its owner")
    boundary = read_state(found.source().store).boundary
    number = api.cut(found.name)["number"]
    wait_until(
        lambda: read_state(found.source().store).boundary >= number > boundary, timeout=60, what="the image moves again"
    )
    assert api.verify(found.name, Target("newest"))["ok"]
    assert_nothing_left(below)


def test_a_killed_verify_leaves_nothing(found: ProtectedSet) -> None:
    below = scratch_place(found.source())
    chooser = random.Random(4)
    for moment in range(4):
        process = start_verify(found)
        try:
            if moment == 0:
                wait_until(lambda: statement_runs(below), timeout=90, what="the statement in the view")
            else:
                wait_until(lambda: any(below.glob("point-*")), timeout=60, what="a scratch place")
                pass_time(chooser.random() * 1.5)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert_next_command_clears(found, below)


def test_the_image_stays_as_long_as_the_engine_answers(found: ProtectedSet) -> None:
    """The owner is killed while the engine cannot run, so cannot end: what it would show next must still be right."""
    found.allowed.append("is fenced")  # when its time is over, which it is not here
    below = scratch_place(found.source())
    process = start_verify(found)
    wait_until(lambda: statement_runs(below), timeout=90, what="the statement in the view")
    (pid,) = engines(below)
    stop(pid)
    try:
        process.kill()
        process.wait()
        store = found.source().store
        boundary = read_state(store).boundary
        number = int(api.cut(found.name)["number"])
        assert number > boundary, "intervals are published all the same"
        pass_time(1.0)
        assert read_state(store).boundary == boundary, "the image moved under an engine that was still there"
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: read_state(store).boundary >= number, timeout=60, what="the image moves")
    assert_next_command_clears(found, below)


def test_a_fenced_verify_says_so_and_the_image_moves(found: ProtectedSet) -> None:
    """The engine is stopped in the middle of a verification: cutting goes on, and production does not feel it."""
    save_config(replace(found.config, fence_after=5.0))
    found.kill_agent()
    service.start(found.config)
    found.allowed += ["is fenced", "was fenced"]
    below = scratch_place(found.source())
    process = start_verify(found, subprocess.PIPE)
    wait_until(lambda: statement_runs(below), timeout=90, what="the statement in the view")
    (pid,) = engines(below)
    stop(pid)
    number = int(api.cut(found.name)["number"])
    assert "the image waits" in wait_until(lambda: found.status()["agent"]["waiting"], what="it is said")
    store = found.source().store
    wait_until(lambda: read_state(store).boundary >= number, timeout=30, what="the image moves")
    assert engines(below) == []
    said = process.communicate(timeout=90)[1].decode()
    assert (process.returncode, "was fenced: in 5 s it did not learn that the image moves" in said) == (1, True), said
    assert "fence_after" in said
    assert found.status()["agent"]["waiting"] == ""
    assert api.verify(found.name, Target("newest"))["ok"]
    assert_nothing_left(below)


def test_a_killed_engine_is_said_and_leaves_nothing(found: ProtectedSet) -> None:
    source = found.source()
    below = scratch_below(found.root)

    def use_it() -> None:
        with mounted(source, source.resolve(Target("newest")), below) as pgdata:
            (control,) = below.glob("point-*/control")
            os.kill(EngineClient(control).request("status")["pid"], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                for file in sorted(pgdata.rglob("*")):
                    if file.is_file():
                        file.read_bytes()

    with pytest.raises(PreconditionError, match="the engine that showed the recovery point was killed"):
        use_it()
    below.mkdir(exist_ok=True)
    assert_nothing_left(below)
    with mounted(source, source.resolve(Target("newest")), below) as pgdata:
        assert (pgdata / "PG_VERSION").read_text() == "15\n"
