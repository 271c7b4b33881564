"""kill -9 of the capture process, of the agent and of both, at random moments under load, on a real cluster.

After each: every commit that was acknowledged is there, the volume is byte for byte what store and journal say, the
next interval is cut, and the checks of Postgres pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from pgcdp import api
from pgcdp.records import Target
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.results import keep_result
from tests.survivors import Survivors
from tests.waiting import pass_time

ALLOWED = [
    *KILLED,
    r"PANIC:  ",
    r"(FATAL|ERROR|WARNING):  .*(Input/output error|Read-only file system|Transport endpoint|Structure needs cleaning)",
    r"ERROR:  could not read block \d+ in file .*: read only 4096 of 8192 bytes",  # judged by the client who sees it
    r"FATAL:  (the database system is in recovery mode|terminating connection)",
    r"WARNING:  terminating connection because of crash of another server process",
    r"FATAL:  could not open directory",
    r"FATAL:  could not create file .*: File exists",  # recovery creates what it opens first, and names that error
    r"checkpoints are occurring too frequently",
    r"connection to client lost",
    r"the agent did not answer",
]
VICTIMS: dict[str, Callable[[ProtectedSet], None]] = {
    "capture": lambda found: found.kill_engine(),
    "agent": lambda found: found.kill_agent(),
    "both": lambda found: found.kill_both(),
}


def make(make_set: MakeSet, binaries_of: BindirOf, **options: Any) -> ProtectedSet:
    settings = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB", "checkpoint_timeout": "30s"}
    found = make_set(binaries_of(15), size=384 << 20, settings=settings, allowed=ALLOWED, **options)
    found.pgbench("-i", "-q", "-s", "2")
    return found


def kill_round(found: ProtectedSet, load: Survivors, rng: random.Random, victim: str) -> dict[str, Any]:
    """One kill; the load runs on through it. What was seen, for the record."""
    before = load.acknowledged()
    load.wait_for(rng.randint(1, 400))
    pass_time(rng.random() / 20)
    boundary = len(found.source().intervals())
    VICTIMS[victim](found)
    plain_first = rng.random() < 0.5
    if plain_first:  # what `down` makes of it must be the same as what `up` does
        load.pause()
        api.down(found.name)
        found.assert_volume_is_newest()
    found.up()
    load.resume()
    load.assert_kept(found)
    load.wait_for(20)
    found.wait_following()
    cut = api.cut(found.name)
    assert cut["number"] > boundary, "no new interval was published"
    assert cut["to_write"] <= found.durable()
    return {
        "victim": victim,
        "down_first": plain_first,
        "commits_before": load.acknowledged() - before,
        "interval": cut["number"],
    }


def kill_rounds(found: ProtectedSet, victim: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    with Survivors(found, clients=6, seed=seed) as load:
        for _ in range(rounds):
            rows.append(kill_round(found, load, rng, victim))
        load.pause()
        load.assert_kept(found)
        found.amcheck()
        newest = found.durable()
        api.down(found.name)
        found.assert_volume_is_newest()
        assert found.source().resolve(Target("newest")).write >= newest
        found.up()
        load.assert_kept(found)
    return rows


@pytest.mark.parametrize("victim", VICTIMS)
def test_two_kills_under_load(make_set: MakeSet, binaries_of: BindirOf, victim: str) -> None:
    found = make(make_set, binaries_of)
    assert len(kill_rounds(found, victim, 2, seed=len(victim))) == 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
@pytest.mark.parametrize("victim", VICTIMS)
def test_twenty_kills_under_load(make_set: MakeSet, binaries_of: BindirOf, victim: str, fs: str) -> None:
    found = make(make_set, binaries_of, fs=fs)
    rows = kill_rounds(found, victim, 20, seed=100 + len(victim))
    keep_result(f"kill-{victim}-{fs}", rows)
    assert len(rows) == 20
