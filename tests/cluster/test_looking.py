"""Looking at a set while others look at it too, and while its open interval is long."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.postgres import cluster
from pgcdp.records import Target
from pgcdp.store.transactions import read_look
from pgcdp.units import parse_time
from tests.fix_postgres import BindirOf
from tests.fix_sets import LEFT, MakeSet
from tests.waiting import wait_until

MIB = 1 << 20
LEAST_SECONDS = 15.0


def test_verifies_at_the_same_time_both_succeed(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 * MIB, settings={"shared_buffers": "32MB"})
    found.sql("create table t as select n from generate_series(1, 5000) n")
    assert api.cut(found.name)["number"] == 1
    command = [sys.executable, "-m", "pgcdp", "verify", found.name, "--output", "json"]
    below = Path("/var/tmp") / f"pgcdp-{found.config.set_id_bytes.hex()[:12]}"
    for targets in (("--target-boundary", "1"), ()):
        running = [
            subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
            for words in (targets, ("--target-boundary", "0"), targets)
        ]
        for process in running:
            out, complaint = process.communicate(timeout=240)
            assert process.returncode == 0, (out, complaint)
            assert json.loads(out)["ok"] is True
        assert not below.exists()
    (row,) = api.info(found.name)["intervals"]
    assert row["verified"]["ok"] is True


def test_a_scratch_place_of_somebody_else_is_refused(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Its name is known in advance: whoever makes it first could change what root mounts and starts there."""
    found = make_set(binaries_of(15), size=384 * MIB, settings={"shared_buffers": "32MB"})
    below = Path("/var/tmp") / f"pgcdp-{found.config.set_id_bytes.hex()[:12]}"
    below.mkdir()
    try:
        below.chmod(0o777)
        with pytest.raises(PreconditionError, match=f"{below} can be written by others"):
            api.verify(found.name, Target("newest"))
        assert list(below.iterdir()) == []
    finally:
        below.rmdir()


def test_the_status_names_damage_and_what_is_left(make_set: MakeSet, binaries_of: BindirOf) -> None:
    # Not cut at the shutdown's checkpoint, which an agent that is about to end sees or not.
    found = make_set(binaries_of(15), size=384 * MIB, settings={"shared_buffers": "32MB"}, cut=("2h",))
    found.sql("create table t as select n from generate_series(1, 5000) n")
    boundary = api.cut(found.name)
    found.sql("insert into t values (1)")
    assert found.status()["postgres"] == "running"
    cluster.stop(found.pgdata, 60)
    halfway = found.status()
    assert (halfway["state"], halfway["postgres"]) == ("capturing", "stopped")
    api.down(found.name)
    whole = found.status()
    assert (whole["state"], whole["postgres"], whole["error"]) == ("stopped", "stopped", None)
    assert whole["recovery_window"]["to_write"] > boundary["to_write"]
    writes = found.store / "incoming" / "0000000002" / "writes"
    raw = writes.read_bytes()
    writes.write_bytes(b"x" + raw[1:])
    damaged = found.status()
    assert str(writes) in damaged["error"]
    assert damaged["recovery_window"] == {**whole["recovery_window"], "to_write": boundary["to_write"]} | {
        "to_time": damaged["recovery_window"]["to_time"]
    }
    assert found.verify(boundary["to_write"])["ok"]
    with pytest.raises(DamageError, match=str(writes)):
        api.verify(found.name, Target("newest"))
    writes.write_bytes(raw)


def test_a_set_whose_store_is_gone_tells_its_state_and_goes_down(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(
        binaries_of(15),
        size=384 * MIB,
        settings={"shared_buffers": "32MB"},
        allowed=[r"(WARNING|ERROR) .*/store\b"],  # the agent goes on without it, and says so if it comes to that
    )
    found.sql("create table t as select n from generate_series(1, 5000) n")
    api.cut(found.name)
    away = found.root / "away"
    found.store.rename(away)
    try:
        told = found.status()
        assert told["state"] == "capturing"
        assert str(found.store) in told["error"]
        checks = {row["name"]: row for row in api.check(found.name)["checks"]}
        assert not checks["store"]["ok"]
        assert str(found.store) in checks["space"]["detail"]
        assert str(found.store) in api.down(found.name)["error"]
    finally:
        away.rename(found.store)
    assert api.up(found.name)["error"] is None
    assert api.cut(found.name)["number"] >= 2


def test_a_store_on_a_read_only_filesystem_is_enough(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 * MIB, settings={"shared_buffers": "32MB"})
    found.sql("create table t as select n from generate_series(1, 5000) n")
    boundary = api.cut(found.name)
    api.verify(found.name, Target("boundary", 1))
    api.down(found.name)
    place, image = found.root / "copy", found.root / "image"
    place.mkdir()
    subprocess.run(["mount", "--bind", found.store, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        row = api.info(None, store=place)["intervals"][0]
        assert row["to_write"] == boundary["to_write"]
        assert row["verified"]["ok"]
        restored = api.restore(None, Target("boundary", 1), to_image=image, store=place)
        assert restored["bytes"] == image.stat().st_size
    finally:
        subprocess.run(["umount", place], check=True)
    api.restore(found.name, Target("boundary", 1), to_image=found.root / "other")
    assert image.read_bytes() == (found.root / "other").read_bytes()


def test_no_look_fails_while_the_agent_goes_on(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A journal that is given back all the time, and an interval every few seconds."""
    found = make_set(
        binaries_of(15),
        size=768 * MIB,
        settings={"shared_buffers": "32MB", "max_wal_size": "64MB", "min_wal_size": "32MB"},
        allowed=[r"checkpoints are occurring too frequently", r"the journal (is full|has space again)", LEFT],
        journal_limit=64 * MIB,
        segment_size=8 * MIB,
        cut=("2s",),
    )
    found.pgbench("-i", "-s", "5", "-q")
    load = subprocess.Popen(
        found.program("pgbench", "-n", "-c", "4", "-T", "3600", "postgres"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    began, looks, intervals = time.monotonic(), 0, 0
    try:
        while time.monotonic() - began < LEAST_SECONDS or looks <= 5 or intervals <= 3:
            assert load.poll() is None, "pgbench has ended"
            looks += 1
            status = found.status()
            assert status["error"] is None
            window = status["recovery_window"]
            assert window["from_write"] < window["to_write"]
            newest = api.resolve(found.name, Target("newest"))["recovery_point"]
            assert newest["write"] >= window["to_write"]
            for target in (Target("write", window["to_write"]), Target("time", parse_time(newest["time"]) + 1000)):
                assert api.resolve(found.name, target)["recovery_point"]["write"] >= window["to_write"]
            assert api.show(found.name, newest["write"])["write"] == newest["write"]
            intervals = len(api.info(found.name)["intervals"])
            assert api.resolve(None, Target("newest"), store=found.store)["recovery_point"]["write"] > 0
    finally:
        load.send_signal(signal.SIGINT)
        load.wait(60)
    assert api.cut(found.name)["number"] > intervals


def test_a_database_that_does_not_answer_keeps_its_names(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A look is what all others said, and what was known of that one; check tells of it."""
    found = make_set(
        binaries_of(15),
        size=384 * MIB,
        allowed=[
            "no look at the catalogs: database slow",
            "connection to client lost",
            "canceling statement due to lock timeout",  # check does not wait for it either
        ],
    )
    found.sql("create database slow")
    with found.connect("slow") as session:
        session.execute("create table kept (id int)")
    found.kill_agent()
    found.up()  # it looks as it starts
    api.cut(found.name)
    number = api.cut(found.name)["number"]

    def names() -> set[str]:
        seen = read_look(found.store / "incoming" / f"{number + 1:010d}")
        return {each.name for each in seen.relations if each.oid >= 16384} if seen else set()

    def told() -> list[str]:
        checks = api.check(found.name)["checks"]
        return [each["detail"] for each in checks if each["name"] == "look at the catalogs"]

    with found.connect("slow") as session:
        session.execute("begin; lock table pg_class in access exclusive mode")
        found.sql("create table here (id int)")
        found.kill_agent()
        found.up()
        wait_until(lambda: {"here", "kept"} <= names(), timeout=90, what="a look")
        wait_until(told, what="check to tell of it")  # the agent keeps the names first
        assert len(told()) == 1
        assert "database slow: " in told()[0]
        session.execute("rollback")
    found.kill_agent()
    found.sql("create table later (id int)")
    found.up()
    wait_until(lambda: {"here", "kept", "later"} <= names(), what="a look")
    assert not told()
