"""The service of a set as an operator meets it: twice, stopped, in the way, and cutting on its own."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, service
from pgcdp import config as settings
from pgcdp.capture.engine import capture_command
from pgcdp.errors import PreconditionError
from pgcdp.records import Target
from pgcdp.recovery.scratch import mounted
from pgcdp.units import format_lsn
from tests.bulk import Bulk
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.moments import scratch_below
from tests.waiting import wait_until

MIB = 1 << 20
LIMIT = 64 * MIB
SETTINGS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB", "checkpoint_timeout": "1h"}
ALLOWED = [
    *KILLED,
    r"checkpoints are occurring too frequently",
    r"the journal is full: writes wait",
    r"the journal has space again: writes go on",
    r"another .* holds|already runs|is held",
]


def make(make_set: MakeSet, binaries_of: BindirOf, **options: Any) -> ProtectedSet:
    return make_set(binaries_of(15), size=384 * MIB, settings=SETTINGS, allowed=ALLOWED, **options)


def small_journal(make_set: MakeSet, binaries_of: BindirOf) -> ProtectedSet:
    """Intervals never end by themselves: they must outgrow the journal."""
    return make(make_set, binaries_of, journal_limit=LIMIT, segment_size=8 * MIB, cut=("2h",))


def run_pgcdp(*words: str) -> subprocess.CompletedProcess[str]:
    """The program itself, in this test's root."""
    command = [sys.executable, "-m", "pgcdp", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)


# --- twice


def test_nothing_can_be_had_twice(make_set: MakeSet, binaries_of: BindirOf, tmp_path: Path) -> None:
    found = make(make_set, binaries_of)
    agent, engine = found.agent_pid(), found.engine.status().pid

    second = run_pgcdp("agent", found.name)
    assert second.returncode == 6, second.stderr
    assert "agent of set main" in second.stderr

    capture = subprocess.run(
        capture_command(found.config, create=False), capture_output=True, text=True, timeout=60, check=False
    )
    assert capture.returncode == 6, capture.stderr
    assert "lock" in capture.stderr or "another" in capture.stderr

    elsewhere = ["protect", "again", "--pgdata", str(found.pgdata), "--store", str(tmp_path / "store")]
    twice = run_pgcdp(*elsewhere, "--size", "512M", "--yes")
    assert twice.returncode == 6, twice.stderr
    assert "main" in twice.stderr
    same = run_pgcdp(
        "protect", "main", "--pgdata", str(tmp_path), "--store", str(tmp_path / "s"), "--size", "1G", "--yes"
    )
    assert same.returncode == 6, same.stderr

    assert (found.agent_pid(), found.engine.status().pid) == (agent, engine)
    found.up()
    assert (found.agent_pid(), found.engine.status().pid) == (agent, engine), "up of what runs changes nothing"
    found.sql("create table still_here ()")
    assert api.cut(found.name)["number"] == 1


def test_down_and_up_when_nothing_runs(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make(make_set, binaries_of)
    found.sql("create table kept as select 1 as n")
    assert api.down(found.name)["state"] == "stopped"
    status = api.down(found.name)
    assert (status["state"], status["phase"]) == ("stopped", "stopped")
    assert status["recovery_window"]["to_write"] >= status["recovery_window"]["from_write"] > 0
    with pytest.raises(PreconditionError, match="no agent runs"):
        api.cut(found.name)
    found.assert_volume_is_newest()
    assert api.check(found.name, full=True)["ok"] is False, "nothing is captured"
    for _ in range(2):
        assert api.up(found.name)["state"] == "capturing"
    found.wait_following()
    assert found.sql("select n from kept") == [(1,)]


def cut_when_it_answers(found: ProtectedSet) -> dict[str, Any]:
    """A cut; nothing when no agent answers yet."""
    with suppress(service.AgentGone):
        return dict(api.cut(found.name))
    return {}


def test_an_agent_that_was_just_started_is_waited_for(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """It answers before it has opened the store: no reason to refuse a cut, or a rewind that has started it itself."""
    found = make(make_set, binaries_of)
    found.sql("create table kept as select 1 as n")
    point = found.durable()
    for _ in range(3):
        service.stop(found.config)
        with ThreadPoolExecutor(1) as beside:
            started = beside.submit(service.start, found.config)
            assert wait_until(lambda: cut_when_it_answers(found), interval=0.0)["to_write"] >= point
            started.result()
    found.sql("drop table kept")
    service.stop(found.config)
    api.rewind(found.name, Target("write", point), agree=lambda told: None, prove=False)
    assert found.sql("select n from kept") == [(1,)]


# --- a full journal


def assert_goes_on(found: ProtectedSet, load: Bulk) -> None:
    wait_until(lambda: found.status()["state"] == "capturing", timeout=60, what="an end of the stall")
    load.wait_for(20)
    load.assert_kept(found)


def fill(found: ProtectedSet, load: Bulk) -> None:
    """Write until the journal is full: writes wait, and the status says so."""
    wait_until(lambda: found.engine.status().state == "stalled", timeout=120, what="a full journal")
    status = found.status()
    assert status["state"] == "stalled"
    assert status["journal"]["bytes"] <= status["journal"]["limit"] == LIMIT
    assert [each["name"] for each in api.check(found.name)["checks"] if not each["ok"] and "full" in each["detail"]]
    done = load.statements()
    wait_until(lambda: found.engine.status().state == "stalled", what="the stall")
    assert load.statements() - done <= 2 * len(load.done), "statements are answered that cannot be durable"


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_full_journal_waits_for_the_agent(make_set: MakeSet, binaries_of: BindirOf, how: str) -> None:
    found = small_journal(make_set, binaries_of)
    pid = found.agent_pid()
    with Bulk(found) as load:
        if how == "killed":
            found.kill_agent()
            fill(found, load)
            found.up()
        else:
            os.kill(pid, signal.SIGSTOP)
            try:
                wait_until(lambda: found.engine.status().state == "stalled", timeout=120, what="a full journal")
            finally:
                os.kill(pid, signal.SIGCONT)
        assert_goes_on(found, load)
    assert api.cut(found.name)["number"] >= 1
    api.down(found.name)
    found.assert_volume_is_newest()


def test_both_killed_with_a_full_journal(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Replay, mount and Postgres's recovery need room that only the agent can make."""
    found = small_journal(make_set, binaries_of)
    found.allowed += [r"PANIC:  ", r"FATAL:  ", r"ERROR:  ", r"WARNING:  "]
    load = Bulk(found)
    with load:
        found.kill_agent()
        wait_until(lambda: found.engine.status().state == "stalled", timeout=120, what="a full journal")
        found.kill_engine()
        found.up()
        assert load.take_failures(), "the clients outlived their server"
    load.assert_kept(found)
    with Bulk(found, table="more") as again:
        assert_goes_on(found, again)
    found.amcheck()
    assert api.cut(found.name)["number"] >= 1


def test_an_interval_larger_than_the_journal(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = small_journal(make_set, binaries_of)
    begun = int(found.engine.status().raw["bytes_written"])
    with Bulk(found) as load:
        wait_until(
            lambda: int(found.engine.status().raw["bytes_written"]) - begun > 2 * LIMIT,
            timeout=120,
            what="twice the journal",
        )
        assert found.status()["intervals"] == 0
        newest = found.durable()
        place = found.root / "early"
        api.restore(found.name, Target("write", newest), to_image=place)  # from image, open interval and journal
        place.unlink()
        load.wait_for(4)
        load.assert_kept(found)
    assert found.verify(newest)["ok"]
    api.cut(found.name)
    assert api.info(found.name)["intervals"][0]["bytes_written"] > 2 * LIMIT
    api.down(found.name)
    found.assert_volume_is_newest()


# --- when to cut


def follow_policy(found: ProtectedSet, *cut: str) -> int:
    """Let the agent follow other rules from now on; the number of intervals so far."""
    service.stop(found.config)
    settings.save_config(replace(found.config, cut=cut))
    service.start(found.config)
    found.wait_following()
    return len(api.info(found.name)["intervals"])


def wait_interval(found: ProtectedSet, number: int) -> dict[str, Any]:
    """The interval with that number, once it is there."""

    def listed() -> dict[str, Any] | None:
        return next((each for each in api.info(found.name)["intervals"] if each["number"] == number), None)

    row = wait_until(listed, timeout=60, what=f"interval {number}")
    assert row is not None
    return row


def test_the_agent_cuts_on_its_own(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make(make_set, binaries_of)
    count = follow_policy(found, "checkpoint", "2h")
    found.sql("create table t as select 1 as n")
    found.sql("checkpoint")
    assert wait_interval(found, count + 1)["reason"] == "checkpoint"

    count = follow_policy(found, "1s")
    found.sql("insert into t values (2)")
    assert wait_interval(found, count + 1)["reason"] == "period"

    count = follow_policy(found, "16M")
    with Bulk(found, clients=1):
        row = wait_interval(found, count + 1)
    assert row["reason"] == "quantity"
    assert row["bytes_written"] >= 16 * MIB

    count = follow_policy(found, "2h")
    found.sql("checkpoint")
    api.mark(found.name, "behind a checkpoint that is not cut at")
    taken = found.durable()
    wait_until(lambda: service.ask(found.config.paths, "status")["taken_write"] >= taken, what="the agent")
    assert len(api.info(found.name)["intervals"]) == count
    assert api.cut(found.name)["reason"] == "requested"


# --- what a boundary is


def controldata(found: ProtectedSet, pgdata: Path) -> dict[str, str]:
    """What pg_controldata says of a directory."""
    done = subprocess.run(
        [str(found.binaries.path("pg_controldata")), str(pgdata)],
        capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return dict(re.findall(r"^(.+?):\s+(.*)$", done.stdout, re.M))


@pytest.mark.parametrize("fs", ["ext4", pytest.param("xfs", marks=pytest.mark.soak)])
def test_a_boundary_is_its_checkpoint(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    """At it pg_control names the interval's checkpoint, one write earlier another one."""
    found = make(make_set, binaries_of, fs=fs, cut=("checkpoint",))
    rng = random.Random(4)
    with Bulk(found, clients=1) as load:
        for _ in range(2):
            load.wait_for(rng.randint(2, 15))
            if rng.random() < 0.5:
                found.sql("checkpoint")
            api.cut(found.name)
    source = found.source()
    boundaries = [source.base(), *(interval.boundary for interval in source.intervals())]
    assert len(boundaries) >= 3
    before = None
    for boundary in boundaries:
        point = source.resolve(Target("boundary", boundary.number))
        with mounted(source, point, scratch_below(found.root)) as pgdata:
            control = controldata(found, pgdata)
        assert control["Latest checkpoint location"] == format_lsn(boundary.checkpoint_lsn)
        assert control["Latest checkpoint's REDO location"] == format_lsn(boundary.redo_lsn)
        assert int(control["Latest checkpoint's TimeLineID"]) == boundary.timeline
        epoch, xid = control["Latest checkpoint's NextXID"].split(":")
        assert (int(epoch) << 32) + int(xid) == boundary.next_xid
        assert control["Latest checkpoint location"] != before
        before = control["Latest checkpoint location"]
        if boundary.number:
            earlier = source.resolve(Target("write", boundary.write - 1))
            with mounted(source, earlier, scratch_below(found.root)) as pgdata:
                assert controldata(found, pgdata)["Latest checkpoint location"] != before
