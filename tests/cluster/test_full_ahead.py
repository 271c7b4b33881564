"""How long until the journal is full is said beforehand, and is about right: who believes it has so long to act."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pgcdp import api, service
from tests.beside import repeated
from tests.failing_disks import SmallDisk
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet
from tests.results import keep_result
from tests.scratch import scratch_directory
from tests.waiting import wait_until

LOAD_SECONDS = 75.0


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], SmallDisk]]:
    """small_disk(size): ask for it before `make_set`, whose store lies on it."""
    root = scratch_directory("full")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root)

        def make(size: int) -> SmallDisk:
            disk = SmallDisk(root, "store", size)
            stack.callback(disk.end)
            return disk

        yield make


@pytest.mark.soak  # what it tells apart is told only by a machine that has nothing else to do
@pytest.mark.timeout(900)  # a slow machine fills it slowly
def test_the_journal_is_full_when_it_was_said(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The agent dies under load: capture goes on about as long as `status` said before.

    Within a factor of 4: a load is as steady as the machine that it shares.
    """
    found = make_set(
        binaries_of(17),
        size=2 << 30,  # nobody asks for checkpoints meanwhile: WAL must not fill the volume before the journal is full
        journal_limit=512 << 20,
        segment_size=16 << 20,
        settings={"max_wal_size": "8GB"},
        allowed=[r"the journal is full: writes wait", r"writes go on"],
    )
    assert api.status(found.name)["until_full"]["store"]["room"] > 0
    found.sql("create table load (n int, what text)")

    def write() -> None:
        found.sql("insert into load select n, repeat(md5(n::text), 30) from generate_series(1, 500) n")
        found.sql("truncate load")

    with repeated(write, pause=0.05):
        began = time.monotonic()
        wait_until(
            lambda: time.monotonic() - began > LOAD_SECONDS and api.status(found.name)["agent"]["rates"]["journal"],
            timeout=LOAD_SECONDS + 60, what="a rate of the journal",
        )  # fmt: skip
        told = api.status(found.name)["until_full"]
        os.kill(int(api.status(found.name)["agent"]["pid"]), signal.SIGKILL)
        died = time.monotonic()
        assert told["journal"]["room"] > 0
        assert told["journal"]["seconds"] is not None
        wait_until(
            lambda: found.engine.status().state == "stalled", timeout=5 * told["journal"]["seconds"] + 10,
            what="a full journal",
        )  # fmt: skip
        took = time.monotonic() - died
        # Nobody answers for what is written any more; without an agent the rate is that of the intervals.
        assert api.status(found.name)["until_full"]["journal"]["seconds"] in (0, None) or (
            api.status(found.name)["until_full"]["journal"]["room"] < 32 << 20
        )
        service.start(found.config)
        wait_until(lambda: found.engine.status().state == "capturing", timeout=60, what="room again")
    assert told["journal"]["seconds"] / 4 < took < told["journal"]["seconds"] * 4, (told["journal"], took)


@pytest.mark.soak  # minutes of steady load
@pytest.mark.timeout(1800)
def test_store_and_volume_fill_as_it_was_said(
    small_disk: Callable[[int], SmallDisk], make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """Of the room that there was, four fifths are gone after about four fifths of the time. Within a factor of 1.5."""
    found = make_set(
        binaries_of(17),
        size=768 << 20,
        store_at=small_disk(3 << 30).place / "store",
        settings={"max_wal_size": "64MB", "min_wal_size": "32MB"},
        allowed=[r"checkpoints are occurring too frequently"],
    )
    found.sql("create table load (n int, what text)")
    random = "(select string_agg(md5(random()::text || n || m), '') from generate_series(1, 30) m)"

    def write() -> None:
        found.sql(f"insert into load select n, {random} from generate_series(1, 500) n")

    def ahead() -> dict[str, dict[str, float]]:
        told = api.status(found.name)["until_full"]
        return {"store": told["store"], "volume": told["volumes"][0]}

    with repeated(write, pause=0.25), repeated(lambda: api.cut(found.name), pause=5.0):
        began = time.monotonic()
        wait_until(
            lambda: time.monotonic() - began > LOAD_SECONDS and all(each["seconds"] for each in ahead().values()),
            timeout=LOAD_SECONDS + 120, what="rates of store and volume",
        )  # fmt: skip
        told, since = ahead(), time.monotonic()
        took: dict[str, float] = {}

        def gone() -> bool:
            for name, now in ahead().items():
                if name not in took and now["room"] < told[name]["room"] / 5:
                    took[name] = time.monotonic() - since
            return len(took) == len(told)

        longest = max(each["seconds"] for each in told.values())
        wait_until(gone, timeout=2 * longest + 60, interval=1.0, what="most of the room is gone")
    keep_result("full-ahead", {"told": told, "four fifths gone after": took})
    for name, seconds in took.items():
        expected = told[name]["seconds"] * 0.8
        assert expected / 1.5 < seconds < expected * 1.5, (name, told[name], seconds)


def test_status_says_it_in_words_and_check_warns(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """At more than nothing, a small journal lasts less than an hour."""
    found = make_set(binaries_of(15), journal_limit=128 << 20, segment_size=16 << 20)
    found.sql("create table load (n int)")
    with repeated(lambda: found.sql("insert into load select generate_series(1, 2000)"), pause=0.2):
        wait_until(
            lambda: api.status(found.name)["until_full"]["journal"]["seconds"] is not None, timeout=150, what="a rate"
        )
        value = api.status(found.name)["until_full"]["journal"]
        rows = [each for each in api.check(found.name)["checks"] if each["name"] == "journal space"]
    assert (
        value["seconds"] == round(value["room"] / value["bytes_per_second"], 1)
        or abs(value["seconds"] - value["room"] / value["bytes_per_second"]) < 0.01 * value["seconds"]
    )
    assert [(each["ok"], each["warning"]) for each in rows] == [(True, True)]
    assert "if the store took nothing any more" in rows[0]["detail"]
    assert "raise journal_limit" in rows[0]["hint"]
