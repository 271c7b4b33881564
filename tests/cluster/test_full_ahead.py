"""How long until the journal is full is said beforehand, and is about right: who believes it has so long to act."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pgcdp import api, service
from tests.beside import repeated
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet
from tests.waiting import wait_until

LOAD_SECONDS = 75.0


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
