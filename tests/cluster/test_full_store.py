"""The store's disk is full to the last block, under load: the agent makes room by the settings, and nothing is lost.

Capture never stops, no client sees an error, and every point that the settings keep is there.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, service
from pgcdp.capture.attach import kill_and_wait
from pgcdp.errors import PreconditionError
from pgcdp.machine import Place
from pgcdp.records import Target
from pgcdp.recovery.expiring import Unreadable
from pgcdp.serving.full import make_room
from pgcdp.store.layout import Store
from pgcdp.store.lease import take_over
from pgcdp.store.reserve import FILE, LEAST_BYTES
from tests.cluster.test_expire import set_policy
from tests.failing_disks import SmallDisk
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet, reap
from tests.scratch import scratch_directory
from tests.survivors import Survivors
from tests.waiting import wait_until

Full = tuple[ProtectedSet, dict[int, int]]
MIB = 1 << 20
NO_ROOM = "no space left on device (error 28)"
ALLOWED = [
    r"(?i)no space left on device",
    r"the store is full: ",
    r"retention: ",
    r"closing the store: ",
    r"checkpoints are occurring too frequently",
]


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    """Ask for it before `make_set`, whose store lies on it."""
    root = scratch_directory("full")
    made = SmallDisk(root, "store", 1 << 30)
    yield made
    made.end()
    shutil.rmtree(root)


@pytest.fixture
def full(disk: SmallDisk, make_set: MakeSet, binaries_of: BindirOf) -> Iterator[Full]:
    """The set, and how many rows table t has at some boundaries."""
    made = make_set(
        binaries_of(15), size=384 * MIB, store_at=disk.place / "main", cut=("2s",), journal_limit=1 << 30,
        settings={"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB"}, allowed=ALLOWED,
    )  # fmt: skip
    made.pgbench("-i", "-q", "-s", "2")
    made.sql("create table t (n int)")
    rows = {}
    for count in range(1, 5):
        overwrite(made, 20)
        made.sql("insert into t values (1)")
        rows[int(api.cut(made.name)["number"])] = count
    yield made, rows
    disk.empty()


def overwrite(found: ProtectedSet, times: int) -> None:
    """Single writes that take a MiB each, of which an interval's end is made of one: these may go, and give room."""
    with (found.pgdata / "overwritten").open("wb") as file:
        for _ in range(times):
            file.seek(0)
            file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())


def reserve(found: ProtectedSet) -> Path:
    return found.store / FILE


def newest(found: ProtectedSet) -> int:
    return max([int(each["number"]) for each in api.info(found.name)["intervals"]], default=0)


def is_full(found: ProtectedSet) -> dict[str, Any] | None:
    """The status, when it says that the store is full and retention has nothing to give."""
    status: dict[str, Any] = api.status(found.name)
    error = status["error"] or ""
    return status if NO_ROOM in error and "retention has nothing to give" in error else None


def well_after(found: ProtectedSet, durable: int) -> None:
    def well() -> bool:
        status = api.status(found.name)
        return status["error"] is None and (status["agent"] or {}).get("taken_write", 0) >= durable

    try:
        wait_until(well, timeout=120, what="the agent goes on by itself")
    except TimeoutError as error:
        raise AssertionError(f"{error}: {api.status(found.name)}") from None


def assert_all_is_there(found: ProtectedSet, load: Survivors, rows: dict[int, int]) -> None:
    """What the settings keep: each boundary; and every commit in the newest point."""
    load.pause()
    assert load.errors == []
    well_after(found, found.engine.status().durable_write)
    api.cut(found.name)
    assert {each["number"] for each in api.info(found.name)["intervals"]} >= rows.keys()
    for number, count in rows.items():
        with found.running_at(Target("boundary", number)) as box, box.connect() as connection:
            assert connection.execute("select count(*) from t").fetchall() == [(count,)]
    with found.running_at(Target("newest")) as box:
        load.assert_kept(box)
    wrong = [each for each in api.check(found.name, full=True)["checks"] if not each["ok"]]
    assert [each for each in wrong if each["name"] in ("store", "journal", "catalog", "agent", "retention")] == []
    load.resume()


def test_a_full_store_gets_room_by_the_settings_under_load(full: Full, disk: SmallDisk) -> None:
    found, rows = full
    with Survivors(found, clients=1, seed=3) as load:
        wait_until(lambda: reserve(found).exists(), timeout=90, what="the reserve")
        first = reserve(found).stat()
        assert first.st_blocks * 512 >= LEAST_BYTES
        disk.fill()
        told = wait_until(lambda: is_full(found), timeout=60, what="it is said that nothing may go")
        assert told is not None
        assert f"what was written since boundary {newest(found)} waits in the journal" in told["error"]
        assert 'keep_writes = "0s" would give back about' in told["error"]
        assert "make room there" in told["error"]
        assert reserve(found).stat().st_ino == first.st_ino, "it is kept for when something may go"
        assert (told["state"], told["stored_write"] < told["durable_write"]) == ("capturing", True)
        (failed,) = [each for each in api.check(found.name)["checks"] if each["name"] == "agent"]
        assert "would give back" in failed["hint"]
        load.wait_for(100)
        durable = found.engine.status().durable_write
        set_policy(found, keep_writes="0s")
        well_after(found, durable)
        assert_all_is_there(found, load, rows)
        wait_until(lambda: reserve(found).exists(), timeout=90, what="the reserve again")


def test_an_agent_killed_in_the_reserve_comes_back(full: Full, disk: SmallDisk) -> None:
    found, rows = full
    with Survivors(found, clients=1, seed=4) as load:
        wait_until(lambda: reserve(found).exists(), timeout=90, what="the reserve")
        disk.fill()
        wait_until(lambda: is_full(found), timeout=60, what="it is said that nothing may go")
        agent = found.agent_pid()
        set_policy(found, keep_writes="0s")
        wait_until(lambda: not reserve(found).exists(), timeout=60, interval=0.0005, what="the reserve is given free")
        os.kill(agent, signal.SIGKILL)
        kill_and_wait(agent)
        reap()
        load.wait_for(100)
        durable = found.engine.status().durable_write
        service.start(found.config)
        well_after(found, durable)
        assert_all_is_there(found, load, rows)


def test_the_full_store_of_another_machine_is_left_alone(full: Full, disk: SmallDisk) -> None:
    found, _ = full
    wait_until(lambda: reserve(found).exists(), timeout=90, what="the reserve")
    service.stop(found.config)
    store, owner = Store.open(found.store), found.store / "owner.json"
    ours = owner.read_bytes()
    take_over(store, Place("/", "b" * 32, "uuid-2", "two", "boot-2"))
    set_policy(found, keep_writes="0s")
    disk.fill()
    before = {path: path.lstat() for path in found.store.rglob("*")}
    with pytest.raises(PreconditionError, match="belongs to two"):
        api.expire(found.name)
    with pytest.raises(PreconditionError, match="belongs to two"):
        api.rebuild(found.name)
    with pytest.raises(PreconditionError, match="belongs to two"):
        make_room(found.config, Unreadable(), lambda: False)
    after = {path: path.lstat() for path in found.store.rglob("*")}
    assert {path: (each.st_ino, each.st_size, each.st_mtime_ns) for path, each in after.items()} == {
        path: (each.st_ino, each.st_size, each.st_mtime_ns) for path, each in before.items()
    }
    disk.empty()
    owner.write_bytes(ours)
    service.start(found.config)
    found.wait_following()
